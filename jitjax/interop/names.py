"""Finding the sets of weights in a checkpoint, whatever wrapped, prefixed or renamed them.

A tensor's name is read from the first segment that a JiT has at its top (`blocks`, `x_embedder`, ...): what stands before
it is the origin (`net`, `ema_model.net`, ...), what follows is the name inside the network. Wrappers that PyTorch inserts
(`module`, `_orig_mod`, ...) are dropped wherever they stand. Names of Diffusers' JiTTransformer2DModel, with q, k and v
apart or together, become the official ones (source: huggingface/diffusers pull request 13098).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jitjax.interop.pickles import BadFile, Stray, is_stray

Tensors = dict[str, Any]  # values have .shape, .dtype and .numpy()

FINAL = {"norm_final": "norm_final", "linear_final": "linear", "adaLN_modulation_final": "adaLN_modulation"}
ROOTS = {
    *("pos_embed", "in_context_posemb", "t_embedder", "y_embedder", "x_embedder", "blocks", "final_layer"),
    *("feat_rope", "feat_rope_incontext", *FINAL),
}
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Buffers that follow from the geometry or only count; nothing is lost without them.
BUFFERS = re.compile(r"rope|freqs|(^|\.)(inv_freq|num_batches_tracked|num_updates|n_averaged|decay|position_ids)$")
# Branches of a checkpoint that hold no weights, though their tensors may be named like weights.
NOT_WEIGHTS = re.compile(r"^(opt|optim|scaler|lr_|sched|amp|rng|random|loops|args|config|hparams|hyper)", re.I)
# Of labels in small letters with words apart, see `is_ema`; not "schema" or "cinema".
EMA = re.compile(r"(?<![a-z])((model|net|unet|lit|g)?ema|swa|avg(?![a-z]))|averag|shadow|polyak")
NOT_EMA = re.compile(r"online|student", re.I)  # ema_pytorch saves the trained model beside its EMA
PARTS = {**dict.fromkeys(("to_q", "q_proj"), 0), **dict.fromkeys(("to_k", "k_proj"), 1), **dict.fromkeys(("to_v", "v_proj"), 2)}
MOMENTS = re.compile(r"^(exp_avg|max_exp_avg|mu$|nu$|momentum|moment)", re.I)
MAX_DEPTH = 8
MAX_DICTIONARIES = 10_000  # a pickle of a few hundred bytes can be billions, by references


@dataclasses.dataclass
class Found:
    """One set of weights of a file: what the file calls it, and its tensors under official names without prefix."""

    origin: str
    tensors: Tensors
    is_ema: bool
    decay: float | None = None  # where the file says it beside the set
    listed: list[Any] | None = None  # an EMA as a list in parameter order, not yet named


class Joined:
    """Tensors joined along their first axis when they are read, e.g. q, k and v."""

    def __init__(self, parts: list[Any]):
        self._parts, self.dtype = parts, parts[0].dtype
        self.shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])

    def numpy(self) -> np.ndarray:
        return np.concatenate([p.numpy() for p in self._parts])


def is_ema(label: str) -> bool:
    """Whether a name in a checkpoint is that of an EMA: "ema", "model_ema1", "EMA", "shadow_params", not "schema"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", label).lower()
    return bool(EMA.search(words)) and not NOT_EMA.search(label.split(".", 1)[-1])


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, read or not: it has `shape`, `dtype` and `numpy()`."""
    return hasattr(value, "numpy") and hasattr(value, "shape") and hasattr(value, "dtype")


def split_name(name: str) -> tuple[str | None, str]:
    """(origin, name inside the network); the origin is None if the name has no part that a JiT has."""
    segments = [s for s in name.split(".") if s not in WRAPPERS]
    for i, segment in enumerate(segments):
        if segment in ROOTS:
            return ".".join(segments[:i]), ".".join(segments[i:])
    return None, ".".join(segments)


def official_name(name: str) -> str:
    """The official name of a tensor that Diffusers or the official code names; q, k and v apart keep their own."""
    root, _, rest = name.partition(".")
    if root in FINAL:
        name = f"final_layer.{FINAL[root]}.{rest}"
    name = re.sub(r"\badaLN_modulation\.(weight|bias)$", r"adaLN_modulation.1.\1", name)
    name = re.sub(r"\.attn\.norm_([qk])\.", r".attn.\1_norm.", name)
    return re.sub(r"\.attn\.to_out\.0\.", ".attn.proj.", name)


def join_qkv(tensors: Tensors) -> Tensors:
    """q, k and v of each block as the official qkv (rows of q first, then k, then v).

    Raises:
      BadFile: one of the three is missing.
    """
    result, parts = {}, {}
    for name, value in tensors.items():
        before, _, last = name.rpartition(".")
        block, _, part = before.rpartition(".")
        if block.endswith(".attn") and part in PARTS:
            parts.setdefault(f"{block}.qkv.{last}", {})[PARTS[part]] = value
        else:
            result[name] = value
    for name, three in parts.items():
        if set(three) != {0, 1, 2} or name in result or len({tuple(p.shape[1:]) for p in three.values()}) != 1:
            raise BadFile(f"{name} is not made of one q, one k and one v of one width")
        result[name] = Joined([three[i] for i in range(3)])
    return result


def find_sets(content: Any, path: Any, notes: list[str], unread: list[str]) -> list[Found]:
    """The sets of weights in a loaded file, in the file's order.

    What is left out on the way is added to `notes`, and what seems to be an EMA or another model among it to `unread`.

    Raises:
      BadFile: no JiT in it, or a network with tensors that a JiT does not have.
    """
    found: list[Found] = []
    seen: list[str] = []
    lists: list[tuple[str, list, Mapping]] = []
    visits = itertools.count(1)

    def walk(value: Any, keys: tuple[str, ...], parent: Mapping) -> None:
        if isinstance(value, list | tuple) and len(value) > 9 and all(is_tensor(v) or v is None for v in value):
            lists.append((".".join(keys), list(value), parent))
        elif isinstance(value, list | tuple) and len(value) < 10 and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if not isinstance(value, Mapping) or len(keys) > MAX_DEPTH:
            return
        if next(visits) > MAX_DICTIONARIES:
            raise BadFile(f"{path}: refused: more than {MAX_DICTIONARIES} dictionaries within each other")
        tensors = {k: v for k, v in value.items() if isinstance(k, str) and is_tensor(v)}
        for origin, group in _groups(tensors, path, notes, unread).items():
            label = ".".join([*keys, origin] if origin else keys)
            decay = _number(value.get("decay", parent.get("decay") if keys else None))
            found.append(Found(label, group, is_ema(label), decay))
        seen.extend(tensors)
        for key, item in value.items():
            if not isinstance(key, str | int | float):
                continue
            key = str(key)
            if item is None and not keys and (is_ema(key) or key in ("model", "state_dict", "net")):
                notes.append(f"{key} is None in the file")
            if other := NOT_WEIGHTS.search(key):
                if _holds_network(item):
                    label = ".".join([*keys, key])
                    notes.append(f"left out: {label}, a whole network: what begins with {other[0]!r} is not read as weights")
                    unread.append(label)
                unread.extend(f"{key}.{name}" for name in (_emas_in(item) if key.startswith("opt") else []))
                continue
            before = len(found) + len(lists)
            walk(item, (*keys, key), value)
            if len(found) + len(lists) == before and key not in tensors and is_ema(key) and _holds_values(item):
                label = ".".join([*keys, key])
                if not any(other.startswith(f"{label}.") for other in unread):
                    notes.append(f"left out: {label}, in which no whole network was found")
                    unread.append(label)

    walk(content, (), {})
    for label, values, parent in lists:
        if is_ema(label):
            found.append(Found(label, {}, True, _number(parent.get("decay")), listed=values))
    if not any(f.tensors for f in found):
        what = some(seen or [str(k) for k in content]) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        if isinstance(content, Stray):
            what = f"an object of {content.name} (save its state_dict() instead)"
        raise BadFile(f"{path}: expected a checkpoint with model, model_ema1, model_ema2 or a state dict of JiT, found {what}")
    return found


def _below(value: Any, max_depth: int = MAX_DEPTH) -> Iterator[Any]:
    """A value and what its dictionaries and lists hold, each object once: a pickle may refer to one any number of times."""
    pending, seen = [(value, 0)], set()
    while pending:
        value, depth = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Mapping | list | tuple) and depth < max_depth:
            inside = value.values() if isinstance(value, Mapping) else value
            pending += [(item, depth + 1) for item in inside]


def _holds_values(value: Any) -> bool:
    """Whether there may be weights in a branch: tensors, or objects that are not read."""
    return any(isinstance(item, Stray) or (is_tensor(item) and bool(tuple(item.shape))) for item in _below(value))


def _holds_network(value: Any) -> bool:
    """Whether a state dict of a JiT is in a branch that is not searched for weights; moments by parameters' names are none."""
    branches = [item for item in _below(value) if isinstance(item, Mapping)]
    moments = {id(item) for branch in branches for key, item in branch.items() if MOMENTS.search(str(key))}
    branches = [branch for branch in branches if id(branch) not in moments]
    tensors = (key for branch in branches for key, item in branch.items() if isinstance(key, str) and is_tensor(item))
    return any(split_name(key)[1] == "x_embedder.proj1.weight" for key in tensors)


def _emas_in(value: Any) -> list[str]:
    """Names of EMAs in a branch that is not searched for weights, such as an optimizer that makes one."""
    branches = [item for item in _below(value, 3) if isinstance(item, Mapping)]
    found = [key for branch in branches for key in branch if isinstance(key, str) and re.search(r"(?<![a-z])ema", key, re.I)]
    return [key for key in dict.fromkeys(found) if any(_holds_values(branch.get(key)) for branch in branches)]


def _groups(tensors: Tensors, path: Any, notes: list[str], unread: list[str]) -> dict[str, Tensors]:
    """{origin: tensors by official name} of one flat state dict."""
    groups: dict[str, Tensors] = {}
    others: list[str] = []
    for name, value in tensors.items():
        origin, inside = split_name(name)
        if origin is None:
            others.append(name)
            continue
        inside = official_name(inside)
        group = groups.setdefault(origin, {})
        if inside in group:
            raise BadFile(f"{path}: two tensors are called {origin}.{inside} once wrappers are dropped, one is {name[:80]}")
        group[inside] = value
    others = _undotted(groups, others, tensors)
    whole = {origin: group for origin, group in groups.items() if "x_embedder.proj1.weight" in group}
    if not whole:
        return {}
    for origin, group in groups.items():
        if origin not in whole:
            notes.append(f"left out: {some(f'{origin}.{name}' for name in group)}, which are no whole network")
            unread.extend([origin] * is_ema(origin))
    groups = {origin: join_qkv(group) for origin, group in whole.items()}
    left: list[str] = []
    for origin, group in groups.items():
        unused = [name for name, value in group.items() if BUFFERS.search(name) or _is_counter(value)]
        left += unused
        groups[origin] = {name: value for name, value in group.items() if name not in unused}
    outside: list[str] = []
    for name in others:
        inside = split_name(name)[1]
        homes = [o for o in groups if not o or inside.startswith(o + ".")]
        if BUFFERS.search(name) or _counts(tensors[name]):
            left.append(name)
        elif homes:  # part of the network: the caller refuses it by name
            groups[max(homes, key=len)][inside.removeprefix(max(homes, key=len)).lstrip(".")] = tensors[name]
        else:
            outside.append(name)
    if left:
        notes.append(f"left out: {some(left)}, which follow from the geometry or only count")
    if outside:
        unread.extend(o for o in {name.rpartition(".")[0] for name in outside} if is_ema(o))
        notes.append(f"left out: {some(outside)}, which are outside of the network ({', '.join(groups)})")
    return groups


def _undotted(groups: dict[str, Tensors], others: list[str], tensors: Tensors) -> list[str]:
    """Adds EMAs whose names have lost their dots, as LitEma (CompVis) registers them; returns the rest of `others`."""
    short: dict[str, str] = {}
    for origin, group in list(groups.items()):
        outer = origin.split(".") if origin else []
        for name in group:
            inner = name.replace(".", "")
            short |= {"".join(outer[i:]) + inner: name for i in range(len(outer) + 1)}
    rest = []
    for name in others:
        before, _, last = name.rpartition(".")
        if last in short and is_ema(before):
            groups.setdefault(before, {})[short[last]] = tensors[name]
        else:
            rest.append(name)
    return rest


def name_list(values: list[Any], reference: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Tensors | None:
    """The tensors of a list in parameter order by name, or None if the shapes do not fit.

    `reference` is the order of the names in the file's own state dict; the fixed positions may be in the list or not.
    """
    order = [name for name in reference if name in shapes]
    for names in (order, [n for n in order if n != "pos_embed"], list(shapes), [n for n in shapes if n != "pos_embed"]):
        if len(names) == len(values) and all(
            v is not None and tuple(v.shape) == shapes[n] for n, v in zip(names, values, strict=True)
        ):
            return dict(zip(names, values, strict=True))
    return None


def some(names: Iterable[str]) -> str:
    """ "43 entries (a, b, c, ...)"."""
    names = [str(name)[:60] for name in names]
    return f"{len(names)} entries ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"


def decay_in(label: str) -> float | None:
    """A decay in a set's name, e.g. ema_0.9999 or ema0_9996."""
    match = re.search(r"(?<!\d)0[._](\d+)", label)
    return float(f"0.{match[1]}") or None if match else None


def order_in(label: str) -> int | None:
    """The number that ends the name of an EMA, e.g. 2 of model_ema2."""
    match = re.search(r"(?:ema|params|avg|shadow)_?(\d{1,2})(?!\.?\d)", label, re.I)
    return int(match[1]) if match else None


def _is_counter(value: Any) -> bool:
    """Whether a tensor inside the network is one whole number. A single float (a learned scale) is part of the network."""
    return not tuple(value.shape) and np.dtype(value.dtype).kind in "iub"


def _counts(value: Any) -> bool:
    """Whether a tensor is a counter or a flag rather than a weight: without dimensions, or of whole numbers."""
    return not tuple(value.shape) or np.dtype(value.dtype).kind in "iub"


def _number(value: Any) -> float | None:
    if is_tensor(value) and tuple(value.shape) == ():
        value = float(str(value.numpy()[()]))  # 0.999, not the float32's 0.99900001
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1 else None


def plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The plain entries of a file's arguments, and the names of the others with what they are."""
    result = {k: v for k, v in values.items() if isinstance(k, str) and (v is None or isinstance(v, bool | int | float | str))}
    stray = []
    for key, value in values.items():
        if key not in result:
            known = isinstance(value, Stray) or is_stray(value)
            stray.append(f"{key} ({value.name if known else type(value).__name__})")
    return result, stray
