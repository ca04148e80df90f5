"""Programs for a card that this machine does not have, compiled to read their memory and never run.

Every GPU kernel becomes an opaque call with the same inputs and outputs. So what such a program keeps between its forward and
its backward pass is what the real one keeps, to the byte, and it compiles in seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

# `with for_card(card): ...` traces for that card. A part of the keys of JAX's caches, so that no traced function leaks out.
for_card = jax.make_user_context(default_value=None)


def card() -> Any:
    """The card that the program is planned for, with the attributes of a `jax.Device`; None: it will run."""
    return for_card.value


def opaque(out: Sequence[jax.ShapeDtypeStruct], *args: jax.Array) -> list[jax.Array]:
    """Stands for a kernel with these outputs."""

    def run(*_):
        raise RuntimeError("this program was compiled to read its memory and cannot run")

    return jax.pure_callback(run, list(out), *args)


def opaque_in_place(
    array: jax.Array, out: Sequence[jax.ShapeDtypeStruct], *args: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Stands for a kernel that also writes to `array`: nothing is copied, and later uses of it wait for the outputs."""
    array, out = jax.lax.optimization_barrier((array, opaque(out, array, *args)))
    return array, out
