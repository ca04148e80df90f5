"""The MLP: a matmul, bias, split, silu(a) * b, and a second matmul.

h_BTF2 is the first matmul without its bias, [a | b] on the last axis; bias_F2 is float32. On Hopper SwiGLU is computed inside
the matmul kernels (`hopper_swiglu`), elsewhere by Triton kernels between XLA's matmuls.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jitjax.kernels import hopper_swiglu, mosaic, triton
from jitjax.kernels.constants import SWIGLU
from jitjax.kernels.masks import apply_mask, dropout, inverse_keep, keep_mask
from jitjax.kernels.triton import load, store

f32 = jnp.float32

# One program's tile: rows at a time x columns, and how many rows it loops over in the backward pass. Columns shrink
# (and rows grow) where they do not divide F.
FORWARD = dict(rows=4, columns=1024, warps=4)
BACKWARD = dict(rows=4, columns=128, tokens=64, warps=4)
PADDING = hopper_swiglu.UNIT


@jax.named_scope(SWIGLU)
def plain_swiglu(h_BTF2: jax.Array, bias_F2: jax.Array) -> jax.Array:
    """silu(a) * b of h + bias = [a | b], (B, T, 2F) -> (B, T, F), computed in float32 and rounded to the type of h."""
    a, b = jnp.split(h_BTF2.astype(f32) + bias_F2.astype(f32), 2, axis=-1)
    return (jax.nn.silu(a) * b).astype(h_BTF2.dtype)


def plain_mlp(
    h_BTD: jax.Array,
    w12_DF2: jax.Array,
    bias_F2: jax.Array,
    w3_FD: jax.Array,
    rate: float = 0.0,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """(B, T, D) -> (B, T, D): dropout(swiglu(h @ w12, bias), rate, keys) @ w3. Matmuls in the type of h."""
    return _with_matmuls(plain_swiglu, h_BTD, w12_DF2, bias_F2, w3_FD, rate, keys_B)


def _with_matmuls(swiglu, h_BTD, w12_DF2, bias_F2, w3_FD, rate, keys_B):
    u_BTF = swiglu(h_BTD @ w12_DF2.astype(h_BTD.dtype), bias_F2)
    return dropout(u_BTF, rate, keys_B) @ w3_FD.astype(h_BTD.dtype)


# ---------------------------------------------------------------- fused


def fused_mlp(h_BTD, w12_DF2, bias_F2, w3_FD, rate=0.0, keys_B=None):
    """`plain_mlp` by the kernels for Hopper, where they take it, else as `separate_mlp`."""
    dtype, tokens = h_BTD.dtype, h_BTD.shape[1]
    padded = pad_hidden(w12_DF2, bias_F2, w3_FD)
    hidden, width = padded[2].shape
    if not mosaic.hopper() or hopper_swiglu.unsupported(width, hidden, dtype):
        return separate_mlp(h_BTD, w12_DF2, bias_F2, w3_FD, rate, keys_B)
    w12_DF2, bias_F2, w3_FD = padded
    keep_BTF = keep_mask(keys_B, tokens, hidden, rate) if rate and keys_B is not None else None
    return hopper_mlp(h_BTD, w12_DF2.astype(dtype), bias_F2, w3_FD.astype(dtype), keep_BTF, rate)


def separate_mlp(h_BTD, w12_DF2, bias_F2, w3_FD, rate=0.0, keys_B=None):
    """`plain_mlp` with matmuls that a rematerialisation policy can see and `fused_swiglu` between them."""
    return _with_matmuls(fused_swiglu, h_BTD, *pad_hidden(w12_DF2, bias_F2, w3_FD), rate, keys_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def hopper_mlp(
    h_BTD: jax.Array,
    w12_DF2: jax.Array,
    bias_F2: jax.Array,
    w3_FD: jax.Array,
    keep_BTF: jax.Array | None = None,
    rate: float = 0.0,
) -> jax.Array:
    """`plain_mlp` for weights in the type of h and shapes that `hopper_swiglu` takes; dropout by its mask."""
    return _hopper_forward(h_BTD, w12_DF2, bias_F2, w3_FD, keep_BTF, rate)[0]


def _as_rows(x_BTD: jax.Array) -> jax.Array:
    """(B, T, D) -> (M, D), with zeros for the rest of the last tile."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    missing = -x_MD.shape[0] % hopper_swiglu.ROWS
    return jnp.pad(x_MD, ((0, missing), (0, 0))) if missing else x_MD


@jax.named_scope(SWIGLU)
def _hopper_forward(h_BTD, w12_DF2, bias_F2, w3_FD, keep_BTF, rate):
    b, t, d = h_BTD.shape
    w12_F2D = w12_DF2.T  # the contraction last, as the kernel and the matmul of the backward pass take it
    x12, u = hopper_swiglu.forward(_as_rows(h_BTD), w12_F2D, bias_F2, interpret=triton.interpreted())
    keep = None if keep_BTF is None else _as_rows(keep_BTF)
    if keep is not None:
        u = apply_mask(u, keep, rate)
    y_BTD = (u @ w3_FD)[: b * t].reshape(b, t, d)
    return y_BTD, (h_BTD, w12_F2D, bias_F2, w3_FD, x12, u, keep)


@jax.named_scope(SWIGLU)
def _hopper_backward(rate, saved, dy_BTD):
    h_BTD, w12_F2D, bias_F2, w3_FD, x12, u, keep = saved
    b, t, d = h_BTD.shape
    dy, scale = _as_rows(dy_BTD), inverse_keep(rate)
    dx12, dbias_F2 = hopper_swiglu.backward(dy, w3_FD, x12, bias_F2, keep, scale=scale, interpret=triton.interpreted())
    dh_BTD = (dx12 @ w12_F2D)[: b * t].reshape(b, t, d)
    return dh_BTD, _as_rows(h_BTD).T @ dx12, dbias_F2.astype(bias_F2.dtype), u.T @ dy, None


hopper_mlp.defvjp(_hopper_forward, _hopper_backward)


def pad_hidden(w12_DF2: jax.Array, bias_F2: jax.Array, w3_FD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pads the hidden width F with zeros to a multiple of 128: 2730 -> 2816, 3413 -> 3456, 4437 -> 4480.

    The published widths are odd multiples of 1 or 2, which the matrix units and 16-byte memory accesses cannot work on.
    A hidden unit with zero weights gives silu(0) * 0 = 0 and receives a zero gradient through a zero row of w3, so
    neither the result nor the gradients of the rest change.
    """
    hidden = w3_FD.shape[0]
    extra = -hidden % PADDING
    if not extra:
        return w12_DF2, bias_F2, w3_FD
    w12 = jnp.pad(w12_DF2.reshape(-1, 2, hidden), ((0, 0), (0, 0), (0, extra))).reshape(w12_DF2.shape[0], -1)
    bias = jnp.pad(bias_F2.reshape(2, hidden), ((0, 0), (0, extra))).reshape(-1)
    return w12, bias, jnp.pad(w3_FD, ((0, extra), (0, 0)))


@jax.custom_vjp
def fused_swiglu(h_BTF2: jax.Array, bias_F2: jax.Array) -> jax.Array:
    """`plain_swiglu` as one kernel; its backward recomputes silu and sums the bias gradient in the same pass.

    With s = sigmoid(a):  da = dy * b * (s + a s (1 - s)),  db = dy * a s,  dbias = sum of [da | db] over all tokens.
    """
    return _forward(h_BTF2, bias_F2)


def _tiling(hidden: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile: columns halve (rows double) down to 128 until they divide the hidden width."""
    while hidden % columns and columns > 128:
        rows, columns = rows * 2, columns // 2
    return rows, columns


@jax.named_scope(SWIGLU)
def _forward(h_BTF2, bias_F2):
    b, t, f2 = h_BTF2.shape
    m, f = b * t, f2 // 2
    rows, columns = _tiling(f, FORWARD["rows"], FORWARD["columns"])

    def kernel(h_ref, bias_ref, y_ref):
        r, c = triton.tile(pl.program_id(0), rows, m), triton.tile(pl.program_id(1), columns, f)
        a = load(h_ref, r, 0, c) + load(bias_ref, 0, c)
        u = load(h_ref, r, 1, c) + load(bias_ref, 1, c)
        store(y_ref, r, c, value=a * u / (1 + jnp.exp(-a)))

    (y,) = triton.call(
        kernel,
        h_BTF2.reshape(m, 2, f),
        bias_F2.reshape(2, f).astype(h_BTF2.dtype),  # see triton.py on types
        scope=SWIGLU,
        name="forward",
        grid=(-(-m // rows), -(-f // columns)),
        out=[((m, f), h_BTF2.dtype)],
        warps=FORWARD["warps"],
    )
    return y.reshape(b, t, f)


@jax.named_scope(SWIGLU)
def _backward(residuals, dy_BTF):
    h_BTF2, bias_F2 = residuals
    b, t, f2 = h_BTF2.shape
    m, f = b * t, f2 // 2
    rows, columns = _tiling(f, BACKWARD["rows"], BACKWARD["columns"])
    tokens = triton.chunk(m, BACKWARD["tokens"], rows)

    def kernel(h_ref, bias_ref, dy_ref, dh_ref, sums_ref):
        chunk, c = pl.program_id(0), triton.tile(pl.program_id(1), columns, f)
        bias_a, bias_u = load(bias_ref, 0, c), load(bias_ref, 1, c)

        def body(i, sums):
            # A masked row contributes nothing: its dy is 0.
            r = triton.Span(chunk * tokens + i * rows, rows, m if m % tokens else None)
            a, u, dy = load(h_ref, r, 0, c) + bias_a, load(h_ref, r, 1, c) + bias_u, load(dy_ref, r, c)
            s = 1 / (1 + jnp.exp(-a))
            silu = a * s
            da, du = dy * u * (s + silu * (1 - s)), dy * silu
            store(dh_ref, r, 0, c, value=da)
            store(dh_ref, r, 1, c, value=du)
            return sums[0] + da, sums[1] + du

        zero = jnp.zeros((rows, columns), f32)
        sum_a, sum_u = jax.lax.fori_loop(0, tokens // rows, body, (zero, zero))
        store(sums_ref, chunk, 0, c, value=jnp.sum(sum_a, 0))
        store(sums_ref, chunk, 1, c, value=jnp.sum(sum_u, 0))

    chunks = -(-m // tokens)
    dh, sums = triton.call(
        kernel,
        h_BTF2.reshape(m, 2, f),
        bias_F2.reshape(2, f).astype(h_BTF2.dtype),  # see triton.py on types
        dy_BTF.reshape(m, f),
        scope=SWIGLU,
        name="backward",
        grid=(chunks, -(-f // columns)),
        out=[((m, 2, f), h_BTF2.dtype), ((chunks, 2, f), f32)],
        warps=BACKWARD["warps"],
    )
    return dh.reshape(b, t, f2), sums.sum(0).reshape(f2).astype(bias_F2.dtype)


fused_swiglu.defvjp(lambda h, bias: (_forward(h, bias), (h, bias)), _backward)
