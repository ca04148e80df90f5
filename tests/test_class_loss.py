"""The auxiliary class loss: what the blocks in front of the class know, and that its head leaves with the training. On every
mesh: `test_step.test_same_curve_on_any_mesh`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import DEEPER, small_settings

import jitjax
from jitjax import cli, convert, diffusion, from_settings, kernels, model, pipeline, sharding, step
from jitjax.errors import UserError
from jitjax.geometry import geometry_of, make_geometry
from jitjax.train import train

ON = DEEPER | {"model__class_loss": 100.0, "model__num_classes": 5}
CLASSES = 5


def network(seed=0, **changes):
    """A model with a class head, and no parameter 0."""
    geometry = geometry_of(small_settings(**ON | changes).model, 8, CLASSES)
    params = model.init_fn(geometry)(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return geometry, {n: v + 0.1 * jax.random.normal(k, v.shape) for (n, v), k in zip(params.items(), keys, strict=True)}


def seen(geometry, params, *inputs, **options):
    """(class logits, output)."""
    found = {}
    output = model.merge(model.graphdef_of(geometry), params)(*inputs, observe=found.__setitem__, **options)
    return found["class_logits"], output


INPUTS = jax.random.normal(jax.random.key(5), (4, 8, 8, 3)), jnp.full(4, 0.6), jnp.arange(4)


@pytest.mark.parametrize("context_length", [2, 0])
def test_the_head_sees_the_image_and_time_but_not_the_class(context_length):
    geometry, params = network(model__context_length=context_length)
    z, t, y = INPUTS
    (logits, output), (other_logits, other) = seen(geometry, params, z, t, y), seen(geometry, params, z, t, y + 1)
    np.testing.assert_array_equal(logits, other_logits)
    assert logits.shape == (4, CLASSES) and logits.dtype == jnp.float32 and float(jnp.abs(output - other).max()) > 1e-3
    for changed in (seen(geometry, params, z + 1, t, y), seen(geometry, params, z, t / 2, y)):
        assert float(jnp.abs(changed[0] - logits).max()) > 1e-3
    # What the head reads is the mean of the tokens that go into the first block with the class.
    found = {}
    model.merge(model.graphdef_of(geometry), params)(z, t, y, observe=found.__setitem__)
    silu = jax.nn.silu(model.merge(model.graphdef_of(geometry), params).t_embedder(t, jnp.float32))
    gate = jnp.split(silu @ params["blocks.0.adaln.kernel"] + params["blocks.0.adaln.bias"], 6, axis=-1)[5]
    branch = found["blocks.0.mlp"] + params["blocks.0.mlp.w3.bias"]
    pooled = (found["blocks.0.attn"] + gate[:, None] * branch).mean(axis=1)
    np.testing.assert_allclose(logits, pooled @ params["class_head.kernel"] + params["class_head.bias"], rtol=2e-4, atol=2e-4)


def test_the_loss_is_the_published_one_plus_the_weighted_cross_entropy_of_the_true_class():
    """Also of images whose label is dropped. 100 beside the sum over 8 x 8 x 3 values is 100 / 192 beside the mean."""
    with_it, without = (
        small_settings(**ON | {"model__class_loss": w, "diffusion__label_drop_prob": 1.0}) for w in (100.0, 0.0)
    )
    geometry, params = network()
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    labels, keys = jnp.array([0, 1, 2, 3, 4, 0]), jax.random.split(jax.random.key(3), 6)
    ops = kernels.get_ops("plain")
    total, base = (from_settings.make_loss(s, geometry, ops)(params, images, labels, keys) for s in (with_it, without))
    t, e, _, _ = jax.vmap(lambda key: step.randomness(key, (8, 8, 3), with_it.diffusion))(keys)
    logits, _ = seen(geometry, params, diffusion.noised(diffusion.to_float(images), e, t), t, jnp.full(6, CLASSES))
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    np.testing.assert_allclose(total - base, -100 / 192 * log_p[np.arange(6), labels], rtol=1e-4)


def test_beside_a_loss_of_ones_own_on_activations():
    def own(output, x, e, t, activations):
        assert set(activations) == {"embed"}
        return jnp.mean(jnp.square(activations["embed"]), axis=(1, 2))

    own.activations = ("embed",)
    geometry, params = network()
    data = np.zeros((2, 8, 8, 3), np.uint8), jnp.array([1, 2]), jax.random.split(jax.random.key(0), 2)
    ops = kernels.get_ops("plain")
    with_it, alone = (
        from_settings.make_loss(small_settings(**ON | {"model__class_loss": w}), geometry, ops, own)(params, *data)
        for w in (50.0, 0.0)
    )
    assert bool(jnp.all(with_it > alone))  # a cross-entropy is above 0


def test_what_is_saved_has_no_head_and_knows_where_the_class_begins(tmp_path):
    geometry, params = network()
    pipe = pipeline.Pipeline(geometry, diffusion.Diffusion(), {"model": params, "0.9": params}, "0.9")
    assert (pipe.geometry.class_start, pipe.geometry.class_head) == (1, False)
    assert set(params) - set(pipe.params) == {"class_head.kernel", "class_head.bias"}
    back = jitjax.load(pipe.save(tmp_path / "exported"))
    assert back.geometry == pipe.geometry
    images = pipe.sample([0, 1], steps=2, cfg_scale=2.0)
    np.testing.assert_array_equal(back.sample([0, 1], steps=2, cfg_scale=2.0), images)
    unaware = dataclasses.replace(pipe, geometry=dataclasses.replace(pipe.geometry, class_start=0))
    assert (unaware.sample([0, 1], steps=2, cfg_scale=2.0) != images).any()


def test_a_run_with_it(tmp_path, capsys):
    on = ON | {"model__num_classes": None, "optim__power_emas": (0.1,), "checkpoint__ema_every_steps": 1, "total_steps": 1}
    source = tmp_path / "run"
    assert train(small_settings(**on), source) == 0
    pipe = jitjax.load(source)
    assert pipe.geometry.class_start == 1
    names = set(model.init_fn(pipe.geometry)(jax.random.key(0)))
    assert all(set(pipe.using(which).params) == names for which in (*pipe.weights, "power:0.1"))

    convert.main(["--from", str(source), "--to", str(tmp_path / "one.safetensors")])
    assert "for jitjax only: the official code conditions every block on the class" in capsys.readouterr().out
    assert jitjax.load(tmp_path / "one.safetensors").geometry == pipe.geometry
    for target in ("official.pth", "folder --format diffusers"):
        path, *more = target.split()
        assert cli.main(["convert", "--from", str(source), "--to", str(tmp_path / path), *more]) == 2
        assert "this model those from block 1 on; write a .safetensors" in capsys.readouterr().err

    without = small_settings(**DEEPER, init_from=str(source))
    setup = from_settings.setup(without, images=512, num_classes=8, mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    _, (report,) = from_settings.first_state(setup, diffusion.Diffusion(), ())
    assert "conditioned on the class from block 1 on, now from block 0" in report and "left out" not in report
    with pytest.raises(UserError, match=r"another model \(model.class_loss: on -> off\): set these fields"):
        train(small_settings(**on | {"model__class_loss": 0.0}), source, accept_config_changes=True)


def test_what_it_needs():
    for changes in ({"model__class_conditional": False}, {"model__context_start": 0}):
        config = small_settings(**ON | changes)
        with pytest.raises(
            UserError, match="class_loss=100 needs --config.model.class_conditional=True and --config.model.con"
        ):
            geometry_of(config.model, 8, CLASSES)
    with pytest.raises(UserError, match=r"context_start from 1 on, so --config.model.depth of 2 or more: the blocks in front"):
        geometry_of(small_settings(**ON | {"model__depth": 1, "model__context_start": 0}).model, 8, CLASSES)
    with pytest.raises(UserError, match="context tokens show the class from block 0 on"):
        make_geometry("JiT-nano/4", 8, CLASSES, class_start=1, context_start=0)
