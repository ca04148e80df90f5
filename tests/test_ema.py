"""Power-function EMAs, and EMAs reconstructed after training against EMAs that were tracked during it.

python tests/test_ema.py      # the table of docs/sampling.md
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jitjax import ema
from jitjax.errors import UserError

STEPS, EVERY, SAVED = 2000, 100, (0.05, 0.10)
TRACKED = {"power:0.03": 0.03, "power:0.075": 0.075, "power:0.15": 0.15, "0.99": 0.99, "0.998": 0.998}


@functools.cache
def trajectory():
    """Adam with noisy gradients on a two-layer regression network: (initial, tracked EMAs, snapshots, final weights)."""
    import optax

    x = jax.random.normal(jax.random.key(0), (512, 8))
    y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (8, 4)))
    keys = jax.random.split(jax.random.key(2), 2)
    params = {"a": jax.random.normal(keys[0], (8, 32)) / 8**0.5, "b": jax.random.normal(keys[1], (32, 4)) / 32**0.5}
    optimizer = optax.adam(3e-3)

    def loss(params, index):
        return jnp.mean((jnp.tanh(x[index] @ params["a"]) @ params["b"] - y[index]) ** 2)

    def rate(name, step):
        return ema.power_ema_rate(step, float(name[6:])) if name.startswith("power:") else 1 - float(name)

    names = [*TRACKED, *(f"power:{sigma}" for sigma in SAVED)]

    def update(carry, step):
        params, state, emas = carry
        index = jax.random.randint(jax.random.fold_in(jax.random.key(3), step), (16,), 0, 512)
        change, state = optimizer.update(jax.grad(loss)(params, index), state)
        params = optax.apply_updates(params, change)
        emas = {n: jax.tree.map(lambda e, p, n=n: e + rate(n, step) * (p - e), emas[n], params) for n in names}
        return (params, state, emas), None

    advance = jax.jit(lambda carry, steps: jax.lax.scan(update, carry, steps)[0])
    carry = (params, optimizer.init(params), {n: params for n in names})
    snapshots = []
    for start in range(0, STEPS, EVERY):
        carry = advance(carry, jnp.arange(start + 1, start + EVERY + 1))
        snapshots += [(start + EVERY, s, jax.tree.map(np.asarray, carry[2][f"power:{s}"])) for s in SAVED]
    tracked, final = jax.tree.map(np.asarray, (carry[2], carry[0]))
    return jax.tree.map(np.asarray, params), tracked, snapshots, final


def distance(a, b):
    return float(np.sqrt(sum(np.sum((a[n] - b[n]) ** 2) for n in a)))


def target_of(name):
    return ema.Target(STEPS, **({"sigma_rel": TRACKED[name]} if name.startswith("power:") else {"decay": TRACKED[name]}))


def errors(name, dtype=np.float32):
    """(distance of the reconstructed from the tracked EMA / distance of the tracked EMA from the weights, profile residual)"""
    initial, tracked, snapshots, final = trajectory()
    stored = [(step, sigma, {n: v.astype(dtype) for n, v in p.items()}) for step, sigma, p in snapshots]
    params, found = ema.reconstruct(stored, target_of(name), initial=initial)
    return distance(params, tracked[name]) / distance(final, tracked[name]), found.residual


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_sigma_rel_is_the_profiles_standard_deviation(sigma_rel):
    gamma = ema.gamma_of(sigma_rel)
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = tau**gamma / np.sum(tau**gamma)
    assert np.sqrt(np.sum(p * tau**2) - np.sum(p * tau) ** 2) == pytest.approx(sigma_rel, rel=1e-4)


def test_rate_is_accurate_at_late_steps():
    """Within float32's precision of the rate itself, under jit, also where the decay is 1 - 1e-5."""
    rate = jax.jit(ema.power_ema_rate, static_argnums=1)
    for step in (1, 2, 1000, 1_000_000):
        want = 1 - (1 - np.float64(1) / step) ** (ema.gamma_of(0.05) + 1)
        assert float(rate(step, 0.05)) == pytest.approx(want, rel=1e-5)


def test_gamma_one_weighs_steps_linearly():
    """gamma = 1 gives step k the weight k(k + 1) / 2 - k(k - 1) / 2 = about k: here within 1 / step of the profile."""
    sigma, value, inputs = 2**0.5 / 6, 0.0, np.random.default_rng(0).standard_normal(400)
    for step, x in enumerate(inputs, 1):
        value += float(ema.power_ema_rate(step, sigma)) * (x - value)
    k = np.arange(1, 401)
    assert value == pytest.approx(np.sum((k - 0.5) * inputs) / np.sum(k - 0.5), abs=1e-4)


@pytest.mark.parametrize("name", list(TRACKED))
def test_reconstructed_equals_tracked(name):
    relative, residual = errors(name)
    assert relative < (0.01 if name.startswith("power:") else 0.03)
    assert residual < 0.04


def test_a_saved_ema_is_its_own_reconstruction():
    _, tracked, snapshots, _ = trajectory()
    params, found = ema.reconstruct(snapshots, ema.Target(STEPS, sigma_rel=0.05))
    assert found.residual < 1e-5
    assert distance(params, tracked["power:0.05"]) < 1e-4
    assert found.weights.sum() == pytest.approx(1)


def test_float16_snapshots_are_enough_and_bfloat16_are_not():
    """An EMA shorter than both saved ones (0.03) takes large weights of both signs, which amplify rounding."""
    for name in TRACKED:
        assert errors(name, np.float16)[0] < (0.05 if name == "power:0.03" else 0.02)
    assert errors("power:0.03", ml_dtypes.bfloat16)[0] > 0.1


def test_later_snapshots_are_left_out():
    _, _, snapshots, _ = trajectory()
    steps, gammas = [s for s, _, _ in snapshots], [ema.gamma_of(r) for _, r, _ in snapshots]
    weights = ema.reconstruction_weights(steps, gammas, ema.Target(1000, sigma_rel=0.07)).weights
    assert all(w == 0 for w, step in zip(weights, steps, strict=True) if step > 1000) and weights.sum() == pytest.approx(1)


def test_files(tmp_path):
    """What is read back reconstructs the same; a flipped byte is noticed."""
    _, _, snapshots, _ = trajectory()
    for step, sigma, params in snapshots[-8:]:
        path = ema.write_snapshot(tmp_path, step, sigma, params)
    for other in ("9-e", "9-1.2.3", "copy"):  # not of ours
        (tmp_path / f"{other}.safetensors").touch()
    found = ema.find_snapshots(tmp_path)
    assert [(s, r) for s, r, _ in found] == sorted((s, r) for s, r, _ in snapshots[-8:])
    want, _ = ema.reconstruct(
        [(s, r, {n: v.astype(np.float16) for n, v in p.items()}) for s, r, p in snapshots[-8:]],
        ema.Target(STEPS, sigma_rel=0.08),
    )
    got, _ = ema.reconstruct(found, ema.Target(STEPS, sigma_rel=0.08))
    assert distance(got, want) < 1e-6
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        ema.read_snapshot(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        ema.read_snapshot(path)


def test_mistakes_are_refused(tmp_path):
    _, _, snapshots, _ = trajectory()
    for line, call in {
        r"sigma_rel=0\.4": lambda: ema.gamma_of(0.4),
        "sigma_rel=1e-170": lambda: ema.gamma_of(1e-170),
        "give one of the two": lambda: ema.Target(10),
        r"decay=1\.0": lambda: ema.Target(10, decay=1.0),
        "steps 100 to 2000": lambda: ema.reconstruct(snapshots, ema.Target(50, sigma_rel=0.05)),
        "initial weights": lambda: ema.reconstruct(snapshots, ema.Target(STEPS, decay=0.9999)),
        "different models": lambda: ema.reconstruct(
            [*snapshots[:-1], (*snapshots[-1][:2], {"a": np.zeros(3)})], ema.Target(STEPS, sigma_rel=0.05)
        ),
        "float16 cannot hold": lambda: ema.write_snapshot(tmp_path, 1, 0.05, {"a": np.full(2, 1e6)}),
        "cannot be read": lambda: ema.read_snapshot(tmp_path / "none.safetensors"),
    }.items():
        with pytest.raises(UserError, match=line):
            call()


def test_warmup_rate():
    steps = jnp.array([0, 9, 100_000])
    np.testing.assert_allclose(ema.warmup_ema_rate(steps, 0.999), [0.9, 9 / 19, 0.001], rtol=1e-5)


def table():
    dtypes = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    print("| EMA | profile residual | " + " | ".join(dtypes) + " |\n|---|---|" + "---|" * len(dtypes))
    for name in TRACKED:
        cells = " | ".join(f"{errors(name, dtype)[0]:.2%}" for dtype in dtypes.values())
        print(f"| {name} | {errors(name)[1]:.1e} | {cells} |")


if __name__ == "__main__":
    table()
