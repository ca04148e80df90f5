"""Gated residual, RMSNorm and adaLN modulation: the chain between an output projection and the next input projection.

Shapes: x_BTD, branch_BTD, h_BTD activations in the compute type; gate_BD, shift_BD, scale_BD per image, compute type;
bias_D, weight_D float32 parameters.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from jitjax.kernels import hopper_norm, mosaic, triton
from jitjax.kernels.constants import EPS, NORM
from jitjax.kernels.triton import load, store

f32 = jnp.float32


@jax.named_scope(NORM)
def plain_gated_residual(x_BTD: jax.Array, branch_BTD: jax.Array, bias_D: jax.Array, gate_BD: jax.Array) -> jax.Array:
    """x + gate * (branch + bias), computed in float32 and rounded to the type of x."""
    update = gate_BD[:, None].astype(f32) * (branch_BTD.astype(f32) + bias_D.astype(f32))
    return (x_BTD.astype(f32) + update).astype(x_BTD.dtype)


@jax.named_scope(NORM)
def plain_norm_modulate(x_BTD: jax.Array, weight_D: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """RMSNorm(x) * weight * (1 + scale) + shift, computed in float32 and rounded to the type of x."""
    x32 = x_BTD.astype(f32)
    xhat = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)
    h = xhat * weight_D.astype(f32) * (1 + scale_BD[:, None].astype(f32)) + shift_BD[:, None].astype(f32)
    return h.astype(x_BTD.dtype)


@jax.named_scope(NORM)
def plain_residual_norm_modulate(
    x_BTD: jax.Array,
    branch_BTD: jax.Array,
    bias_D: jax.Array,
    gate_BD: jax.Array,
    weight_D: jax.Array,
    shift_BD: jax.Array,
    scale_BD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The new residual stream x + gate * (branch + bias) and its normalised, modulated value, both for the tokens of the
    branch: where it has fewer than x, the first ones of x are dropped."""
    x_BTD = plain_gated_residual(x_BTD[:, x_BTD.shape[1] - branch_BTD.shape[1] :], branch_BTD, bias_D, gate_BD)
    return x_BTD, plain_norm_modulate(x_BTD, weight_D, shift_BD, scale_BD)


# ---------------------------------------------------------------- fused
#
# On Hopper `hopper_norm` has the two kernels, where it takes the shapes. In Triton, one program takes a chunk of `tokens`
# tokens of an image and loops over them `rows` at a time with whole rows in registers, so that per-image vectors are read once
# and column sums stay in registers until the end.

FORWARD = dict(rows=2, tokens=32, warps=4, waste=0.25)
BACKWARD = dict(rows=2, tokens=48, warps=4, waste=0.25)


def _walk(tiling: dict, t: int, width: int):
    """The spans of a row, tokens a program takes, and a function from (chunk, step) to the rows of that step."""
    rows = tiling["rows"]
    tokens = triton.chunk(t, tiling["tokens"], rows)

    def rows_at(chunk, i):
        return triton.Span(chunk * tokens + i * rows, rows, t if t % tokens else None)

    return triton.spans(width, waste=tiling["waste"]), tokens, rows_at


def _row_sum(terms: list[jax.Array]) -> jax.Array:
    """Sum over all spans of each row, (rows, 1)."""
    return sum(jnp.sum(term, axis=1, keepdims=True) for term in terms)


def _on_hopper(tokens: int, width: int, dropped: int) -> bool:
    return mosaic.hopper() and not hopper_norm.unsupported(tokens, width, dropped)


@jax.named_scope(NORM)
def _forward(x_BTD, weight_D, shift_BD, scale_BD, residual=None):
    """Norm and modulation, after adding the gated branch where `residual` = (branch_BTD, bias_D, gate_BD) is given."""
    b, t, d = x_BTD.shape if residual is None else residual[0].shape
    dropped = x_BTD.shape[1] - t
    if _on_hopper(t, d, dropped):
        return hopper_norm.forward(x_BTD, weight_D, shift_BD, scale_BD, residual)
    spans, tokens, rows_at = _walk(FORWARD, t, d)

    def kernel(x_ref, weight_ref, shift_ref, scale_ref, *refs):
        image, chunk, columns = pl.program_id(0), pl.program_id(1), triton.at_run_time(spans)
        shift = [load(shift_ref, image, c) for c in columns]
        gain = [load(weight_ref, c) * (1 + load(scale_ref, image, c)) for c in columns]
        if residual is not None:
            branch_ref, bias_ref, gate_ref, x_out_ref, h_ref = refs
            bias, gate = [load(bias_ref, c) for c in columns], [load(gate_ref, image, c) for c in columns]
        else:
            (h_ref,) = refs

        def body(i, _):
            r = rows_at(chunk, i)
            x = [load(x_ref, image, triton.later(r, dropped), c) for c in columns]
            if residual is not None:
                branch = [load(branch_ref, image, r, c) for c in columns]
                x = [a + g * (o + bb) for a, g, o, bb in zip(x, gate, branch, bias, strict=True)]
                for a, c in zip(x, columns, strict=True):
                    store(x_out_ref, image, r, c, value=a)
            rstd = jax.lax.rsqrt(_row_sum([a * a for a in x]) / d + EPS)
            for a, g, s, c in zip(x, gain, shift, columns, strict=True):
                store(h_ref, image, r, c, value=a * rstd * g + s)
            return 0

        jax.lax.fori_loop(0, tokens // FORWARD["rows"], body, 0)

    return triton.call(
        kernel,
        *(x_BTD, weight_D, shift_BD, scale_BD),
        *(residual or ()),
        scope=NORM,
        name="forward" if residual is None else "residual_forward",
        grid=(b, -(-t // tokens)),
        out=[((b, t, d), x_BTD.dtype)] * (1 if residual is None else 2),
        warps=FORWARD["warps"],
    )


@jax.named_scope(NORM)
def _backward(x_BTD, weight_D, scale_BD, dh_BTD, residual=None, dropped=0):
    """Backward pass of norm and modulation and, where `residual` is given, of the gated addition before them.

    With r = 1 / rms(x) and xhat = x r, h = xhat * gain + shift and gain = weight (1 + scale):

        dxhat = dh * gain
        dx    = r (dxhat - xhat * mean(dxhat * xhat)) + dx_out        mean over the row; dx_out comes along the residual
        dbranch = gate * dx

    Every other gradient is a sum over tokens, and four sums per image hold them all (the last two with `residual`):

        dshift = S0 = sum dh              dscale = weight * S1, dweight = sum over images of (1 + scale) * S1
        S1 = sum dh * xhat                dgate = S2 = sum dx * (branch + bias)
        dbias = sum over images of gate * S3, S3 = sum dx

    Args:
      x_BTD: the residual stream that was normalised (the output of the addition).
      residual: None or (branch_BTD, bias_D, gate_BD, dx_out_BTD); the last is left out where it is zero.
      dropped: tokens that the input of the addition had before these.

    Returns:
      dx_BTD (zero for the dropped tokens), dbranch_BTD (None without `residual`), sums (B, 4 or 2, D) float32.
    """
    b, t, d = x_BTD.shape
    if _on_hopper(t, d, dropped):
        return hopper_norm.backward(x_BTD, weight_D, scale_BD, dh_BTD, residual, dropped=dropped)
    spans, tokens, rows_at = _walk(BACKWARD, t, d)
    n_sums = 2 if residual is None else 4
    chunks = -(-t // tokens)

    def kernel(x_ref, weight_ref, scale_ref, dh_ref, *refs):
        image, chunk, columns = pl.program_id(0), pl.program_id(1), triton.at_run_time(spans)
        gain = [load(weight_ref, c) * (1 + load(scale_ref, image, c)) for c in columns]
        if residual is not None:
            branch_ref, bias_ref, gate_ref, *dx_out_ref, dx_ref, dbranch_ref, sums_ref = refs
            bias, gate = [load(bias_ref, c) for c in columns], [load(gate_ref, image, c) for c in columns]
        else:
            dx_ref, sums_ref = refs

        def body(i, sums):
            # All loads come before the first row sum, so that they overlap: after it they would wait for it (a warp issues
            # in order), which cost 30% of this kernel. Masked rows load as zeros and add nothing.
            r = rows_at(chunk, i)
            x = [load(x_ref, image, r, c) for c in columns]
            dh = [load(dh_ref, image, r, c) for c in columns]
            if residual is not None:
                dx_out = [load(dx_out_ref[0], image, r, c) for c in columns] if dx_out_ref else None
                branch = [load(branch_ref, image, r, c) for c in columns]
            rstd = jax.lax.rsqrt(_row_sum([a * a for a in x]) / d + EPS)
            xhat = [a * rstd for a in x]
            dxhat = [a * g for a, g in zip(dh, gain, strict=True)]
            mean = _row_sum([a * e for a, e in zip(dxhat, xhat, strict=True)]) / d
            new = []
            for j, c in enumerate(columns):
                dx = rstd * (dxhat[j] - xhat[j] * mean)
                terms = [dh[j], dh[j] * xhat[j]]
                if residual is not None:
                    dx = dx if dx_out is None else dx + dx_out[j]
                    store(dbranch_ref, image, r, c, value=dx * gate[j])
                    terms += [dx * (branch[j] + bias[j]), dx]
                store(dx_ref, image, triton.later(r, dropped), c, value=dx)
                new.append(tuple(s + jnp.sum(term, 0) for s, term in zip(sums[j], terms, strict=True)))
            return tuple(new)

        zeros = tuple((jnp.zeros((c.size,), f32),) * n_sums for c in columns)
        sums = jax.lax.fori_loop(0, tokens // BACKWARD["rows"], body, zeros)
        for c, of_columns in zip(columns, sums, strict=True):
            for k, s in enumerate(of_columns):
                store(sums_ref, image, chunk, k, c, value=s)
        for r in triton.share(chunk, chunks, dropped, BACKWARD["rows"]):
            for c in columns:
                store(dx_ref, image, r, c, value=jnp.zeros((r.size, c.size), f32))

    outputs = [((b, t + dropped, d), x_BTD.dtype), ((b, t, d), x_BTD.dtype)][: 1 if residual is None else 2]
    *gradients, sums = triton.call(
        kernel,
        *(x_BTD, weight_D, scale_BD, dh_BTD),
        *(residual or ()),
        scope=NORM,
        name="backward" if residual is None else "residual_backward",
        grid=(b, chunks),
        out=[*outputs, ((b, chunks, n_sums, d), f32)],
        warps=BACKWARD["warps"],
    )
    return gradients[0], gradients[1] if residual is not None else None, sums.sum(1)


def _modulation_gradients(sums_BKD, weight_D, scale_BD):
    """dweight, dshift, dscale from the first two sums of `_backward`."""
    dshift, dh_xhat = sums_BKD[:, 0], sums_BKD[:, 1]
    dweight = (dh_xhat * (1 + scale_BD.astype(f32))).sum(0).astype(weight_D.dtype)
    return dweight, dshift.astype(scale_BD.dtype), (dh_xhat * weight_D.astype(f32)).astype(scale_BD.dtype)


def _branch_gradients(dx_branch_BD, dx_BD, bias_D, gate_BD):
    """dbias and dgate from the sums over tokens of dx * (branch + bias) and of dx."""
    return (gate_BD.astype(f32) * dx_BD).sum(0).astype(bias_D.dtype), dx_branch_BD.astype(gate_BD.dtype)


@jax.named_scope(NORM)
def fused_residual_norm_modulate(x_BTD, branch_BTD, bias_D, gate_BD, weight_D, shift_BD, scale_BD):
    """`plain_residual_norm_modulate` as one kernel forward and one backward (`_backward` has the mathematics)."""
    dropped = x_BTD.shape[1] - branch_BTD.shape[1]
    return _residual_norm_modulate(dropped, x_BTD, branch_BTD, bias_D, gate_BD, weight_D, shift_BD, scale_BD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_norm_modulate(dropped, x_BTD, branch_BTD, bias_D, gate_BD, weight_D, shift_BD, scale_BD):
    return tuple(_forward(x_BTD, weight_D, shift_BD, scale_BD, (branch_BTD, bias_D, gate_BD)))


@jax.named_scope(NORM)
def _rnm_forward(dropped, *primals):
    x_BTD, branch_BTD, bias_D, gate_BD, weight_D, shift_BD, scale_BD = (primal.value for primal in primals)
    x_BTD, h_BTD = _forward(x_BTD, weight_D, shift_BD, scale_BD, (branch_BTD, bias_D, gate_BD))
    return (x_BTD, h_BTD), (x_BTD, branch_BTD, bias_D, gate_BD, weight_D, scale_BD)


@jax.named_scope(NORM)
def _rnm_backward(dropped, saved, cotangents):
    x_BTD, branch_BTD, bias_D, gate_BD, weight_D, scale_BD = saved
    dx_out_BTD, dh_BTD = cotangents
    if isinstance(dh_BTD, SymbolicZero):
        dh_BTD = jnp.zeros(dh_BTD.shape, dh_BTD.dtype)
    # After the last norm nothing uses the residual stream; its zero gradient is then neither written nor read.
    residual = branch_BTD, bias_D, gate_BD, *(() if isinstance(dx_out_BTD, SymbolicZero) else (dx_out_BTD,))
    dx_BTD, dbranch_BTD, sums = _backward(x_BTD, weight_D, scale_BD, dh_BTD, residual, dropped)
    branch_gradients = _branch_gradients(sums[:, 2], sums[:, 3], bias_D, gate_BD)
    return dx_BTD, dbranch_BTD, *branch_gradients, *_modulation_gradients(sums, weight_D, scale_BD)


_residual_norm_modulate.defvjp(_rnm_forward, _rnm_backward, symbolic_zeros=True)


@jax.custom_vjp
def fused_norm_modulate(x_BTD, weight_D, shift_BD, scale_BD):
    """`plain_norm_modulate` as one kernel forward and one backward."""
    return _forward(x_BTD, weight_D, shift_BD, scale_BD)[0]


@jax.named_scope(NORM)
def _nm_forward(x_BTD, weight_D, shift_BD, scale_BD):
    return fused_norm_modulate(x_BTD, weight_D, shift_BD, scale_BD), (x_BTD, weight_D, scale_BD)


@jax.named_scope(NORM)
def _nm_backward(saved, dh_BTD):
    x_BTD, weight_D, scale_BD = saved
    dx_BTD, _, sums = _backward(x_BTD, weight_D, scale_BD, dh_BTD)
    return dx_BTD, *_modulation_gradients(sums, weight_D, scale_BD)


fused_norm_modulate.defvjp(_nm_forward, _nm_backward)


@jax.custom_vjp
def fused_gated_residual(x_BTD, branch_BTD, bias_D, gate_BD):
    """`plain_gated_residual` with a fused backward. Forward stays with XLA, which fuses it into its consumer (the
    insertion of the context tokens); its own backward would take two more passes for the sums over tokens."""
    return plain_gated_residual(x_BTD, branch_BTD, bias_D, gate_BD)


@jax.named_scope(NORM)
def _gr_backward(saved, dx_BTD):
    """dbranch = gate * dx and the last two sums of `_backward`."""
    branch_BTD, bias_D, gate_BD = saved
    b, t, d = dx_BTD.shape
    spans, tokens, rows_at = _walk(BACKWARD, t, d)

    def kernel(branch_ref, bias_ref, gate_ref, dx_ref, dbranch_ref, sums_ref):
        image, chunk, columns = pl.program_id(0), pl.program_id(1), triton.at_run_time(spans)
        bias, gate = [load(bias_ref, c) for c in columns], [load(gate_ref, image, c) for c in columns]

        def body(i, sums):
            r, new = rows_at(chunk, i), []
            for j, c in enumerate(columns):
                dx = load(dx_ref, image, r, c)
                store(dbranch_ref, image, r, c, value=dx * gate[j])
                with_branch = dx * (load(branch_ref, image, r, c) + bias[j])
                new.append((sums[j][0] + jnp.sum(with_branch, 0), sums[j][1] + jnp.sum(dx, 0)))
            return tuple(new)

        zeros = tuple((jnp.zeros((c.size,), f32),) * 2 for c in columns)
        sums = jax.lax.fori_loop(0, tokens // BACKWARD["rows"], body, zeros)
        for c, of_columns in zip(columns, sums, strict=True):
            for k, s in enumerate(of_columns):
                store(sums_ref, image, chunk, k, c, value=s)

    chunks = -(-t // tokens)
    dbranch_BTD, sums = triton.call(
        kernel,
        *(branch_BTD, bias_D, gate_BD, dx_BTD),
        scope=NORM,
        name="gated_residual_backward",
        grid=(b, chunks),
        out=[(dx_BTD.shape, dx_BTD.dtype), ((b, chunks, 2, d), f32)],
        warps=BACKWARD["warps"],
    )
    sums = sums.sum(1)
    return dx_BTD, dbranch_BTD, *_branch_gradients(sums[:, 0], sums[:, 1], bias_D, gate_BD)


@jax.named_scope(NORM)
def _gr_forward(x_BTD, branch_BTD, bias_D, gate_BD):
    return plain_gated_residual(x_BTD, branch_BTD, bias_D, gate_BD), (branch_BTD, bias_D, gate_BD)


fused_gated_residual.defvjp(_gr_forward, _gr_backward)
