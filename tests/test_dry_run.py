"""What can be known before a run: memory and communication of the compiled step, warnings, what fits when memory is out."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, small_settings
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jitjax import cards, cli, describe, dry_run, from_settings, hlo, kernels, memory, model, muon, sampling, sharding, step
from jitjax.cards import CARDS
from jitjax.errors import UserError
from jitjax.geometry import geometry_of
from jitjax.kernels import planned
from jitjax.plan import make_plan
from jitjax.settings import to_dict
from jitjax.train import train

H200 = CARDS["h200"]
# Heads of 64 features and 16 + 32 tokens, which the kernels for Hopper take.
FUSED = dict(model__width=128, model__heads=2, model__context_length=16, data__image_size=16, dtype="bfloat16", kernels="auto")


def needs(card=H200, mesh=(None, None, 1), devices=8, **overrides):
    data, zero, fsdp = mesh
    settings = small_settings(**overrides, mesh__data=data, mesh__zero=zero, mesh__fsdp=fsdp)
    mesh = sharding.mesh_of(settings.mesh, jax.devices()[:devices])
    geometry = geometry_of(settings.model, settings.data.image_size, 8)
    plan = make_plan(settings, images=10**6, tokens_per_image=geometry.tokens, devices=devices)
    return memory.needs(settings, geometry, plan, mesh, card)


# ---------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("{}", 8),
    ],
)
def test_groups_as_releases_of_jax_write_them(groups, size):
    line = f"  %x = f32[4,6]{{1,0}} all-reduce(%y), channel_id=1, replica_groups={groups}, to_apply=%add"
    (found,) = hlo.collectives("ENTRY %main (p: f32[]) -> f32[] {\n" + line + "\n}", 8)
    assert (found.kind, found.bytes, found.group) == ("all-reduce", 96, size)


def test_collectives_of_a_program_whose_communication_is_known():
    """One of each kind, on both axes of a 4 x 2 mesh, one of them in a loop of five."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))

    def body(x):  # (4, 6) float32 on each device
        looped, _ = jax.lax.scan(lambda c, _: (jax.lax.psum(c, "b") * 0.5, None), x, length=5)
        whole = jax.lax.all_gather(x.astype(jnp.float16), "a", tiled=True)
        part = jax.lax.psum_scatter(x, "a", tiled=True)
        moved = jax.lax.ppermute(x[0], "b", [(0, 1), (1, 0)])
        sums = jnp.stack([looped.sum(), part.sum(), moved.sum()])
        chosen = jax.lax.cond(whole[0, 0] > 0, lambda s: jax.lax.psum(s, "a"), lambda s: jax.lax.psum(s[:2], "a")[0] * s, sums)
        return jax.lax.psum(chosen.sum(), ("a", "b"))

    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(), check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct((32, 6), jnp.float32)).compile().as_text()
    found = {(op.kind, op.group, op.bytes, op.times) for op in hlo.collectives(text, 8)}
    assert {kind for kind, *_ in found} == {"all-reduce", "all-gather", "reduce-scatter", "collective-permute"}
    assert {("all-reduce", 2, 96, 5), ("reduce-scatter", 4, 96, 1), ("all-reduce", 8, 4, 1)} <= found
    assert {op for op in found if op[:2] == ("all-reduce", 4)} == {("all-reduce", 4, 8, 1)}  # one of two branches
    assert ("all-gather", 4, 4 * 48, 1) in found or ("all-gather", 4, 4 * 96, 1) in found  # a CPU may widen float16
    assert ("collective-permute", 8, 24, 1) in found  # in pairs, all eight at once
    sent = {op.kind: op.sent for op in hlo.collectives(text, 8) if op.times == 1 and op.bytes > 4}
    assert (sent["reduce-scatter"], sent["collective-permute"]) == (72, 24)


@pytest.mark.parametrize("data, zero, fsdp", [(1, 8, 1), (4, 1, 2)])
def test_bytes_and_shards_are_those_of_the_state(data, zero, fsdp, monkeypatch):
    """What is counted is what a device really holds, and gradients cross devices once."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    settings = small_settings(mesh__data=data, mesh__zero=zero, mesh__fsdp=fsdp)
    found = needs(mesh=(data, zero, fsdp))
    geometry = geometry_of(settings.model, 8, 8)
    init = functools.partial(step.init_state, geometry, settings.optim, settings.dtype)
    mesh = sharding.mesh_of(settings.mesh)
    placed = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = jax.jit(init, out_shardings=placed)(jax.random.key(0))

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert (found.params, found.optimizer, found.ema) == (held(state.params), held(state.opt_state), held(state.ema))
    assert found.working > 0
    layers = [name for name in state.params if name.endswith(sharding.COLUMNS)][1 if zero > 1 else 0 :]  # these do not cross
    whole = 4 * sum(value.size for name, value in state.params.items() if name not in layers)
    crossed = sum(op.bytes * op.times for op in found.collectives if op.group > 1)
    # Gradients: all-reduce of the whole, or scatter and then reduce of a part. Weights: once, if they are split (with FSDP
    # and a second block, also for the backward pass).
    assert (1 + (zero * fsdp > 1)) * whole <= crossed <= (1.75 + (zero * fsdp > 1)) * whole  # and what crosses instead


# ---------------------------------------------------------------- memory


@pytest.mark.slow
def test_fused_kernels_are_opaque_and_leave_no_trace():
    """The program for a card has a call for every kernel and keeps less than plain operations; what is traced afterwards for
    this machine is the real thing again."""
    settings = small_settings(**FUSED)
    fused, plain = (needs(**FUSED | {"kernels": kind}, batch_size=128) for kind in ("auto", "plain"))
    assert (fused.kernels, plain.kernels) == ("fused", "plain")
    assert fused.params == plain.params and fused.working < plain.working
    geometry = geometry_of(settings.model, 16, 8)
    loss = from_settings.make_loss(dataclasses.replace(settings, dtype="float16"), geometry, kernels.get_ops("fused"))
    params = model.init_fn(geometry)(jax.random.key(0))
    arguments = np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, np.int32), jax.random.split(jax.random.key(0), 2)
    with planned.for_card(H200):
        opaque = jax.jit(loss).lower(params, *arguments)
        with pytest.raises(jax.errors.JaxRuntimeError, match="cannot run"):
            jax.block_until_ready(jax.jit(loss)(params, *arguments))
    real = jax.jit(loss).lower(params, *arguments)
    assert "callback" in opaque.as_text() and "callback" not in real.as_text()


def test_more_micro_batches_take_no_more_memory_on_several_devices():
    """The last of them, apart from the others' loop, begins when that has ended."""
    sizes = FUSED | dict(model__depth=3, batch_size=32)
    one, two = (needs(devices=2, mesh=(1, 2, 1), optim__accumulation_steps=k, **sizes) for k in (1, 2))
    sum_of_whole_gradients = 2 * one.params
    assert two.working < one.working + sum_of_whole_gradients


def test_muons_matrices_cross_in_two_bytes(monkeypatch):
    """On the card: the CPU that compiles the prediction would widen bfloat16."""

    def crossing(**overrides):
        found = needs(devices=2, mesh=(1, 2, 1), dtype="bfloat16", kernels="plain", model__width=128, **overrides)
        return sum(op.bytes for op in found.collectives if op.kind == "all-to-all")

    adamw, half = crossing(), crossing(optim__name="muon")
    monkeypatch.setattr(muon, "_half", lambda: jnp.float32)
    assert crossing(optim__name="muon") - adamw == 2 * (half - adamw) > 0


@pytest.mark.slow
def test_working_memory_grows_with_the_batch_and_shrinks_with_remat():
    small, large = (needs(**FUSED, devices=1, batch_size=size, model__depth=4).working for size in (64, 128))
    full = needs(**FUSED, devices=1, batch_size=128, model__depth=4, remat="full").working
    assert large == pytest.approx(2 * small, rel=0.15) and full < 0.6 * large


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch, remat, measured", [(256, "none", 27.5), (64, "none", 8.9), (256, "dots", 17.3), (256, "full", 7.3)]
)
def test_memory_of_jit_b_is_what_was_measured_on_an_h200(batch, remat, measured):
    """GiB; docs/speed.md. What the prediction adds hardly depends on the batch."""
    found = needs(
        **{f"model__{name}": None for name in ("depth", "width", "heads", "bottleneck", "context_length", "context_start")},
        **dict(model__name="JiT-B/4", data__image_size=64, dtype="bfloat16", optim__ema_decays=(0.9999, 0.9996)),
        **dict(batch_size=batch, remat=remat, devices=1, model__num_classes=None),
    )
    assert 0 <= found.program / memory.GIB - measured < 1.8


def test_the_same_effective_batch_in_smaller_parts():
    settings = small_settings(batch_size=48, optim__accumulation_steps=2)
    cuts = [(s.batch_size, s.optim.accumulation_steps) for s in memory.smaller(settings)]
    assert cuts[:3] == [(32, 3), (24, 4), (16, 6)] and all(a * b == 96 for a, b in cuts) and cuts[-1] == (1, 96)

    def look(s):  # 100 an image, 500 whatever the batch, and 300 where gradients are added up
        looked.append(s.batch_size)
        program = 500 + 100 * s.batch_size + 300 * (s.optim.accumulation_steps > 1)
        return memory.Needs(params=100, optimizer=200, ema=100, batch=0, program=program, kernels="fused", collectives=())

    looked = []
    now = look(settings)
    assert now.working == 5100
    for usable, size, compilations in ((800 + 2500, 24, 2), (800 + 3200, 32, 1), (901, 1, 3), (10_000, 32, 1)):
        looked.clear()
        cut, found = memory.fitting(settings, now, look, usable)
        assert (cut.batch_size, found.program) == (size, 800 + 100 * size)
        assert len(looked) == len(set(looked)) == compilations
    assert memory.fitting(settings, now, look, usable=899) is None


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    "overrides, says",
    [
        (dict(optim__warmup_steps=4), "the warm-up takes 4 steps and the run 4"),
        (dict(checkpoint__every_steps=9), "a checkpoint every 9 steps is never reached in 4"),
        (dict(eval__every_steps=5), "--config.eval.every_steps"),
        (dict(checkpoint__every_minutes=None), "nothing is saved before the end"),
        (dict(checkpoint__every_steps=2, checkpoint__keep_every=3), "keep_every=3 retains nothing"),
        (dict(checkpoint__every_steps=2, checkpoint__keep_every=8), "keep_every=8 retains nothing"),
        (dict(eval__metric="mind", eval__num_images=9), "--config.eval.num_images and --config.eval.metric without"),
        (dict(wandb__project="mine"), "--config.wandb.project without --config.wandb.enabled=True has no effect"),
        (dict(checkpoint__ema_every_steps=2), "ema_every_steps without --config.optim.power_emas has no effect"),
        (dict(model__attn_dropout=0.1), "attn_dropout has no effect at --config.model.depth=1: it acts in"),
        (dict(optim__min_lr=1e-5), "min_lr=1e-05 has no effect: set --config.optim.schedule=cosine"),
        (dict(diffusion__label_drop_prob=0.0, preview__every_steps=4), "--config.preview.cfg_scale=2.9 guides away from"),
        (dict(preview__every_steps=1), "previews take about"),
        (dict(preview__every_steps=4, preview__num_images=4), "--config.preview.num_images=4 is fewer than the 8 devices"),
        (dict(optim__lr=None), "far below the recipe's 0.0002, because the effective batch is 16"),
        (dict(optim__lr=None, optim__blr=1e-6), "rate 6.2e-08 (blr x effective batch / 256) is far below the recipe's 0.0002"),
        (dict(optim__ema_decays=(0.9999,)), "with decay 0.9999 too many for 4"),
        (dict(optim__accumulation_steps=4), "4 micro-batches of 2 images"),
        (dict(batch_size=32), "an epoch is 2 steps"),
        (dict(data__image_size=512, model__name="JiT-nano/32"), "noise_scale=1 at 512 px"),
    ],
)
def test_warnings(overrides, says):
    quiet = dict(optim__ema_decays=(0.5,))
    assert describe.warnings(describe.look(small_settings(**quiet))) == []
    outlook = describe.look(small_settings(**quiet | overrides))
    found = describe.warnings(outlook)
    assert any(says in line for line in found), found
    if "no effect" in says or "retains nothing" in says or "guides away" in says:
        assert any(says in line for line in describe.of_schedule(outlook.settings, outlook.plan))  # at the start of a run, too


def test_no_warning_of_a_decay_advises_one_that_is_warned_of():
    for steps in range(1, 40):
        found = describe.warnings(describe.look(small_settings(optim__ema_decays=(0.9999,), total_steps=steps)))
        for decay in (float(d) for line in found for d in re.findall(r"ema_decays=\(([\d.]+),\)", line)):
            assert describe.slow_emas(small_settings(optim__ema_decays=(decay,)), steps) == []


def test_a_rate_for_a_small_batch_is_no_mistake():
    """What `blr` and the batch make together is what counts, against the published rate."""
    outlook = describe.look(small_settings(optim__ema_decays=(0.5,), optim__lr=None, optim__blr=3.2e-3))  # 16 images: 2e-4
    assert describe.warnings(outlook) == []


@pytest.mark.parametrize("method, interval", [("heun", (0.1, 1.0)), ("abm2", (0.0, 1.0)), ("euler", (0.5, 0.8))])
def test_passes_of_a_drawn_image_are_those_the_sampler_makes(method, interval):
    options = dataclasses.replace(small_settings().preview.sampler(), steps=10, method=method, interval=interval, cfg_scale=2.0)
    passes = 0

    def network(z, t, y):
        nonlocal passes
        passes += z.shape[0]
        return z

    with jax.disable_jit():
        sampling.sample_fn(
            network, jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, int), null_label=1, prediction="x", **dataclasses.asdict(options)
        )
    assert describe.drawing_passes(options, guided=True) == pytest.approx(passes, rel=0.05)


# ---------------------------------------------------------------- the command


def test_dry_run_of_a_recipe_without_data_or_cards(tmp_path):
    """On devices that are not there; the run's own numbers, tables and a verdict."""
    small = "model.depth=2 model.width=128 model.heads=2 model.bottleneck=8 model.context_start=1 mesh.fsdp=4"
    command = ["jitjax", "train", "--config=configs/h200.py:finetune", "--dry_run", "--devices=4", "--card=h100"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *(f"--config.{field}" for field in small.split())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.startswith("it fits: ") and " usable on an H100; about " in text.splitlines()[0]
    assert "1,281,167 images of 1,000 classes (ImageNet's, as" in text and "512 images = 64 x 4 devices x 2" in text
    assert re.search(r"blocks\.\*\.attn\.qkv\.kernel +2 x +128x384 +98,304 +32x384 +axis 0 over fsdp", text), text
    assert re.search(r"usable +73\.3 GiB +92% of an H100's 79\.6 GiB", text) and re.search(r"parameters +\d+ KiB", text)
    assert re.search(r"^all-to-all +4 ", text, re.M) and re.search(r"^all-reduce +4 ", text, re.M)
    assert "; over NVLink, 360 GB/s" in text and "0.00 GiB" not in text
    assert '"batch_size"' not in text


def test_dry_run_speaks_of_the_run_and_the_card_that_it_is_about(monkeypatch, capsys):
    """An unconditional model uses no classes; a card whose links were not measured has no time; settings on request."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # both are set by the command, and are to be as before afterwards
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", os.environ["JAX_NUM_CPU_DEVICES"])
    small = "model.depth=1 model.width=64 model.heads=2 model.bottleneck=8 model.context_start=0 batch_size=8"
    fields = [f"--config.{field}" for field in small.split()]
    done = ["train", "--config=configs/h200.py", "--dry_run", "--print_config", "--devices=2", "--card=a100", *fields]
    assert cli.main(done) == 0
    text = capsys.readouterr().out
    assert "1,281,167 images (ImageNet's, as" in text and "classes" not in text.partition('"seed"')[0].partition("{")[0]
    assert "the links of an NVIDIA A100-SXM4-80GB were not measured" in text and "NVLink" not in text
    assert text.index("it fits") < text.index('"batch_size": 8')


def test_a_card_that_is_not_known_is_named_first_with_the_one_planned_for(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):  # set by the command
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(dry_run, "dry_run", lambda settings, *, devices, card: f"{devices} x {card}")
    for here, says in (
        (["NVIDIA GH200 480GB"] * 2, "NVIDIA GH200 480GB is not known: planned as on an H200; --card takes h200, "),
        (["NVIDIA H100 80GB HBM3"] * 2, "2 x h100\n"),
    ):
        monkeypatch.setattr(cards, "here", lambda here=here: here)
        assert cli.main(["train", "--config=configs/h200.py", "--dry_run"]) == 0
        assert capsys.readouterr().out.startswith(says)


def test_flags_of_the_dry_run_are_its_own(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["train", "--config=configs/quickstart.py", "--workdir=x", "--devices=8"]) == 2
    assert "--devices and --card are for --dry_run" in capsys.readouterr().err


def test_what_does_not_fit_names_a_batch_that_does(monkeypatch):
    def fake(settings, *_):
        program = 1000 * settings.batch_size
        return memory.Needs(params=100, optimizer=200, ema=100, batch=0, program=program, kernels="fused", collectives=())

    monkeypatch.setattr(memory, "needs", fake)
    outlook = describe.look(small_settings(batch_size=16), devices=jax.devices()[:1])
    needs, small = fake(outlook.settings), dataclasses.replace(H200, memory=10_000)
    assert "--config.batch_size=8 --config.optim.accumulation_steps=2" in dry_run.what_fits(outlook, needs, small)
    assert "not even one image" in dry_run.what_fits(outlook, needs, dataclasses.replace(H200, memory=900))


def test_advice_names_what_fits_and_what_it_needs(monkeypatch):
    """The words of `memory.advise`, for a step that needs 1 GiB an image."""

    def fake(settings, *_):
        return memory.Needs(params=1, optimizer=2, ema=1, batch=0, program=settings.batch_size * memory.GIB, kernels="fused",
                            collectives=())  # fmt: skip

    monkeypatch.setattr(memory, "needs", fake)
    question = dict(settings=to_dict(small_settings(batch_size=24)), num_classes=8, card=dataclasses.asdict(H200))
    for usable, says in (
        (20, r"batch_size=24 needs 24.0 of 20.0 GiB usable; --config.batch_size=12 --config.optim.accumulation_steps=2 is"),
        (0.5, "one image is too much: use --config.remat=full"),
        (30, "what is free is in pieces: set XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async"),
    ):
        assert re.search(says, memory._answer(question | {"usable": int(usable * memory.GIB)}))


@pytest.mark.slow
def test_out_of_memory_says_which_batch_fits(tmp_path, monkeypatch):
    """The allocator's error becomes one line; what it proposes was compiled in another process, and fits."""
    settings = small_settings(batch_size=49, mesh__data=8)
    here = dict(card=dataclasses.replace(H200, compute_capability="", platform="cpu"), mesh=(8, None, 1))
    limit = needs(**here, batch_size=7, optim__accumulation_steps=7).program

    class Device:
        device_kind, platform = "cpu", "cpu"
        memory_stats = staticmethod(lambda: {"bytes_limit": limit})

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    monkeypatch.setattr(from_settings, "make_step", lambda *_: exhausted)
    devices = jax.local_devices()
    monkeypatch.setattr(jax, "local_devices", lambda *a, **k: devices if a or k else [Device()])
    with pytest.raises(
        UserError, match=r"out of memory: batch_size=49 needs .*; --config.batch_size=7 --config.optim.accum\w+=7 is"
    ):
        train(settings, tmp_path)


def test_other_errors_of_the_runtime_are_not_taken_for_it(tmp_path, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(from_settings, "make_step", lambda *_: broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(small_settings(), tmp_path)
