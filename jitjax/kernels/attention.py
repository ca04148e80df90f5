"""Attention from the fused qkv projection to the input of the output projection: bias, qk-norm, RoPE, softmax attention."""

from __future__ import annotations

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jitjax.kernels import flash, hopper_backward, hopper_forward, hopper_rope, hopper_wide, mosaic, triton
from jitjax.kernels.constants import ATTENTION, EPS, ROPE
from jitjax.kernels.masks import dropout
from jitjax.kernels.triton import Span, load, store

f32 = jnp.float32


def rotate_pairs(x: jax.Array) -> jax.Array:
    """Each adjacent pair (a, b) of the last axis becomes (-b, a): interleaved RoPE's rotation by 90 degrees."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)


@jax.named_scope(ROPE)
def _norm_rope(x_BTHN: jax.Array, weight_N: jax.Array, cos_TN: jax.Array, sin_TN: jax.Array) -> jax.Array:
    """RMSNorm over the head, times weight, then RoPE; float32 in and out."""
    x = x_BTHN * jax.lax.rsqrt(jnp.mean(x_BTHN * x_BTHN, axis=-1, keepdims=True) + EPS) * weight_N.astype(f32)
    return x * cos_TN[:, None].astype(f32) + rotate_pairs(x) * sin_TN[:, None].astype(f32)


def _split_qkv(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads):
    """(B, T, 3*H*N) -> q, k, v, each (B, T, H, N) in the compute type; q and k normalised and rotated."""
    b, t, c = qkv_BTC.shape
    qkv = (qkv_BTC.astype(f32) + bias_C.astype(f32)).reshape(b, t, 3, num_heads, c // (3 * num_heads))
    q, k = (_norm_rope(qkv[:, :, i], w, cos_TN, sin_TN) for i, w in ((0, q_weight_N), (1, k_weight_N)))
    return tuple(z.astype(qkv_BTC.dtype) for z in (q, k, qkv[:, :, 2]))


@jax.named_scope(ATTENTION)
def plain_qkv_attention(
    qkv_BTC: jax.Array,
    bias_C: jax.Array,
    q_weight_N: jax.Array,
    k_weight_N: jax.Array,
    cos_TN: jax.Array,
    sin_TN: jax.Array,
    num_heads: int,
    drop: int = 0,
) -> jax.Array:
    """(B, T, 3D) -> (B, T - drop, D). Softmax in float32; on a GPU in half precision through cuDNN's flash attention."""
    q, k, v = _split_qkv(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads)
    q = q[:, drop:]
    half_precision = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[1] % 2 == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    cudnn = jax.default_backend() == "gpu" and half_precision and fits
    if q.dtype == jnp.float16 and not cudnn:  # XLA on CPU has no float16 matmul with float32 sums
        q, k, v = (x.astype(f32) for x in (q, k, v))
    o_BTHN = jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if cudnn else "xla")
    return o_BTHN.astype(qkv_BTC.dtype).reshape(*q.shape[:2], -1)


@jax.named_scope(ATTENTION)
def qkv_attention_with_dropout(
    qkv_BTC: jax.Array,
    bias_C: jax.Array,
    q_weight_N: jax.Array,
    k_weight_N: jax.Array,
    cos_TN: jax.Array,
    sin_TN: jax.Array,
    num_heads: int,
    rate: float,
    keys_B: jax.Array,
) -> jax.Array:
    """`plain_qkv_attention` with dropout of the softmax weights (inverted, one random key per image). Published column
    order. No recipe uses it, so it is written out in jnp and holds the (B, H, T, T) weights."""
    q, k, v = _split_qkv(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads)
    logits = jnp.einsum("BTHN,BSHN->BHTS", q, k, preferred_element_type=f32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1)
    rows = weights.reshape(weights.shape[0], -1, weights.shape[-1])
    weights = dropout(rows, rate, keys_B).reshape(weights.shape).astype(v.dtype)
    return jnp.einsum("BHTS,BSHN->BTHN", weights, v).reshape(*qkv_BTC.shape[:2], -1)


# ---------------------------------------------------------------- fused
#
# Interleaved RoPE rotates neighbours, which is awkward for vectors in registers. The order of a head's features does not matter
# to attention as long as q and k agree, so the fused kernels take all first members of the pairs, then all second ones
# ("half-split"). `prepare_qkv` permutes the weights to that order, inside the step and before the matmul: parameters and
# checkpoints stay in the published order, and no activation is ever permuted.

HOPPER = {module.HEAD_DIM: module for module in (hopper_forward, hopper_wide)}  # by features of a head
FORWARD = dict(rows=4, heads=4, warps=1)
BACKWARD = dict(rows=8, heads=4, tokens=32, warps=1)


def prepare_qkv(
    kernel_DC: jax.Array, bias_C: jax.Array, q_weight_N: jax.Array, k_weight_N: jax.Array, num_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """From published to half-split order of the features of each head, for queries and keys."""
    n = q_weight_N.shape[-1]
    kernel_DC, bias_C = (_half_split(x, n, 2 * num_heads) for x in (kernel_DC, bias_C))
    return kernel_DC, bias_C, _half_split(q_weight_N, n, 1), _half_split(k_weight_N, n, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _half_split(x: jax.Array, n: int, groups: int) -> jax.Array:
    """a0 b0 a1 b1 ... becomes a0 a1 ... b0 b1 ... in each of the first `groups` n of the last axis. Its gradient is written to
    memory once.

    Without that XLA repeats the inverse permutation in each of several optimizer kernels into which it then breaks up the
    update: twice the time for the matrix, five kernels instead of one for the bias.
    """
    return _permuted(x, (n // 2, 2), n * groups)


def _permuted(x: jax.Array, pair: tuple[int, int], columns: int) -> jax.Array:
    """Every `pair` of the last axis transposed as a matrix of that shape, up to `columns`. One pass, casts included."""
    swapped = x.reshape(*x.shape[:-1], -1, *pair).swapaxes(-1, -2).reshape(x.shape)
    return jnp.where(np.arange(x.shape[-1]) < columns, swapped, x) if columns < x.shape[-1] else swapped


@jax.named_scope(ROPE)
def _half_split_backward(n, groups, _, dx):
    return (jax.lax.optimization_barrier(_permuted(dx, (2, n // 2), n * groups)),)


_half_split.defvjp(lambda x, n, groups: (_half_split(x, n, groups), None), _half_split_backward)


@jax.named_scope(ATTENTION)
def fused_qkv_attention(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads, drop=0):
    """`plain_qkv_attention` for weights that went through `prepare_qkv`.

    On Hopper one kernel forward, one backward for dq, dk, dv (`hopper_forward`, `hopper_backward`), where they take the
    shapes; else `_norm_rope_forward` and the attention kernels of `hopper_wide` or `flash`. A last kernel (`hopper_rope` or
    `_norm_rope_backward`) is the backward pass of RoPE and norm and completes the gradient of the qkv projection in place.
    """
    return _fused(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads, drop, mosaic.hopper())


def no_hopper(tokens: int, drop: int, head_dim: int) -> str:
    """Why attention falls back from the Hopper kernels to the Triton ones on any card, or an empty string."""
    if head_dim not in HOPPER:
        return f"heads of {head_dim} features, not {' or '.join(map(str, HOPPER))}"
    return mosaic.UNAVAILABLE or HOPPER[head_dim].unsupported(tokens, drop)


def no_hopper_backward(tokens: int, head_dim: int) -> str:
    """Why the backward pass falls back although the forward pass does not, or an empty string."""
    return hopper_backward.unsupported(tokens) if head_dim == hopper_forward.HEAD_DIM else ""


def _hopper_kernels(tokens: int, drop: int, head_dim: int) -> types.ModuleType | None:
    """The module with the forward pass for Hopper, or None where that falls back."""
    return None if no_hopper(tokens, drop, head_dim) else HOPPER[head_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _fused(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads, drop, hopper):
    # No gradient is needed here: on Hopper the normalised queries and keys need not leave the kernel.
    arguments = qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads, drop, hopper
    return _fused_forward(*arguments, save_qk=False)[0]


@jax.named_scope(ATTENTION)
def _fused_forward(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads, drop, hopper, save_qk=True):
    b, t, c = qkv_BTC.shape
    n = c // (3 * num_heads)
    bias, qkv_BTGN = bias_C.astype(qkv_BTC.dtype), qkv_BTC.reshape(b, t, -1, n)  # see triton.py on types
    kernels = _hopper_kernels(t, drop, n) if hopper else None
    if kernels is hopper_forward:
        o_BTHN, lse_BHT, *qk = hopper_forward.forward(
            *(qkv_BTGN, bias.reshape(-1, n), q_weight_N, k_weight_N, cos_TN[:, ::2], sin_TN[:, ::2]),
            drop=drop,
            save_qk=save_qk,
            interpret=triton.interpreted(),
        )
    else:
        qk = _norm_rope_forward(qkv_BTC, bias, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads)
        forward = flash.forward
        if kernels is hopper_wide:
            forward = functools.partial(hopper_wide.forward, interpret=triton.interpreted())
        o_BTHN, lse_BHT = forward(*qk, qkv_BTGN, bias.reshape(-1, n), drop=drop)
    saved = qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, *qk, o_BTHN, lse_BHT
    return o_BTHN.reshape(b, t - drop, -1), saved


@jax.named_scope(ATTENTION)
def _fused_backward(num_heads, drop, hopper, saved, do_BTD):
    qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, q_BTHN, k_BTHN, o_BTHN, lse_BHT = saved
    b, t, _, n = k_BTHN.shape
    bias = bias_C.astype(qkv_BTC.dtype)
    backward, kernels = flash.backward, _hopper_kernels(t, drop, n) if hopper else None
    if kernels and not no_hopper_backward(t, n):
        module = hopper_wide if kernels is hopper_wide else hopper_backward
        backward = functools.partial(module.backward, interpret=triton.interpreted())
    dq_BTHN, dk_BTHN, dqkv_BTGN, dbias_v = backward(
        *(q_BTHN, k_BTHN, qkv_BTC.reshape(b, t, -1, n), bias.reshape(-1, n), o_BTHN, lse_BHT, do_BTD.reshape(o_BTHN.shape))
    )
    norm_rope_backward = _norm_rope_backward
    if hopper and not hopper_rope.unsupported(t, n, num_heads):
        norm_rope_backward = _norm_rope_backward_on_hopper
    dqkv_BTC, dbias_qk, dweight_q, dweight_k = norm_rope_backward(
        *(dqkv_BTGN, dq_BTHN, dk_BTHN, qkv_BTC, bias, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads)
    )
    # The barrier keeps XLA from computing both column sums inside the concatenation, at a tenth of their speed.
    sums = jax.lax.optimization_barrier((dbias_qk.reshape(-1), dbias_v.reshape(-1)))
    dbias = jnp.concatenate(sums).astype(bias_C.dtype)
    return dqkv_BTC, dbias, dweight_q.astype(q_weight_N.dtype), dweight_k.astype(k_weight_N.dtype), None, None


_fused.defvjp(_fused_forward, _fused_backward)


@jax.named_scope(ROPE)
def _norm_rope_backward_on_hopper(
    dqkv_BTGN, dq_BTHN, dk_BTHN, qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads
):
    """`_norm_rope_backward` by `hopper_rope`."""
    qkv_BTGN, bias_GN = qkv_BTC.reshape(dqkv_BTGN.shape), bias_C.reshape(dqkv_BTGN.shape[2:])
    dqkv_BTGN, *rest = hopper_rope.backward(
        *(dqkv_BTGN, dq_BTHN, dk_BTHN, qkv_BTGN, bias_GN, q_weight_N, k_weight_N, cos_TN[:, ::2], sin_TN[:, ::2]),
        interpret=triton.interpreted(),
    )
    return dqkv_BTGN.reshape(qkv_BTC.shape), *rest


def _halves(array: jax.Array, n: int) -> jax.Array:
    """(..., groups * n) or (..., groups, n) -> (..., groups, 2, n/2): first and second members of the pairs."""
    if array.shape[-1] != n:
        array = array.reshape(*array.shape[:-1], -1, n)
    return array.reshape(*array.shape[:-1], 2, n // 2)


def _head_group(num_heads: int, most: int) -> int:
    """Heads that one program takes: the largest power of two up to `most` that divides their number."""
    return math.gcd(num_heads, most)


@jax.named_scope(ROPE)
def _norm_rope_forward(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads):
    """Bias, RMSNorm and RoPE of queries and keys: (B, T, C) -> q, k, each (B, T, H, N) in the compute type."""
    b, t, c = qkv_BTC.shape
    n = c // (3 * num_heads)
    heads = _head_group(num_heads, FORWARD["heads"])
    rows, spans = FORWARD["rows"], triton.spans(n // 2, waste=0.4)

    def kernel(qkv_ref, bias_ref, q_weight_ref, k_weight_ref, cos_ref, sin_ref, q_ref, k_ref):
        image, r, group = pl.program_id(0), triton.tile(pl.program_id(1), rows, t), pl.program_id(2) * heads
        columns, own = triton.at_run_time(spans), Span(group, heads)
        cos, sin = ([load(ref, r, c)[:, None] for c in columns] for ref in (cos_ref, sin_ref))
        for part, (weight_ref, out_ref) in enumerate(((q_weight_ref, q_ref), (k_weight_ref, k_ref))):
            slots = Span(part * num_heads + group, heads)
            x = [
                [load(qkv_ref, image, r, slots, half, c) + load(bias_ref, slots, half, c)[None] for c in columns]
                for half in (0, 1)
            ]
            rstd = jax.lax.rsqrt(_sum_of_squares(*x) / n + EPS)
            for j, c in enumerate(columns):
                first, second = (x[half][j] * rstd * load(weight_ref, half, c) for half in (0, 1))
                store(out_ref, image, r, own, 0, c, value=first * cos[j] - second * sin[j])
                store(out_ref, image, r, own, 1, c, value=second * cos[j] + first * sin[j])

    q_or_k = ((b, t, num_heads, 2, n // 2), qkv_BTC.dtype)
    q, k = triton.call(
        kernel,
        *(_halves(array, n) for array in (qkv_BTC, bias_C, q_weight_N, k_weight_N)),
        *(cos_TN[:, ::2].astype(f32), sin_TN[:, ::2].astype(f32)),
        scope=ROPE,
        name="forward",
        grid=(b, -(-t // rows), num_heads // heads),
        out=[q_or_k, q_or_k],
        warps=FORWARD["warps"],
    )
    return q.reshape(b, t, num_heads, n), k.reshape(b, t, num_heads, n)


def _sum_of_squares(first: list[jax.Array], second: list[jax.Array]) -> jax.Array:
    """Over the features of each head; spans are (rows, heads, columns), the result (rows, heads, 1)."""
    return sum(jnp.sum(x * x, axis=2, keepdims=True) for x in (*first, *second))


@jax.named_scope(ROPE)
def _norm_rope_backward(dqkv_BTGN, dq_BTHN, dk_BTHN, qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads):
    """Backward pass of RoPE, RMSNorm and bias for queries and keys; writes their two thirds of dqkv in place.

    RoPE is a rotation, so its gradient g = (dq rotated back). With x = qkv + bias, r = 1 / rms(x), xhat = x r:

        dxhat = g * weight        dx = r (dxhat - xhat * mean(dxhat * xhat))
        dweight = sum of g * xhat over tokens and heads        dbias = sum of dx over tokens

    Returns:
      dqkv_BTC; dbias (2H, N) float32; dweight of q and of k, (N,) float32.
    """
    b, t, c = qkv_BTC.shape
    n = c // (3 * num_heads)
    heads = _head_group(num_heads, BACKWARD["heads"])
    spans = triton.spans(n // 2, waste=0.4)
    wide = sum(span.size for span in spans) > 32  # with as many rows these spill: at 80 features 2.3 times the time
    rows = BACKWARD["rows"] // 2 if wide else BACKWARD["rows"]
    tokens = triton.chunk(t, BACKWARD["tokens"], rows)
    chunks = -(-t // tokens)

    def kernel(_, dq_ref, dk_ref, qkv_ref, bias_ref, q_weight_ref, k_weight_ref, cos_ref, sin_ref, *outputs):
        dqkv_ref, dbias_ref, dweight_ref = outputs
        image, chunk, group = pl.program_id(0), pl.program_id(1), pl.program_id(2) * heads
        columns, own = triton.at_run_time(spans), Span(group, heads)
        for part, (weight_ref, gradient_ref) in enumerate(((q_weight_ref, dq_ref), (k_weight_ref, dk_ref))):
            slots = Span(part * num_heads + group, heads)
            bias, weight = (
                [[load(ref, *index, half, c)[None] for c in columns] for half in (0, 1)]
                for ref, index in ((bias_ref, (slots,)), (weight_ref, ()))
            )

            def body(i, sums, part=part, slots=slots, bias=bias, weight=weight, gradient_ref=gradient_ref):
                # Masked rows load as zeros (their cosines and sines too) and add nothing to dweight; dx is 0 there.
                r = Span(chunk * tokens + i * rows, rows, t if t % tokens else None)
                # All loads come before the first sum, which would make them wait.
                x = [[load(qkv_ref, image, r, slots, half, c) for c in columns] for half in (0, 1)]
                d = [[load(gradient_ref, image, r, own, half, c) for c in columns] for half in (0, 1)]
                angles = [(load(cos_ref, r, c)[:, None], load(sin_ref, r, c)[:, None]) for c in columns]
                xhat = [[x[half][j] + bias[half][j] for j in range(len(columns))] for half in (0, 1)]
                rstd = jax.lax.rsqrt(_sum_of_squares(*xhat) / n + EPS)
                xhat = [[x * rstd for x in half] for half in xhat]
                dxhat, dweight, mean = [[], []], [[], []], 0.0
                for j, (cos, sin) in enumerate(angles):
                    d0, d1 = d[0][j], d[1][j]
                    for half, g in enumerate((d0 * cos + d1 * sin, d1 * cos - d0 * sin)):
                        dweight[half].append(jnp.sum(g * xhat[half][j], 0))
                        dxhat[half].append(g * weight[half][j])
                        mean += jnp.sum(dxhat[half][j] * xhat[half][j], axis=2, keepdims=True) / n
                new = []
                for half in (0, 1):
                    for j, c in enumerate(columns):
                        dx = rstd * (dxhat[half][j] - xhat[half][j] * mean)
                        store(dqkv_ref, image, r, slots, half, c, value=dx)
                        old = sums[len(new)]
                        new.append((old[0] + jnp.sum(dx, 0), old[1] + dweight[half][j]))
                return tuple(new)

            zeros = tuple((jnp.zeros((heads, c.size), f32),) * 2 for _ in (0, 1) for c in columns)
            sums = jax.lax.fori_loop(0, tokens // rows, body, zeros)
            for k, (dbias, dweight) in enumerate(sums):
                half, c = k // len(columns), columns[k % len(columns)]
                store(dbias_ref, image, chunk, slots, half, c, value=dbias)
                store(dweight_ref, image, chunk, pl.program_id(2), part, half, c, value=jnp.sum(dweight, 0))

    groups = num_heads // heads
    dqkv, dbias, dweight = triton.call(
        kernel,
        *(_halves(array, n) for array in (dqkv_BTGN, dq_BTHN, dk_BTHN, qkv_BTC, bias_C, q_weight_N, k_weight_N)),
        *(cos_TN[:, ::2].astype(f32), sin_TN[:, ::2].astype(f32)),
        scope=ROPE,
        name="backward",
        grid=(b, chunks, groups),
        out=[
            ((b, t, 3 * num_heads, 2, n // 2), qkv_BTC.dtype),
            ((b, chunks, 2 * num_heads, 2, n // 2), f32),
            ((b, chunks, groups, 2, 2, n // 2), f32),
        ],
        warps=BACKWARD["warps"],
        aliases={0: 0},
    )
    dweight_q, dweight_k = dweight.reshape(-1, 2, n).sum(0)
    return dqkv.reshape(b, t, c), dbias.sum((0, 1)), dweight_q, dweight_k
