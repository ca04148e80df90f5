"""What a training step needs of a card's memory and of the links between cards, read from its compiled program.

Needs no GPU: the step is compiled for emulated CPU devices, where every GPU kernel stands as an opaque call with the same
inputs and outputs (`jitjax.kernels.planned`). So what is kept for the backward pass is what a card keeps. XLA fuses and orders
the rest for a GPU in its own way; docs/speed.md compares the result with measured memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jitjax import from_settings, hlo, kernels, model, runtime, sharding
from jitjax import settings as settings_lib
from jitjax.cards import Card
from jitjax.errors import UserError
from jitjax.geometry import Geometry, geometry_of
from jitjax.kernels import planned
from jitjax.plan import Plan, make_plan
from jitjax.settings import Settings

GIB = 2**30


# The program is only read, never run. So code generation is cut short (the first two options), and what XLA does for a CPU but
# not for a GPU is switched off: float16 matmuls in float32, with float32 copies of operands that are used twice; float16 sums
# over devices in float32; and dropping the barriers of rematerialisation, without which nothing would be computed again.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_strict_dot_conv_math": True,
    "xla_disable_hlo_passes": "cse_barrier_expander,all-reduce-promotion",
}


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of one device in one training step, and what crosses devices."""

    params: int
    optimizer: int
    ema: int
    batch: int
    program: int  # all that the compiled program takes, the above included
    kernels: str  # "fused" or "plain"
    collectives: tuple[hlo.Collective, ...]

    @property
    def gradients(self) -> int:
        """Float32, sharded as the parameters are. Part of `program`."""
        return self.params

    @property
    def working(self) -> int:
        """What is left of `program`: activations most of all, weights in the compute type, whole gradients before they are
        exchanged."""
        return self.program - self.params - self.optimizer - self.ema - self.batch - self.gradients


def needs(settings: Settings, geometry: Geometry, plan: Plan, mesh: Mesh, card: Card) -> Needs:
    """Compile a training step for `card` on a mesh of emulated devices, and read it.

    Raises:
      UserError: `settings.kernels` cannot be had on that card.
    """
    kind, reason = kernels.resolve(settings.kernels, dtype=settings.dtype, geometry=geometry, device=card)
    # A CPU widens bfloat16; float16 has the same size.
    half = dataclasses.replace(
        settings,
        dtype=settings.dtype.replace("bfloat16", "float16"),
        mesh=dataclasses.replace(settings.mesh, comm_dtype=settings.mesh.comm_dtype.replace("bfloat16", "float16")),
    )
    setup = from_settings.Setup(half, geometry, mesh, plan, kind, reason)
    state = from_settings.abstract_state(half, geometry, mesh)
    shape = (plan.global_batch, geometry.image_size, geometry.image_size, model.CHANNELS)
    placed = NamedSharding(mesh, sharding.BATCH)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=placed),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=placed),
    }
    with planned.for_card(card):
        lowered = from_settings.make_step(setup).lower(state, batch)
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    sizes = compiled.memory_analysis()
    return Needs(
        params=bytes_per_device(state.params),
        optimizer=bytes_per_device(state.opt_state),
        ema=bytes_per_device(state.ema),
        batch=bytes_per_device(batch),
        program=sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes,
        kernels=kind,
        collectives=tuple(hlo.collectives(compiled.as_text(), mesh.size)),
    )


def bytes_per_device(tree: Any) -> int:
    """Of a tree of arrays or shape structs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in leaves)


def _elements(leaf: Any) -> int:
    size = 1
    for n in leaf.sharding.shard_shape(leaf.shape):
        size *= n
    return size


# ---------------------------------------------------------------- which batch fits


def out_of_memory(error: Exception, settings: Settings, num_classes: int | None, *, say: Callable[[str], None]) -> UserError:
    """The error for a run that is out of memory: which batch would fit.

    Args:
      error: the runtime's.
      num_classes: None if there was no room for the run's state.
      say: takes the runtime's own words, and a line before the work begins; compiling takes a while.
    """
    say(f"the runtime says: {' '.join(str(error).splitlines()[0].split())[:300]}")
    if runtime.HOST_MEMORY_LIMIT in str(error):  # XLA names it where host memory is lacking
        taken = os.environ.get(runtime.HOST_MEMORY_LIMIT, "64")
        more = taken.isdigit() and int(taken) < runtime.host_memory_limit()
        return UserError(
            "out of host memory: saves and EMA snapshots copy the state there. Free some, "
            + (f"set {runtime.HOST_MEMORY_LIMIT} higher than {taken}, " if more else "")
            + "or keep fewer EMAs (--config.optim.ema_decays, --config.optim.power_emas)"
        )
    if num_classes is None:
        return UserError(
            "out of memory before the first step, for parameters, moments and EMAs: shard them over more devices "
            "(--config.mesh.fsdp) or keep fewer EMAs (--config.optim.ema_decays); `jitjax train --dry_run` shows what they take"
        )
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        return UserError("out of memory: use a smaller --config.batch_size, or --config.remat=full")
    say("out of memory; working out what fits ...")
    capability, cores = getattr(device, "compute_capability", ""), getattr(device, "core_count", 0)
    card = Card(device.device_kind, str(capability), cores, limit, device.platform)
    return UserError(f"out of memory: {advise(settings, num_classes, jax.device_count(), card, limit)}")


def smaller(settings: Settings) -> Iterator[Settings]:
    """The same effective batch in more and smaller micro-batches, largest first."""
    images = settings.batch_size * settings.optim.accumulation_steps
    for size in range(settings.batch_size - 1, 0, -1):
        if images % size == 0:
            optim = dataclasses.replace(settings.optim, accumulation_steps=images // size)
            yield dataclasses.replace(settings, batch_size=size, optim=optim)


def fitting(
    settings: Settings, needed: Needs, look: Callable[[Settings], Needs], usable: float
) -> tuple[Settings, Needs] | None:
    """The first of `smaller` that fits, with what it needs; None: not even one image does.

    Args:
      needed: by `settings`. Working memory grows with the images of a micro-batch, so this says about where to look.
      look: `needs` of such settings, a compilation each. Called for the one that should be the first to fit and for its
        neighbours, in longer and longer steps.
    """
    cuts, found = list(smaller(settings)), None
    image, fixed = needed.working / settings.batch_size, needed.program - needed.working
    low, high, step = 0, len(cuts), 1  # all before `low` do not fit, all from `high` on do
    probe = sum(fixed + cut.batch_size * image > usable for cut in cuts)
    while low < high:
        probe = min(max(probe, low), high - 1)
        if (looked := look(cuts[probe])).program <= usable:
            high, found, probe = probe, (cuts[probe], looked), probe - step
        else:
            low, probe = probe + 1, probe + step
        step *= 2
    return found


def flags(settings: Settings) -> str:
    """The flags that give these settings' micro-batches."""
    return f"--config.batch_size={settings.batch_size} --config.optim.accumulation_steps={settings.optim.accumulation_steps}"


def advise(settings: Settings, num_classes: int, devices: int, card: Card, usable: float) -> str:
    """What to do about a step that is out of memory, in words. Compiles it in another process, since this one's devices are
    taken, and what it proposes once more, to be sure.

    Args:
      devices: of the whole run.
      usable: bytes that JAX has on one of them.
    """
    question = dict(
        settings=settings_lib.to_dict(settings),
        num_classes=num_classes,
        devices=devices,
        card=dataclasses.asdict(card),
        usable=usable,
    )
    launcher = ("JAX_", "XLA_", "SLURM_", "OMPI_")  # that process is no part of the run
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "CUDA_VISIBLE_DEVICES": ""}
    paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", "jitjax.memory"], input=json.dumps(question), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return f"use a smaller --config.batch_size or --config.remat=full (what would fit could not be worked out: {reason[0]})"
    return done.stdout.strip()


def _answer(question: dict[str, Any]) -> str:
    settings = settings_lib.from_mapping(question["settings"])
    usable, card = question["usable"], Card(**question["card"])
    geometry = geometry_of(settings.model, settings.data.image_size, question["num_classes"])
    mesh = sharding.mesh_of(settings.mesh)

    def look(settings: Settings) -> Needs:
        images = settings.batch_size * settings.optim.accumulation_steps * mesh.size
        plan = make_plan(settings, images=images, tokens_per_image=geometry.tokens, devices=mesh.size)
        return needs(settings, geometry, plan, mesh, card)

    now = look(settings)
    room = f"of {usable / GIB:.1f} GiB usable"
    if now.program <= usable:
        return (
            f"the training step should take {now.program / GIB:.1f} {room}, most of it in one piece. If previews, scores or "
            "another program ran beside it: try a smaller --config.preview.num_images or --config.eval.batch_size. If not, "
            "what is free is in pieces: set XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async, or use the same with "
            f"{flags(next(smaller(settings), settings))}"
        )
    fit = fitting(settings, now, look, usable)
    text = f"batch_size={settings.batch_size} needs {now.program / GIB:.1f} {room}"
    if fit is not None:
        return (
            f"{text}; {flags(fit[0])} is the same effective batch and needs {fit[1].program / GIB:.1f}; or recompute with "
            "--config.remat=dots or full"
        )
    return f"{text}, and one image is too much: use --config.remat=full, a larger --config.mesh.fsdp, or a smaller model"


if __name__ == "__main__":
    print(_answer(json.load(sys.stdin)))
