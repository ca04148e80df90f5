"""Muon: the update against float64 arithmetic, the same on any mesh, its state, and what a run of it does."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import DEEPER, small_settings
from test_step import equations, run
from test_train import metrics

from jitjax import checkpoint, convert, flops, muon, sharding
from jitjax import settings as settings_lib
from jitjax.errors import UserError
from jitjax.from_settings import abstract_state
from jitjax.geometry import geometry_of
from jitjax.optimizer import make_optimizer, update_ema
from jitjax.settings import Optimizer, check
from jitjax.train import train

ONE, DATA, ZERO, FSDP, HYBRID = (1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1)
# Rows more and fewer than columns, rows that 8 divides, columns alone that it does, neither.
SHAPES = {
    "blocks.0.attn.qkv.kernel": (64, 192),
    "blocks.1.attn.qkv.kernel": (36, 120),
    "blocks.0.attn.proj.kernel": (64, 64),
    "blocks.0.mlp.w12.kernel": (64, 336),
    "blocks.1.mlp.w12.kernel": (33, 134),
    "blocks.0.mlp.w3.kernel": (168, 64),
    "blocks.1.mlp.w3.kernel": (67, 33),
    "blocks.0.adaln.kernel": (64, 384),
    "blocks.1.adaln.kernel": (64, 384),
    "blocks.0.attn.qkv.bias": (192,),
    "blocks.0.attn.q_norm.weight": (16,),
    "blocks.1.attn.q_norm.weight": (20,),
    "final.linear.kernel": (64, 48),
}


@pytest.fixture(autouse=True)
def split_small(monkeypatch):
    """Let small matrices be split too."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)


def drawn(seed, shapes=SHAPES):
    """Matrices whose singular values span two powers of ten."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape)
        if len(shape) == 2:
            u, s, v = np.linalg.svd(value, full_matrices=False)
            value = (u * np.logspace(0, -2, len(s))) @ v
        found[name] = value.astype(np.float32)
    return found


def updates(optim, axes, gradients, params):
    """The updates of successive gradients, and the last state, on a mesh."""
    mesh = sharding.make_mesh(*axes, jax.devices()[: int(np.prod(axes))])
    specs = sharding.specs(params, mesh)
    optimizer = make_optimizer(optim, specs, mesh)
    state = optimizer.init(jax.tree.map(jnp.asarray, params))
    state_specs = sharding.specs(state, mesh)
    update = jax.jit(
        jax.shard_map(
            optimizer.update,
            mesh=mesh,
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
            check_vma=False,
        )
    )
    found = []
    for grads in gradients:
        moved, state = update(grads, state, params)
        found.append(jax.device_get(moved))
    return found, state


def exact(matrix, steps=5):
    """Newton-Schulz in float64 by singular values, times the scale."""
    u, s, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    s = s / np.linalg.norm(s, 4)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v * 0.2 * np.sqrt(max(matrix.shape))


def pieces(name, value):
    """Four heads of the first block's q, k and v, two of the second's; gate and value; the six of adaLN."""
    qkv = {"0": 12, "1": 6}[name.split(".")[1]]
    return np.split(value, {"qkv": qkv, "w12": 2, "adaln": 6}.get(name.split(".")[-2], 1), axis=1)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


OPTIM = Optimizer(name="muon", weight_decay=0.1, muon_adaln=True, muon_steps=5)


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-4), pytest.param("bfloat16", 0.25, marks=pytest.mark.slow)])
def test_update_is_that_of_float64_arithmetic(monkeypatch, dtype, tolerance, steps):
    """Nesterov momentum, parts apart, scale and decoupled decay; everything else moves as by AdamW alone. The same code in
    float32 shows that what bfloat16 is off by is rounding."""
    monkeypatch.setattr(muon, "bf16", jnp.dtype(dtype))
    params, gradients = drawn(0), [drawn(seed) for seed in (1, 2, 3)]
    found, state = updates(dataclasses.replace(OPTIM, muon_steps=steps), ONE, gradients, params)
    rest = {name: value for name, value in params.items() if name.startswith("final.") or value.ndim < 2}
    adamw = optax.adamw(1.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask={name: rest[name].ndim > 1 for name in rest})
    adam_state, momentum = adamw.init(rest), dict.fromkeys(params, 0.0)
    for grads, moved in zip(gradients, found, strict=True):
        expected, adam_state = adamw.update({name: grads[name] for name in rest}, adam_state, rest)
        for name, grad in grads.items():
            if name in rest:
                np.testing.assert_allclose(moved[name], expected[name], rtol=1e-5, atol=1e-7)
                continue
            momentum[name] = 0.95 * momentum[name] + 0.05 * grad.astype(np.float64)
            direction = 0.95 * momentum[name] + 0.05 * grad
            wanted = np.concatenate([exact(piece, steps) for piece in pieces(name, direction)], axis=1)
            assert distance(moved[name] + 0.1 * params[name], -wanted) < tolerance, name
            assert 0.1 < np.sqrt(np.mean(np.square(wanted))) < 0.3
    assert set(state.momentum.trace) == set(params) - set(rest)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.momentum)} == {np.dtype(np.float32)}


@functools.cache
def alone(dtype):
    """One update on one device, of four steps, which need two Gram matrices."""
    return updates(dataclasses.replace(OPTIM, muon_steps=4), ONE, [drawn(1)], drawn(0))[0][0]


@pytest.mark.parametrize(
    "axes, dtype, tolerance",
    [*((axes, "float32", 1e-5) for axes in (DATA, ZERO, FSDP, HYBRID, (2, 1, 3))), (HYBRID, "bfloat16", 0.1)],
)
def test_update_is_the_same_on_any_mesh(monkeypatch, axes, dtype, tolerance):
    """(In bfloat16 it is up to rounding, which differs with the number of matrices that a device has to multiply.)"""
    monkeypatch.setattr(muon, "bf16", jnp.dtype(dtype))
    expected = alone(dtype)
    (moved,), _ = updates(dataclasses.replace(OPTIM, muon_steps=4), axes, [drawn(1)], drawn(0))
    for name, value in expected.items():
        assert distance(moved[name], value) < tolerance, name


@pytest.mark.parametrize("shape", [(96, 256), (96, 96)])
@pytest.mark.parametrize("spectrum", [lambda k: 1 / k, lambda k: k**-0.5], ids=["1/k", "1/sqrt(k)"])
def test_singular_values_come_near_1(shape, spectrum):
    """The vectors stay what they were."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    matrix = (u * spectrum(np.arange(1.0, 97))) @ v
    (found,) = jax.jit(muon.newton_schulz, static_argnums=1)([jnp.asarray(matrix[None], jnp.bfloat16)], 5)
    found = np.asarray(found[0], np.float64)
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.65 < values.min() and values.max() < 1.25
    along = u.T @ found @ v.T
    assert np.linalg.norm(along - np.diag(np.diag(along))) < 0.08 * np.linalg.norm(along)


def test_more_steps_on_one_gram_matrix_would_diverge(monkeypatch):
    """What the Gram matrix loses in bfloat16, small and squared, grows in it by 12 a step."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(256, 640)), full_matrices=False)
    matrix = jnp.asarray((u / np.arange(1.0, 257)) @ v, jnp.bfloat16)[None]
    largest = {}
    for steps in (muon.GRAM_STEPS, 5):
        monkeypatch.setattr(muon, "GRAM_STEPS", steps)
        largest[steps] = np.linalg.norm(np.asarray(muon.newton_schulz([matrix], 5)[0][0], np.float32), 2)
    assert largest[3] < 1.25 and largest[5] > 2


@pytest.mark.parametrize("steps", [3, 5, 6, 8])
def test_no_singular_value_runs_away(steps):
    """However small the others are. Without room for what rounding takes from the Gram matrix some reach 2 and more."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(40, 33, 66)), full_matrices=False)
    (found,) = muon.newton_schulz([jnp.asarray((u * np.logspace(0, -4, 33)) @ v, jnp.bfloat16)], steps)
    assert np.linalg.norm(np.asarray(found, np.float32), 2, axis=(1, 2)).max() < 1.25


@pytest.mark.parametrize("rows, columns, decay", [(24, 40, 0), (256, 96, 0), (256, 96, 3), (96, 256, 3)])
def test_the_length_of_a_direction_does_not_matter(rows, columns, decay):
    """From a norm of a billionth up to 10^18, where squares of its Gram matrix are outside float32's range. A matrix of zeros
    (the first gradient of blocks behind adaLN's zeros) stays zeros."""
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=(rows, columns)), full_matrices=False)
    matrix = (u * np.arange(1.0, len(v) + 1) ** -decay) @ v  # singular values: 1 to 1, or from 1 down to a millionth
    lengths = np.array([1, *2.0 ** np.array([20, 30, 58, -24, -27, -28, -29]), 0])  # powers of 2, which round nothing
    (found,) = muon.newton_schulz([jnp.asarray(lengths[:, None, None] * matrix, jnp.bfloat16)], 3)
    first, *others, zeros = np.asarray(found, np.float32)
    assert max(distance(other, first) for other in others) < 0.05
    assert 0.6 < np.linalg.norm(first, 2) < 1.25 and not zeros.any()


def test_parts_of_a_matrix_move_apart():
    """Another gradient of v's last head leaves the updates of everything else alone, bit for bit."""
    params, grads = drawn(0), drawn(1)
    name = "blocks.0.attn.qkv.kernel"
    other = grads | {name: grads[name] + np.pad(drawn(2)[name][:, 176:], ((0, 0), (176, 0)))}
    optim = dataclasses.replace(OPTIM, muon_steps=1)
    a, b = (updates(optim, ONE, [g], params)[0][0][name] for g in (grads, other))
    assert np.array_equal(a[:, :176], b[:, :176])
    assert distance(b[:, 176:], a[:, 176:]) > 0.1


@pytest.mark.parametrize("muon_adaln", [False, True])
def test_what_crosses_devices_and_what_is_stored(muon_adaln):
    """JiT-B on 8 devices: of each of four shapes one transfer there and one back, in bfloat16, and no matrix whole on every
    device; adaLN's, which are split by columns, one more either way. The state has one value less for each of Muon's
    parameters, and is counted right."""
    named = settings_lib.from_mapping({"optim": {"name": "muon", "muon_adaln": muon_adaln}})  # the published JiT-B/4
    settings, geometry = named, geometry_of(named.model, 64, 10)
    mesh = sharding.make_mesh(*ZERO)
    state = abstract_state(settings, geometry, mesh)
    specs, state_specs = sharding.specs(state.params, mesh), sharding.specs(state.opt_state, mesh)
    update = jax.shard_map(
        make_optimizer(settings.optim, specs, mesh).update,
        mesh=mesh,
        in_specs=(specs, state_specs, specs),
        out_specs=(specs, state_specs),
        check_vma=False,
    )
    crossing = [
        (eqn.primitive.name, str(eqn.invars[0].aval.dtype))
        for eqn, _ in equations(jax.make_jaxpr(update)(state.params, state.opt_state, state.params).jaxpr)
        if eqn.primitive.name in ("all_to_all", "all_gather", "psum", "ppermute")
    ]
    assert len(crossing) == 8 + 2 * muon_adaln and set(crossing) == {("all_to_all", "bfloat16")}
    matrices = [name for name in state.params if name.endswith(".kernel") and name.startswith("blocks.")]
    assert set(state.opt_state.momentum.trace) == {n for n in matrices if muon_adaln or ".adaln." not in n}
    held = sum(leaf.size * 4 for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)) if leaf.ndim)
    assert flops.state_bytes(geometry, settings.optim) == held


SMALL = dict(optim__name="muon", optim__muon_adaln=True, optim__weight_decay=0.1, optim__clip_norm=1.0)


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "bf16", jnp.float32)
        return run(small_settings(**SMALL, batch_size=16), ONE)


@pytest.mark.parametrize(
    "axes, micro_batches", [((4, 2, 1), 2), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((FSDP, 1), (DATA, 2)))]
)
def test_step_is_the_same_on_any_mesh(monkeypatch, one_device, axes, micro_batches):
    monkeypatch.setattr(muon, "bf16", jnp.float32)
    config = small_settings(**SMALL, batch_size=2 // micro_batches, optim__accumulation_steps=micro_batches)
    losses, state = run(config, axes)
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    for name, value in one_device[1].params.items():
        np.testing.assert_allclose(state.params[name], value, atol=5e-5, err_msg=name)


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, capsys):
    """Bit for bit. No other optimizer takes its state over, whatever is accepted; and an official checkpoint goes without."""
    settings = small_settings(**SMALL, optim__ema_warmup=True, mesh__zero=2, mesh__data=4)
    assert train(settings, tmp_path / "a") == 0
    assert train(dataclasses.replace(settings, stop_after="2 steps"), tmp_path / "b") == 0
    assert train(settings, tmp_path / "b") == 0
    mesh = sharding.make_mesh(4, 2, 1)
    like = abstract_state(settings, checkpoint.load_weights(tmp_path / "a").geometry, mesh)
    a, b = (jax.device_get(checkpoint.restore(tmp_path / name / checkpoint.DIRECTORY / "4", like)) for name in "ab")
    chex.assert_trees_all_equal(a, b)
    assert np.any(a.opt_state.momentum.trace["blocks.0.attn.qkv.kernel"])

    for changed, text in (
        (dict(optim__name="adamw", optim__muon_adaln=False), r"another optimizer \(optim.name: muon -> adamw\)"),
        (dict(optim__muon_adaln=False), r"another optimizer \(optim.muon_adaln: True -> False\)"),
    ):
        other = small_settings(**SMALL | changed, optim__ema_warmup=True, mesh__zero=2, mesh__data=4)
        with pytest.raises(UserError, match=text):
            train(other, tmp_path / "a", accept_config_changes=True)

    capsys.readouterr()
    convert.main(["--from", str(tmp_path / "a"), "--to", str(tmp_path / "a.pth")])
    said = capsys.readouterr().out
    assert "the state of muon has no place in other formats and is left out" in said and "AdamW" not in said


@pytest.mark.parametrize("axes", [(2, 1, 4), pytest.param((2, 4, 1), marks=pytest.mark.slow)])
def test_options_of_shorter_training_resume_together(monkeypatch, tmp_path, axes):
    """Bit for bit: Muon, the class loss, power-function and warmed-up EMAs and other times, accumulated in bfloat16."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)  # so that this small model's matrices are split
    settings = small_settings(
        **DEEPER,
        **{f"mesh__{axis}": size for axis, size in zip(sharding.AXES, axes, strict=True)},
        dtype="bfloat16",
        optim__name="muon",
        optim__accumulation_steps=2,
        optim__power_emas=(0.1, 0.05),
        optim__ema_warmup=True,
        model__class_loss=100.0,
        diffusion__p_mean=0.6,
    )
    assert train(settings, tmp_path / "a") == 0
    assert train(dataclasses.replace(settings, stop_after="2 steps"), tmp_path / "b") == 0
    assert train(settings, tmp_path / "b") == 0
    geometry = geometry_of(settings.model, settings.data.image_size, 8)
    like = abstract_state(settings, geometry, sharding.make_mesh(*axes))
    a, b = (jax.device_get(checkpoint.restore(tmp_path / name / checkpoint.DIRECTORY / "4", like)) for name in "ab")
    chex.assert_trees_all_equal(a, b)
    assert set(a.ema) == {"power:0.1", "power:0.05", *map(str, settings.optim.ema_decays)} and "class_head.kernel" in a.params


def test_an_adamw_run_is_not_continued_as_muon(tmp_path):
    settings = small_settings(total_steps=1)
    train(settings, tmp_path)
    with pytest.raises(UserError, match=r"use --config.optim.name=adamw, which a run keeps, or another workdir$"):
        train(small_settings(optim__name="muon"), tmp_path)
    with pytest.raises(UserError, match=r"another optimizer \(optim.name: adamw -> muon\)"):
        train(small_settings(optim__name="muon"), tmp_path, accept_config_changes=True)


def test_settings_of_muon_do_not_stop_a_run_of_adamw():
    """A run that was saved when the default was another one."""
    old = settings_lib.to_dict(small_settings())
    old["optim"]["muon_steps"] = 5
    assert settings_lib.differing_fields(old, small_settings()) == []
    old["optim"]["name"] = "muon"
    assert settings_lib.differing_fields(old, small_settings(optim__name="muon")) == ["optim.muon_steps: 5 -> 3"]


def test_settings_of_muon_need_muon():
    with pytest.raises(UserError, match=r"optim.muon_steps=5 needs --config.optim.name=muon"):
        check(small_settings(optim__muon_steps=5))


def test_ema_with_warmup_forgets_the_first_weights():
    """min(decay, (1 + s) / (10 + s)), and without it 1 - decay as before."""
    old, new = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    for step, decay in ((1, 2 / 11), (20, 21 / 30), (10**6, 0.999)):
        moved = update_ema({"0.999": old, "power:0.1": old}, new, jnp.int32(step), warmup=True)
        assert float(moved["0.999"]["w"]) == pytest.approx(1 - decay, rel=1e-5)
        plain = update_ema({"0.999": old, "power:0.1": old}, new, jnp.int32(step))
        assert float(plain["0.999"]["w"]) == np.float32(1 - 0.999) and plain["power:0.1"] == moved["power:0.1"]


@pytest.mark.slow
def test_loss_falls_at_least_as_fast_as_with_adamw(tmp_path):
    """On drawn shapes, at a rate that suits both, within what a seed makes of it."""
    found = {}
    for name in ("adamw", "muon"):
        train(small_settings(batch_size=4, total_steps=60, optim__name=name, optim__lr=1e-2), tmp_path / name)
        found[name] = np.mean([line["train/loss"] for line in metrics(tmp_path / name)][-20:])
    assert found["muon"] <= 1.03 * found["adamw"]
