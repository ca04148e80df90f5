"""The sampler against a network that is exact: data is a Gaussian mixture, whose posterior mean E[x | z_t] has a closed form.

JAX_PLATFORMS=cpu python tests/test_sampling.py      # the table of docs/sampling.md
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax import diffusion, model, sampling
from jitjax.errors import UserError
from jitjax.geometry import make_geometry

CLASSES, MODES, SIDE = 4, 6, 4


def mixture():
    """(means, stds), each (CLASSES * MODES, 48): standard deviations fall as 1 / frequency, as those of photographs do."""
    rng = np.random.default_rng(0)
    spectrum = 1.0 / np.repeat(np.arange(1, SIDE * SIDE + 1), 3)
    spectrum *= 0.5 / np.sqrt(np.mean(spectrum**2))
    means = rng.standard_normal((CLASSES * MODES, 3 * SIDE * SIDE)) * spectrum * 0.8
    return means, np.maximum(spectrum * 0.6 * rng.uniform(0.5, 1.2, (len(means), 1)), 0.01)


def network(z, t, y, prediction="x"):
    """E[x | z, t, y] of the mixture, or the same as epsilon or v; y = CLASSES is unconditional. Shapes as a JiT's."""
    means, stds = (jnp.asarray(each, jnp.float32) for each in mixture())
    time, flat = t[:, None, None], z.reshape(len(z), 1, -1)
    variance = time**2 * stds**2 + (1 - time) ** 2
    rest = flat - time * means
    likelihood = -0.5 * jnp.sum(rest**2 / variance + jnp.log(variance), -1)
    mine = (jnp.arange(len(means))[None] // MODES == y[:, None]) | (y[:, None] == CLASSES)
    weight = jax.nn.softmax(jnp.where(mine, likelihood, -jnp.inf), -1)
    x = jnp.sum(weight[..., None] * (means + time * stds**2 / variance * rest), 1).reshape(z.shape)
    return diffusion.convert(x, "x", prediction, z, t, 1e-6)


def start(count=96):
    return jax.random.normal(jax.random.key(1), (count, SIDE, SIDE, 3)), jnp.arange(count) % CLASSES


@functools.partial(jax.jit, static_argnames=("settings", "prediction"))
def _run(z, labels, settings, prediction):
    apply = functools.partial(network, prediction=prediction)
    return sampling.sample_fn(apply, z, labels, null_label=CLASSES, prediction=prediction, **dict(settings))


def run(z=None, labels=None, *, prediction="x", **settings):
    if z is None:
        z, labels = start()
    return _run(z, labels, tuple(sorted(settings.items())), prediction)


@functools.lru_cache
def reference(grid="power:1.6", **settings):
    """500 Heun steps: from 1,000 they differ by less than 5e-6."""
    return run(steps=500, method="heun", grid=grid, **settings)


def error(method, steps, grid="uniform", want=None, **settings):
    """Median over the samples of the root-mean-square difference from the reference."""
    difference = run(steps=steps, method=method, grid=grid, **settings) - (reference(**settings) if want is None else want)
    return float(jnp.median(jnp.sqrt(jnp.mean(difference**2, axis=(1, 2, 3)))))


def psnr(a, b):
    """In dB, of images in [-1, 1]."""
    return float(-10 * jnp.log10(jnp.mean((a - b) ** 2) / 4))


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("cfg_scale", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
def test_multistep_with_25_passes_is_nearer_than_heun_with_99(cfg_scale):
    heun = error("heun", 50, cfg_scale=cfg_scale)
    assert heun < 3e-3
    for method in ("abm2", "abm3"):
        assert error(method, 25, "power:1.6", cfg_scale=cfg_scale) < heun / 2
    assert error("dpmpp_2m", 50, cfg_scale=cfg_scale) < error("heun", 25, cfg_scale=cfg_scale) / 3


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("dpmpp_2m", 2), ("abm2", 2), ("abm3", 3)])
def test_order_of_convergence(method, order):
    """Halving the steps' length divides the error by 2^order, on a grid that resolves the end."""
    coarse, fine = error(method, 16, "power:1.6"), error(method, 32, "power:1.6")
    assert np.log2(coarse / fine) > order - 0.4


@pytest.mark.slow
def test_no_polynomial_across_a_guidance_switch():
    """Guidance that begins and ends on the grid costs a multistep solver no more than first-order restarts."""
    settings = dict(cfg_scale=3.0, interval=(0.2 - 1e-6, 0.8 - 1e-6))
    want = reference(grid="uniform", **settings)
    heun = error("heun", 20, want=want, **settings)
    for method in sampling.ORDERS:
        assert error(method, 20, want=want, **settings) < heun / 3


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_every_prediction_has_the_same_solution(prediction):
    """A network that predicts noise or velocity has no clip at the image's end, so compare where x has none to speak of."""
    settings = dict(method="abm3", grid="power:2", t_eps=1e-3)
    difference = run(steps=60, prediction=prediction, **settings) - run(steps=120, **settings)
    assert jnp.median(jnp.sqrt(jnp.mean(difference**2, axis=(1, 2, 3)))) < 5e-3


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_are_finite(method, steps):
    assert jnp.isfinite(run(steps=steps, method=method, cfg_scale=2.0, interval=(0.3, 0.9))).all()
    # One step: the first prediction, but for the clip.
    z, labels = start()
    if steps == 1 and method != "heun":
        x = network(z, jnp.zeros(len(z)), labels)
        share = 1 - 1e-3 / np.e if method in sampling.ORDERS else 1.0
        np.testing.assert_allclose(run(steps=1, method=method, t_eps=1e-3), z + share * (x - z), atol=1e-5)


@pytest.mark.parametrize("method", ["abm2", "abm3", "dpmpp_2m"])
def test_a_constant_prediction_is_reached_exactly(method):
    """x(z, t) = c: then z = s e + (1 - s) c, with s = t_eps / e at t = 1. Any number of steps."""
    z, labels = start(2)
    c = jnp.float32(0.3)
    for steps in (1, 4, 9):
        got = sampling.sample_fn(lambda z, t, y: c + 0 * z, z, labels, null_label=9, steps=steps, method=method, t_eps=0.05)
        s = 0.05 / np.e
        np.testing.assert_allclose(got, s * z + (1 - s) * c, atol=2e-6)


# ---------------------------------------------------------------- calls, grids, path


@pytest.mark.parametrize("method", sampling.METHODS)
def test_network_passes_are_counted(method):
    calls = []

    def apply(z, t, y):
        calls.append(len(z))
        return 0 * z

    z, labels = start(3)
    with jax.disable_jit():
        sampling.sample_fn(apply, z, labels, null_label=9, steps=7, method=method, cfg_scale=2.0, interval=(0.3, 0.8))
    assert len(calls) == sampling.network_passes(7, method)
    # Guided times of i / 7 in (0.3, 0.8): 3, 4, 5. Heun evaluates each of them twice.
    assert sum(count == 6 for count in calls) == (6 if method == "heun" else 3)


def test_grids():
    for grid in ("uniform", "power:1", "power:1.6", "power:0.7"):
        times = sampling.time_grid(13, grid)
        assert times.dtype == np.float32 and times[0] == 0 and times[-1] == 1 and (np.diff(times) > 0).all()
    np.testing.assert_allclose(sampling.time_grid(13, "power:1"), sampling.time_grid(13), atol=1e-7)
    np.testing.assert_allclose(1 - sampling.time_grid(4, "power:2"), [1, 9 / 16, 1 / 4, 1 / 16, 0], atol=1e-7)


@pytest.mark.parametrize("method", ["heun", "abm2"])
def test_path_ends_and_predictions(method):
    """The path changes no image, starts at the noise, and holds the guided prediction of each of its states."""
    settings = dict(steps=10, method=method, cfg_scale=2.0, interval=(0.25, 1.0), grid="power:1.5")
    images, path = run(return_path=4, **settings)
    np.testing.assert_allclose(images, run(**settings), atol=1e-6)
    z, labels = start()
    np.testing.assert_array_equal(path.times, sampling.time_grid(10, "power:1.5")[[0, 3, 6, 9]])
    np.testing.assert_array_equal(path.states[0], z)
    for t, state, prediction in zip(path.times, path.states, path.predictions, strict=True):
        x, x_null = (network(state, jnp.full(len(z), t), y) for y in (labels, jnp.full_like(labels, CLASSES)))
        want = x_null + 2.0 * (x - x_null) if t > 0.25 else x
        np.testing.assert_allclose(prediction, want, atol=2e-5)


# ---------------------------------------------------------------- inversion


@pytest.mark.parametrize(("cfg_scale", "least"), [(1.0, 60.0), (1.5, 45.0)])
def test_round_trip_on_the_mixture(cfg_scale, least):
    z, labels = start()
    settings = dict(steps=50, method="abm2", grid="power:1.6", cfg_scale=cfg_scale, interval=(0.2, 1.0))
    images = run(**settings)
    noise = run(images, labels, backward=True, **settings)
    assert 0.8 < float(jnp.std(noise)) < 1.2
    assert psnr(run(noise, labels, **settings), images) > least


@pytest.mark.slow
@pytest.mark.slow
def test_round_trip_of_a_random_jit():
    geometry = make_geometry("JiT-nano/4", 8, 3, depth=2, width=32, heads=2, bottleneck=8, context_length=2)
    params = jax.jit(model.init_fn(geometry))(jax.random.key(0))
    keys = dict(zip(params, jax.random.split(jax.random.key(1), len(params)), strict=True))
    params = {name: p + 0.05 * jax.random.normal(keys[name], p.shape) for name, p in params.items()}  # or it predicts 0
    jit = model.merge(model.graphdef_of(geometry), params)
    images = jnp.clip(jax.random.normal(jax.random.key(2), (4, 8, 8, 3)), -1, 1)
    labels = jnp.array([0, 1, 2, 3])
    noise = sampling.invert(jit, images, labels, steps=40)
    assert jnp.abs(noise - images).max() > 0.5
    again = sampling.sample(jit, noise, labels, steps=40, method="abm2", grid="power:1.6")
    assert psnr(again, images) > 50


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(steps=0), "steps=0"),
        (dict(method="rk4"), "method='rk4'.*heun.*abm2"),
        (dict(grid="cosine"), "grid='cosine'.*power:rho"),
        (dict(grid="power:-1"), "grid='power:-1'"),
        (dict(grid="power:nan"), "grid='power:nan'"),
        (dict(grid="power:40", steps=500), "float32"),
        (dict(interval=(0.9, 0.1)), r"interval=\(0.9, 0.1\)"),
        (dict(interval=(float("nan"), 0.1)), "interval"),
        (dict(t_eps=0.0), "t_eps=0.0"),
        (dict(t_eps=float("nan")), "t_eps=nan"),
        (dict(cfg_scale=float("inf")), "cfg_scale=inf"),
        (dict(return_path=9, steps=8), "return_path=9"),
        (dict(prediction="noise"), "prediction='noise'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, line):
    z, labels = start(2)
    with pytest.raises(UserError, match=line):
        sampling.sample_fn(network, z, labels, null_label=CLASSES, **settings)


# ---------------------------------------------------------------- the table of docs/sampling.md


def table():
    passes = (9, 15, 25, 33, 49, 99)
    for title, cfg_scale in {"no guidance": 1.0, "guidance 3": 3.0}.items():
        print(f"\n{title}\n\n| method | grid |" + "".join(f" {n} |" for n in passes))
        print("|---|---|" + "---|" * len(passes))
        for method in sampling.METHODS:
            for grid in ("uniform", "power:1.6"):
                counts = [(n + 1) // 2 if method == "heun" else n for n in passes]
                cells = "".join(f" {error(method, steps, grid, cfg_scale=cfg_scale) * 1e3:.2f} |" for steps in counts)
                print(f"| {method} | {grid} |{cells}", flush=True)


if __name__ == "__main__":
    table()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([6], "label 6 is out of range"),
        ([999], "label 999 is out of range"),
        ([-1], "label -1 is out of range"),
        ([1.9], "must be whole numbers in"),
        ([True], "must be whole numbers in"),
        (["cat"], "must be whole numbers in"),
        ([0, 1], "one label per image"),
    ],
)
def test_labels_that_the_model_does_not_have_are_refused(labels, message):
    module = model.create_model("JiT-nano/4", image_size=8, num_classes=5, depth=1, width=32, heads=2, context_start=0)
    with pytest.raises(UserError, match=message):
        sampling.sample(module, jnp.zeros((1, 8, 8, 3)), labels, steps=1)
