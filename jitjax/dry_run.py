"""`jitjax train --dry_run`: what a run will be, what it needs and what looks wrong, on any machine and without its cards."""

from __future__ import annotations

import collections
import re
import sys
import time

import jax

from jitjax import cards, describe, estimate, memory, model, sharding, speeds, tables
from jitjax.cards import CARDS, Card
from jitjax.describe import Outlook
from jitjax.errors import UserError
from jitjax.memory import Needs
from jitjax.settings import Settings


def dry_run(settings: Settings, *, devices: int, card: str) -> str:
    """Everything, as text: first whether it fits and what looks wrong, then the numbers and the tables.

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
    warnings = [f"warning: {line}" for line in describe.warnings(outlook)]
    parts = [
        "\n".join([verdict(outlook, needs, card), *(warnings or ["nothing looks wrong"])]),
        describe.rows(outlook, f"{chosen.device_kind} (pretended)") + f"\n{duration(outlook, card)}",
        memory_table(outlook, needs, card),
        communication_table(outlook, needs, chosen),
        parameter_table(outlook),
        f"(compiled in {seconds:.0f} s; nothing was run; --print_config adds the settings)",
    ]
    return "\n\n".join(parts)


def verdict(outlook: Outlook, needs: Needs, card: str) -> str:
    """Whether a training step fits the card, and what would."""
    usable, size = CARDS[card].usable, outlook.settings.batch_size
    takes = f"{tables.format_bytes(needs.program)} of {tables.format_bytes(usable)} usable on an {card.upper()}"
    if needs.program > usable:
        return f"it does not fit: {takes}; {what_fits(outlook, needs, CARDS[card])}"
    fixed = needs.program - needs.working
    largest = int((usable - fixed) * size // max(needs.working, 1))
    return f"it fits: {takes}; about {largest:,} images in a micro-batch would, too"


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
    """Bytes of one device by what they are for."""
    settings, chosen = outlook.settings, CARDS[card]
    kernels = "fused kernels as opaque calls" if needs.kernels == "fused" else "plain operations"
    emas = len(settings.optim.ema_decays) + len(settings.optim.power_emas)
    moments = "AdamW's moments" if settings.optim.name == "adamw" else "Muon's momentum, AdamW's moments,"
    of_all = f"{chosen.usable / chosen.memory:.0%} of an {card.upper()}'s {tables.format_bytes(chosen.memory)}"
    cells = [
        ("memory of one device", "bytes", ""),
        ("parameters", needs.params, "float32, counted"),
        ("gradients", needs.gradients, "float32, counted"),
        ("optimizer", needs.optimizer, f"{moments} in float32, counted"),
        ("EMAs", needs.ema, f"{emas} in float32, counted"),
        ("batch", needs.batch, f"{settings.optim.accumulation_steps} x {settings.batch_size} images, counted"),
        ("activations", needs.working, f"and working memory: the rest of the compiled step ({kernels})"),
        ("sum", needs.program, "compiled for CPU devices; docs/speed.md compares with cards"),
        ("usable", chosen.usable, of_all),
    ]
    rows = [(name, tables.format_bytes(size), note) for name, size, note in cells[1:]]
    return tables.columns([cells[0], *rows], left=("memory of one device", ""))


def what_fits(outlook: Outlook, needs: Needs, card: Card) -> str:
    """The largest micro-batch of the same effective batch that fits, in words. Compiles each that it tries."""

    def look(settings: Settings) -> Needs:
        tables.say(f"does it fit with {memory.flags(settings)}? compiling ...", sys.stderr)
        return memory.needs(settings, outlook.geometry, outlook.plan, outlook.mesh, card)

    fit = memory.fitting(outlook.settings, needs, look, card.usable)
    if fit is None:
        return "not even one image at a time does; use --config.remat=full, a larger --config.mesh.fsdp, or a smaller model"
    return (
        f"{memory.flags(fit[0])} is the same effective batch and needs {tables.format_bytes(fit[1].program)}; "
        "--config.remat=dots or full may do, too"
    )


def communication_table(outlook: Outlook, needs: Needs, card: Card) -> str:
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
    time = (
        f"over NVLink, {card.link / 1e9:.0f} GB/s in ring all-reduces, that takes {sent / card.link * 1e3:.2g} ms where it "
        "does not overlap with computation"
        if card.link
        else f"how long that takes is not known, as the links of an {card.device_kind} were not measured"
    )
    return (
        tables.columns(cells, left=("between devices",))
        + f"\nper optimizer step, read from the compiled program{unknown}; {time}"
    )
