"""Flash attention that reads values from, and writes their gradient into, the fused qkv layout: three kernels.

The usual algorithm (Dao, arXiv 2205.14135 and 2307.08691), shaped by what was measured on an H200 at T = 256 and 288:

- Values are read in place from the qkv projection and their bias is added to the *output*: softmax rows sum to one. Their
  gradient is written in place into the gradient of the qkv projection, so nothing is split or concatenated.
- Tiles of 64 x 64 (forward) and 64 x 32 (backward) on 4 warps. Larger ones waste work at T = 288 (a library kernel with
  tiles of 128 pays for 384) and lower the occupancy that hides latency here.
- The backward pass is one kernel for dq and one for dk and dv, each recomputing the scores. It needs no atomic
  additions, so gradients are the same bit for bit from run to run.

The first `drop` tokens may have no output: then o, lse and do start after them, and dq is zero for them.

q_BTHN and k_BTHN are normalised, rotated and rounded to the compute type; qkv_BTGN is the qkv projection without bias, with
G = 3 H heads (queries, keys, values). Scores are in units of log2, since the hardware's exponential is 2^x.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jitjax.kernels import triton
from jitjax.kernels.constants import ATTENTION, LOG2E
from jitjax.kernels.triton import Span, load, store

f32 = jnp.float32
FORWARD = dict(rows=64, step=64, warps=4, stages=3)
BACKWARD_Q = dict(rows=64, step=32, warps=4, stages=3)
BACKWARD_KV = dict(rows=64, step=32, warps=4, stages=3)
SMALLEST_DOT = 16  # the matrix units take no smaller dimension
MASKED_SCORE = -1e30


def head_spans(head_dim: int) -> tuple[Span, ...]:
    """A head cut for the matrix units: 64 -> 64, 80 -> 64 + 16, 104 -> 64 + 32 + 16 (half of the last masked)."""
    return triton.spans(head_dim, smallest=SMALLEST_DOT)


def _dot(xs, ys):
    """Sum of x @ y.T over the spans of the head, in float32."""
    return sum(jnp.dot(x, y.T, preferred_element_type=f32) for x, y in zip(xs, ys, strict=True))


def _accumulate(sums, weights, xs):
    """sums + weights @ x for each span of the head."""
    return tuple(s + jnp.dot(weights, x, preferred_element_type=f32) for s, x in zip(sums, xs, strict=True))


def _loop(t: int, step: int, body, carry):
    """body(carry, span) over all spans of `step` tokens out of t; the last one is shorter, and masked, if it must be."""
    carry = jax.lax.fori_loop(0, t // step, lambda i, c: body(c, Span(i * step, step)), carry)
    rest = t % step
    if not rest:
        return carry
    size = max(SMALLEST_DOT, triton.power_of_two(rest))
    (last,) = triton.at_run_time([Span(t - rest, size, t if size > rest else None)])
    return body(carry, last)


def _keep(values, span: Span, axis: int, otherwise: float = 0.0):
    """`values` where the indices of `span` along `axis` exist."""
    exists = span.exists()
    return values if exists is None else jnp.where(jnp.expand_dims(exists, 1 - axis), values, otherwise)


def forward(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, drop=0):
    """Returns o_BTHN = softmax(q k^T / sqrt(N)) (v + bias) and lse_BHT, log2 of the softmax denominators, float32."""
    b, t, h, n = q_BTHN.shape
    tq = t - drop
    rows, dims, scale = FORWARD["rows"], head_spans(n), LOG2E / math.sqrt(n)

    def kernel(q_ref, k_ref, qkv_ref, bias_ref, o_ref, lse_ref):
        r, head, image = triton.tile(pl.program_id(0), rows, tq), pl.program_id(1), pl.program_id(2)
        columns = triton.at_run_time(dims)
        q = [load(q_ref, image, triton.later(r, drop), head, c, dtype=None) for c in columns]

        def body(carry, keys):
            o, top, total = carry
            k = [load(k_ref, image, keys, head, c, dtype=None) for c in columns]
            v = [load(qkv_ref, image, keys, 2 * h + head, c, dtype=None) for c in columns]
            scores = _keep(_dot(q, k), keys, 1, MASKED_SCORE)
            new_top = jnp.maximum(top, jnp.max(scores, 1) * scale)
            shrink, p = jnp.exp2(top - new_top), jnp.exp2(scores * scale - new_top[:, None])
            o = _accumulate([x * shrink[:, None] for x in o], p.astype(v[0].dtype), v)
            return o, new_top, total * shrink + jnp.sum(p, 1)

        zeros = tuple(jnp.zeros((rows, c.size), f32) for c in columns)
        start = zeros, jnp.full((rows,), MASKED_SCORE, f32), jnp.zeros((rows,), f32)
        o, top, total = _loop(t, FORWARD["step"], body, start)
        for x, c in zip(o, columns, strict=True):
            store(o_ref, image, r, head, c, value=x / total[:, None] + load(bias_ref, 2 * h + head, c))
        store(lse_ref, image, head, r, value=top + jnp.log2(total))

    return triton.call(
        kernel,
        *(q_BTHN, k_BTHN, qkv_BTGN, bias_GN),
        scope=ATTENTION,
        name="forward",
        grid=(-(-tq // rows), h, b),
        out=[((b, tq, h, n), q_BTHN.dtype), ((b, h, tq), f32)],
        warps=FORWARD["warps"],
        stages=FORWARD["stages"],
    )


def backward(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, o_BTHN, lse_BHT, do_BTHN):
    """Gradients of `forward`.

    With P the softmax weights (recomputed from lse), V = v + bias and S = q k^T / sqrt(N):

        dV = P^T do        dP = do V^T        dS = P * (dP - delta)        delta = rowsum(P * dP) = rowsum(do * o)
        dq = dS k / sqrt(N)                   dk = dS^T q / sqrt(N)

    The bias drops out of dS, being the same for every key: dP - delta is unchanged if both use v for V, and
    o - bias for o. dbias is the sum of do over tokens.

    Returns:
      dq_BTHN, dk_BTHN; dqkv_BTGN with the third of the values filled in and the rest not yet written; dbias_HN float32.
    """
    dq_BTHN, delta_BHT, dbias_HN = _backward_q(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, o_BTHN, lse_BHT, do_BTHN)
    dk_BTHN, dqkv_BTGN = _backward_kv(q_BTHN, k_BTHN, qkv_BTGN, lse_BHT, delta_BHT, do_BTHN)
    return dq_BTHN, dk_BTHN, dqkv_BTGN, dbias_HN


def _backward_q(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, o_BTHN, lse_BHT, do_BTHN):
    """One tile of queries against all keys: dq, and on the way delta and the sum of do."""
    b, t, h, n = q_BTHN.shape
    tq = do_BTHN.shape[1]
    drop = t - tq
    rows, dims, scale = BACKWARD_Q["rows"], head_spans(n), 1 / math.sqrt(n)
    tiles = -(-tq // rows)

    def kernel(q_ref, k_ref, qkv_ref, bias_ref, o_ref, lse_ref, do_ref, dq_ref, delta_ref, dbias_ref):
        tile, head, image = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        r, columns = triton.tile(tile, rows, tq), triton.at_run_time(dims)
        q = [load(q_ref, image, triton.later(r, drop), head, c, dtype=None) for c in columns]
        do = [load(do_ref, image, r, head, c, dtype=None) for c in columns]
        lse, delta = load(lse_ref, image, head, r), jnp.zeros((rows,), f32)
        for x, c in zip(do, columns, strict=True):
            without_bias = load(o_ref, image, r, head, c) - load(bias_ref, 2 * h + head, c)
            delta += jnp.sum(x.astype(f32) * without_bias, 1)
            store(dbias_ref, image, tile, head, c, value=jnp.sum(x.astype(f32), 0))
        store(delta_ref, image, head, r, value=delta)

        def body(dq, keys):
            k = [load(k_ref, image, keys, head, c, dtype=None) for c in columns]
            v = [load(qkv_ref, image, keys, 2 * h + head, c, dtype=None) for c in columns]
            p = jnp.exp2(_dot(q, k) * (scale * LOG2E) - lse[:, None])
            ds = _keep(p * (_dot(do, v) - delta[:, None]), keys, 1)
            return _accumulate(dq, ds.astype(k[0].dtype), k)

        dq = _loop(t, BACKWARD_Q["step"], body, tuple(jnp.zeros((rows, c.size), f32) for c in columns))
        for x, c in zip(dq, columns, strict=True):
            store(dq_ref, image, triton.later(r, drop), head, c, value=x * scale)
            for dropped in triton.share(tile, tiles, drop, SMALLEST_DOT):
                store(dq_ref, image, dropped, head, c, value=jnp.zeros((dropped.size, c.size), f32))

    dq, delta, dbias = triton.call(
        kernel,
        *(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, o_BTHN, lse_BHT, do_BTHN),
        scope=ATTENTION,
        name="backward_q",
        grid=(tiles, h, b),
        out=[(q_BTHN.shape, q_BTHN.dtype), ((b, h, tq), f32), ((b, tiles, h, n), f32)],
        warps=BACKWARD_Q["warps"],
        stages=BACKWARD_Q["stages"],
    )
    return dq, delta, dbias.sum((0, 1))


def _backward_kv(q_BTHN, k_BTHN, qkv_BTGN, lse_BHT, delta_BHT, do_BTHN):
    """One tile of keys and values against all queries, in transposed form (scores are keys x queries)."""
    b, t, h, n = q_BTHN.shape
    tq = do_BTHN.shape[1]
    rows, dims, scale = BACKWARD_KV["rows"], head_spans(n), 1 / math.sqrt(n)

    def kernel(q_ref, k_ref, qkv_ref, lse_ref, delta_ref, do_ref, dk_ref, dqkv_ref):
        r, head, image = triton.tile(pl.program_id(0), rows, t), pl.program_id(1), pl.program_id(2)
        columns = triton.at_run_time(dims)
        k = [load(k_ref, image, r, head, c, dtype=None) for c in columns]
        v = [load(qkv_ref, image, r, 2 * h + head, c, dtype=None) for c in columns]

        def body(carry, queries):
            dk, dv = carry
            q = [load(q_ref, image, triton.later(queries, t - tq), head, c, dtype=None) for c in columns]
            do = [load(do_ref, image, queries, head, c, dtype=None) for c in columns]
            lse, delta = load(lse_ref, image, head, queries), load(delta_ref, image, head, queries)
            # Masked queries load as zeros throughout: p is 1 there, times a zero do and a zero q.
            p = jnp.exp2(_dot(k, q) * (scale * LOG2E) - lse[None])
            dv = _accumulate(dv, p.astype(q[0].dtype), do)
            ds = p * (_dot(v, do) - delta[None])
            return _accumulate(dk, ds.astype(q[0].dtype), q), dv

        zeros = tuple(jnp.zeros((rows, c.size), f32) for c in columns)
        dk, dv = _loop(tq, BACKWARD_KV["step"], body, (zeros, zeros))
        for x, y, c in zip(dk, dv, columns, strict=True):
            store(dk_ref, image, r, head, c, value=x * scale)
            store(dqkv_ref, image, r, 2 * h + head, c, value=y)

    return triton.call(
        kernel,
        *(q_BTHN, k_BTHN, qkv_BTGN, lse_BHT, delta_BHT, do_BTHN),
        scope=ATTENTION,
        name="backward_kv",
        grid=(-(-t // rows), h, b),
        out=[(k_BTHN.shape, k_BTHN.dtype), (qkv_BTGN.shape, qkv_BTGN.dtype)],
        warps=BACKWARD_KV["warps"],
        stages=BACKWARD_KV["stages"],
    )
