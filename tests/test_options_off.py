"""An option that is off changes not one bit of the published recipe: the program of its training step is the same with the
option's code taken out."""

import jax
import jax.numpy as jnp
import pytest
from conftest import DEEPER, small_settings

from jitjax import diffusion, from_settings, muon, optimizer, sharding

OPTIONS = {  # what turns it on, and the functions that it lives in
    "muon": (dict(optim__name="muon"), [(muon, "make")]),
    "class loss": (dict(model__class_loss=100.0), [(diffusion, "with_class_loss")]),
    "power EMAs": (dict(optim__power_emas=(0.1, 0.05)), [(optimizer, "power_ema_rate")]),
    "EMA warm-up": (dict(optim__ema_warmup=True), [(optimizer, "warmup_ema_rate")]),
}


def program(mesh, **options):
    """StableHLO of the training step."""
    base = DEEPER | dict(optim__accumulation_steps=2, dtype="bfloat16")
    devices = jax.devices()[: mesh[0] * mesh[1] * mesh[2]]
    built = from_settings.setup(
        small_settings(**base | options), images=64, num_classes=5, mesh=sharding.make_mesh(*mesh, devices)
    )
    state = from_settings.abstract_state(built.settings, built.geometry, built.mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((built.plan.global_batch, 8, 8, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((built.plan.global_batch,), jnp.int32),
    }
    return from_settings.make_step(built).lower(state, batch).as_text()


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1), (1, 1, 2)], ids=["one", "data x zero", "fsdp"])
def test_the_recipes_program_holds_nothing_of_what_is_off(mesh, monkeypatch):
    def absent(*args, **kwargs):
        raise AssertionError("an option that is off was asked for")

    published = program(mesh)
    for _, functions in OPTIONS.values():
        for module, name in functions:
            monkeypatch.setattr(module, name, absent)
    assert program(mesh) == published


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_on_is_in_the_program(name, monkeypatch):
    """So that the test above looks in the right places."""
    options, functions = OPTIONS[name]
    calls = []
    for module, function in functions:
        real = getattr(module, function)

        def counted(*args, real=real, **kwargs):
            calls.append(real)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)
    assert program((1, 1, 1), **options) != program((1, 1, 1))
    assert calls
