"""`jitjax train --dry_run`: what a run will be, what it needs and what looks wrong, on any machine and without its cards."""

from __future__ import annotations

import collections
import json
import re
import time

import jax

from jitjax import cards, describe, estimate, memory, model, sharding, speeds, tables
from jitjax import settings as settings_lib
from jitjax.cards import CARDS, Card
from jitjax.describe import Outlook
from jitjax.errors import UserError
from jitjax.memory import GIB, Needs
from jitjax.settings import Settings

LINK = 360e9  # bytes per second and card, of ring all-reduces over the NVLink of eight H100; docs/speed.md, "Eight cards"


def dry_run(settings: Settings, *, devices: int, card: str) -> str:
    """Everything, as text.

    Args:
      devices: how many cards to pretend; as many emulated CPU devices must be there.
      card: a key of `cards.CARDS`.

    Raises:
      UserError: a mistake in the settings or the data.
    """
    if jax.device_count() < devices:
        raise UserError(f"--devices={devices}: JAX started with {jax.device_count()}; set JAX_NUM_CPU_DEVICES={devices} before")
    outlook = describe.look(settings, devices=jax.devices()[:devices], may_lack_data=True)
    chosen = CARDS[card]
    begun = time.perf_counter()
    needs = memory.needs(settings, outlook.geometry, outlook.plan, outlook.mesh, chosen)
    seconds = time.perf_counter() - begun
    warnings = describe.warnings(outlook)
    if needs.program > chosen.usable:
        warnings.insert(0, f"it does not fit an {card.upper()}: {what_fits(outlook, chosen)}")
    parts = [
        json.dumps(settings_lib.to_dict(settings), indent=1),
        describe.rows(outlook, f"{chosen.device_kind} (pretended)") + f"\n{duration(outlook, card)}",
        parameter_table(outlook),
        memory_table(outlook, needs, card),
        communication_table(outlook, needs),
        "\n".join(f"warning: {line}" for line in warnings) or "nothing looks wrong",
        f"(compiled in {seconds:.0f} s; nothing was run)",
    ]
    return "\n\n".join(parts)


def duration(outlook: Outlook, card: str) -> str:
    """How long it takes, where the speed was measured."""
    settings, plan, geometry = outlook.settings, outlook.plan, outlook.geometry
    name = f"{'time':<16}  "
    if card not in cards.WITH_FLOPS:
        return name + f"no speed was measured on an {card.upper()}; `jitjax estimate --measure` takes one there"
    measured, reason = speeds.measured_utilisations(settings, geometry, card)
    if not measured:
        return name + f"not known, as {reason}; `jitjax estimate --measure` takes the speed on a card"
    basis = speeds.basis_of_table(measured, settings, card, outlook.mesh.size)
    tokens = plan.total_steps * plan.global_batch * geometry.tokens
    where = dict(devices=outlook.mesh.size, peak=CARDS[card].flops, images_per_epoch=outlook.images)
    low, middle, high = estimate.estimate(geometry, basis.utilisations, [tokens], **where)
    times = [tables.format_duration(row.seconds) for row in (high, middle, low)]
    return name + f"{times[1]} ({times[0]} to {times[2]}), {middle.tokens_per_second:,.0f} tokens/s; `jitjax estimate` has more"


def parameter_table(outlook: Outlook) -> str:
    """Parameters by name, those of repeated blocks together, with what a device holds of each."""
    shapes = jax.eval_shape(model.init_fn(outlook.geometry), jax.random.key(0))
    placed = sharding.shardings(shapes, outlook.mesh)
    groups = collections.defaultdict(list)
    for name, leaf in shapes.items():
        held = placed[name].shard_shape(leaf.shape)
        groups[re.sub(r"^blocks\.\d+\.", "blocks.*.", name), leaf.shape, held, placed[name].spec].append(leaf.size)
    cells = [("parameter", "number", "shape", "elements", "on a device", "sharding")]
    for (name, shape, held, spec), sizes in groups.items():
        split = next((f"axis {axis} over {name}" for axis, name in enumerate(spec) if name), "whole")
        cells.append((name, f"{len(sizes)} x", _shape(shape), f"{sum(sizes):,}", _shape(held), split))
    total = sum(leaf.size for leaf in shapes.values())
    cells.append(("all", f"{len(shapes)} x", "", f"{total:,}", "", ""))
    return tables.columns(cells, left=("parameter", "sharding"))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def memory_table(outlook: Outlook, needs: Needs, card: str) -> str:
    """Bytes of one device by what they are for, and whether they fit."""
    settings, chosen = outlook.settings, CARDS[card]
    kernels = "fused kernels as opaque calls" if needs.kernels == "fused" else "plain operations"
    emas = len(settings.optim.ema_decays) + len(settings.optim.power_emas)
    moments = "AdamW's moments" if settings.optim.name == "adamw" else "Muon's momentum, AdamW's moments,"
    cells = [
        ("memory of one device", "GiB", ""),
        ("parameters", needs.params, "float32, counted"),
        ("gradients", needs.gradients, "float32, counted"),
        ("optimizer", needs.optimizer, f"{moments} in float32, counted"),
        ("EMAs", needs.ema, f"{emas} in float32, counted"),
        ("batch", needs.batch, f"{settings.optim.accumulation_steps} x {settings.batch_size} images, counted"),
        ("activations", needs.working, f"and working memory: the rest of the compiled step ({kernels})"),
        ("sum", needs.program, "compiled for CPU devices; docs/speed.md compares with cards"),
        ("usable", chosen.usable, f"{chosen.usable / chosen.memory:.0%} of an {card.upper()}'s {chosen.memory / GIB:.1f}"),
    ]
    text = tables.columns(
        [cells[0], *((name, f"{size / GIB:.2f}", note) for name, size, note in cells[1:])], left=("memory of one device", "")
    )
    if needs.program > chosen.usable:
        return f"{text}\nit does not fit"
    fixed = needs.program - needs.working
    largest = int((chosen.usable - fixed) * settings.batch_size // max(needs.working, 1))
    return f"{text}\nit fits; about {largest:,} images in a micro-batch would, too"


def what_fits(outlook: Outlook, card: Card) -> str:
    def look(settings: Settings) -> Needs:
        return memory.needs(settings, outlook.geometry, outlook.plan, outlook.mesh, card)

    fit = memory.fitting(outlook.settings, look, card.usable)
    if fit is None:
        return "not even one image at a time does; use --config.remat=full, a larger --config.mesh.fsdp, or a smaller model"
    return (
        f"{memory.flags(fit[0])} is the same effective batch and needs {fit[1].program / GIB:.1f} GiB; "
        "--config.remat=dots or full may do, too"
    )


def communication_table(outlook: Outlook, needs: Needs) -> str:
    """Collectives of one optimizer step, as the compiled program has them."""
    if not needs.collectives:
        return "nothing crosses devices"
    totals = collections.defaultdict(collections.Counter)
    for op in needs.collectives:
        times = op.times or 1
        totals[op.kind, op.group].update(calls=times, bytes=times * op.bytes, sent=times * op.sent)
    cells = [("between devices", "devices", "calls", "arrays", "sent by each")]
    for (kind, group), found in sorted(totals.items()):
        sizes = (tables.format_bytes(found[name]) for name in ("bytes", "sent"))
        cells.append((kind, str(group), f"{found['calls']:,}", *sizes))
    sent = sum(found["sent"] for found in totals.values())
    unknown = "; a loop of unknown length counts once" if any(op.times is None for op in needs.collectives) else ""
    return (
        tables.columns(cells, left=("between devices",))
        + f"\nper optimizer step, read from the compiled program{unknown}; at {LINK / 1e9:.0f} GB/s (NVLink, eight H100) "
        f"{sent / LINK * 1e3:.2g} ms, where it does not overlap with computation"
    )
