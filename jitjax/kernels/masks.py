"""Dropout whose mask depends on (key of the image, token, feature) alone: not on how a batch is divided, nor on padding.

The random bit generator is most of the cost of dropout. Threefry makes 64 bits at a time of which `jax.random.bernoulli` uses
32 for one value; here they serve four, with 16 bits each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from jitjax.kernels.constants import DROPOUT

_BITS = 16  # a value
_WORD = 4  # values that one 64-bit word of random bits serves


def _dropped(rate: float) -> int:
    """The rate in units of 2^-16; below 1."""
    return min(round(rate * 2**_BITS), 2**_BITS - 1)


def inverse_keep(rate: float) -> float:
    """The factor of values that are not dropped: 1 / (1 - rate), for the rate as it is drawn, a multiple of 2^-16."""
    return 1 / (1 - _dropped(rate) / 2**_BITS)


@jax.named_scope(DROPOUT)
def keep_mask(keys_B: jax.Array, tokens: int, features: int, rate: float) -> jax.Array:
    """1 to keep and 0 to drop, (B, tokens, features) uint8. A wider or longer mask agrees with this one where they overlap.

    Args:
      keys_B: one threefry key per image (others make masks that depend on the batch).
      rate: share of zeros, in [0, 1), rounded to a multiple of 2^-16.
    """
    key = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys_B)[:, :, None, None]
    token = lax.broadcasted_iota(jnp.uint32, (1, tokens, 1), 1)
    word = lax.broadcasted_iota(jnp.uint32, (1, 1, -(-features // _WORD)), 2)
    halves = threefry2x32_p.bind(*jnp.broadcast_arrays(key[:, 0], key[:, 1], token, word))
    values = [value for half in halves for value in (half & 0xFFFF, half >> _BITS)]
    bits = [(value >= _dropped(rate)).astype(jnp.uint32) << 8 * i for i, value in enumerate(values)]
    # Four bytes by one thread. The barrier keeps XLA from drawing a word for each of them again, where they are used.
    packed = lax.optimization_barrier(bits[0] | bits[1] | bits[2] | bits[3])
    return lax.bitcast_convert_type(packed, jnp.uint8).reshape(*packed.shape[:2], -1)[..., :features]


@jax.named_scope(DROPOUT)
def apply_mask(x: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
    """x / (1 - rate) where `keep` is 1, else 0, in the type of x."""
    return jnp.where(keep != 0, x.astype(jnp.float32) * inverse_keep(rate), 0).astype(x.dtype)


@jax.named_scope(DROPOUT)
def dropout(x_BTF: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Inverted dropout with one key per image; without keys, or at rate 0, x as it is."""
    if not rate or keys_B is None:
        return x_BTF
    return apply_mask(x_BTF, keep_mask(keys_B, *x_BTF.shape[1:], rate), rate)
