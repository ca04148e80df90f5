"""The sets of weights in one file: which is the model and which its EMAs, with what decays, and which one is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jitjax.errors import UserError
from jitjax.interop import names, official
from jitjax.interop.sources import Source
from jitjax.settings import POWER

DEFAULT_DECAYS = (0.9999, 0.9996)  # the official defaults
DECAY = r"0\.\d+|1\.0|\d(?:\.\d+)?e-\d+"  # a number in [0, 1] as Python writes it


def name_sets(
    found: list[names.Found], args: Mapping[str, Any], source: Source, which: str | None, notes: list[str], unread: list[str]
) -> tuple[dict[str, names.Tensors], dict[str, str], tuple[float | str, ...]]:
    """Sets by our names, what the file calls them, and the decays of the EMAs in order.

    Args:
      found: as `names.find_sets` gives them.
      args: the official arguments in the file, which may give decays.
      which: the set that will be used, as for `select`; it decides which of several models is read.
      notes, unread: get a line, and the name, for each set that is left out.
    """
    for one in found:  # the official code's own attribute says nothing
        one.origin = re.sub(r"(^|\.)net$", "", one.origin)

    def rank(model: names.Found) -> int:
        """Which of several models is read: the one asked for by the file's own name, then one with the usual name."""
        return -1 if which and model.origin == which else not re.match(r"(model|net|state_dict)?($|\.)", model.origin)

    raw = sorted((f for f in found if not f.is_ema), key=rank)
    ours = source.metadata.get("sets") or []  # of a file that we wrote, which lists names by the alphabet

    def order(ema: names.Found) -> tuple[int, int]:
        decay = str(_decay_in(ema.origin))
        return (0, ours.index(decay)) if decay in ours else (names.order_in(ema.origin) or 0, 0)

    emas = sorted((f for f in found if f.is_ema), key=order)
    if raw[1:]:
        others = [f.origin or "the one without a prefix" for f in raw[1:]]
        notes.append(
            f"the file has several models: {raw[0].origin or 'the one without a prefix'} is read, not {', '.join(others)}"
        )
        unread += others
    sets, origins, decays = {}, {}, []
    if raw:
        sets["model"], origins["model"] = raw[0].tensors, raw[0].origin
    for ema in emas:
        if ema.listed is not None:
            reference = next((f.tensors for f in [*raw, *emas] if f.tensors), {})
            shapes = {name: tuple(t.shape) for name, t in reference.items()}
            listed = names.name_list(ema.listed, reference, shapes)
            if listed is None:
                notes.append(f"left out: {ema.origin}, a list of {len(ema.listed)} tensors that does not fit the model")
                unread.append(ema.origin)
                continue
            ema.tensors = listed
            notes.append(f"{ema.origin} is a list: its tensors were named in the order of the model's parameters")
        number = len(decays) + 1
        said = (_decay_in(ema.origin), ema.decay, _decay_of(args, number, len(emas)))
        decay = next((decay for decay in said if decay is not None), None)  # 0 is one
        if decay is None and number <= len(DEFAULT_DECAYS):
            decay = DEFAULT_DECAYS[number - 1]
            if args or ema.origin.split(".")[0] not in official.SETS:
                notes.append(f"the file does not give the decay of {ema.origin}: {decay} is assumed, the official default")
        if decay is None or decay in decays:
            notes.append(f"left out: {ema.origin}, an EMA of unknown or repeated decay")
            unread.append(ema.origin)
            continue
        name = f"model_ema{number}"
        sets[name], origins[name] = ema.tensors, ema.origin
        decays.append(decay)
    if source.config.get("format") != "jitjax":
        notes += [f"{name} is what the file calls {origin}" for name, origin in origins.items() if origin not in ("", name)]
    constant = next((t[official.POSITIONS] for t in sets.values() if official.POSITIONS in t), None)
    for tensors in sets.values():
        if constant is not None:
            tensors.setdefault(official.POSITIONS, constant)
    return sets, origins, tuple(decays)


def _decay_in(origin: str) -> float | str | None:
    if power := re.search(rf"{POWER}({DECAY})", origin):
        return power[0]
    ours = re.fullmatch(rf"ema_({DECAY})", origin)
    return float(ours[1]) if ours else names.decay_in(origin)


def _decay_of(args: Mapping[str, Any], number: int, count: int) -> float | None:
    keys = [f"ema_decay{number}", *(["ema_decay", "ema_rate", "ema"] if count == 1 else [])]
    given = [(key, args[key]) for key in keys if isinstance(args.get(key), int | float) and not isinstance(args[key], bool)]
    # Under the official name 0 and 1 are decays, as a run may have them; elsewhere they may be switches.
    return next((float(v) for key, v in given if 0 < v < 1 or (key == keys[0] and v in (0, 1))), None)


def select(
    origins: Mapping[str, str],
    decays: tuple[float | str, ...],
    which: str,
    path: Any,
    notes: list[str],
    unread: Sequence[str] = (),
) -> str:
    """The name, among the keys of `origins`, of the set that `which` means.

    Args:
      origins: what the file calls each set.
      decays: of the EMAs among the sets, in order.
      unread: EMAs and models that the file has and that were not read, so that no other set stands in for them.

    Raises:
      UserError: none; names what is there.
    """
    emas = [name for name in origins if name != "model"]
    if which in origins:
        return which
    by_origin = [name for name, origin in origins.items() if origin == which]
    by_decay = [name for name, decay in zip(emas, decays, strict=True) if which == str(decay)]
    if which == "params" and "model" in origins:
        return "model"
    if len(by_origin or by_decay) == 1:
        return (by_origin or by_decay)[0]
    if which == "ema" and len(emas) == 1:
        return emas[0]
    if len(origins) == 1 and not unread and (which in official.SETS or which == "ema"):
        (only,) = origins
        notes.append(f"the file has one set of weights ({origins[only] or only}): it is used as {which}")
        return only
    known = [name if origin in ("", name) else f"{name} (called {origin})" for name, origin in origins.items()]
    hint = f" (not read: {', '.join(unread)})" if unread else ""
    raise UserError(f"{path}: which={which!r} is not in the file: use one of {', '.join(known)}{hint}")
