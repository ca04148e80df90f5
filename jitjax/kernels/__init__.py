"""The five operations that JiT is written on, each as plain jnp and as fused GPU kernels with the same result.

Everything but the matmuls of a transformer block is bound by memory bandwidth. XLA alone reads and writes the activations
several times between two matmuls; here each such chain is one operation, one pass over memory forward and one backward:

    qkv_attention            bias, query/key norm, RoPE, softmax attention        between the qkv and output projections
    residual_norm_modulate   bias, gate, residual, RMSNorm, adaLN modulation      between proj and w12, w3 and the next qkv
    mlp                      w12, bias, silu(a) * b, w3: on Hopper inside the matmul kernels, else between them
    norm_modulate, gated_residual    the two ends of the chain that stand alone at the first block and where tokens are added

Kernels for Hopper are in `hopper_forward`, `hopper_backward`, `hopper_wide` and `hopper_rope` (attention), `hopper_norm` and
`hopper_swiglu`, on Pallas' Mosaic GPU backend (`mosaic`); those for what these do not take, and for other cards, on its
Triton backend (`triton`, `flash`, `attention`, `norm`, `swiglu`). Dropout is in `masks`.

The biases of all projections belong to the operations, so the same pass computes their gradients.

Shape letters as in `jitjax.model`: B images, T tokens, D width, H heads, N head dimension, F SwiGLU hidden width, C = 3*D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jitjax.errors import UserError
from jitjax.kernels import attention, norm, pack, swiglu, triton
from jitjax.kernels.attention import qkv_attention_with_dropout
from jitjax.kernels.masks import dropout

__all__ = ["Ops", "dropout", "get_ops", "qkv_attention_with_dropout", "resolve", "with_visible_matmuls"]


@dataclasses.dataclass(frozen=True)
class Ops:
    """One implementation of the operations. Hashable, so it can be a static argument of `jax.jit`.

    Activations, branches and modulation vectors are in the compute type (float32, bfloat16, float16), biases and norm
    weights are float32 parameters. Statistics, sums and softmax are float32 whatever the compute type.

    residual_norm_modulate(x_BTD, branch_BTD, bias_D, gate_BD, weight_D, shift_BD, scale_BD) -> (x_BTD, h_BTD)
        x + gate * (branch + bias), rounded to the compute type; h = RMSNorm(x) * weight * (1 + scale) + shift.
        A branch of fewer tokens belongs to the last tokens of x; those before are dropped.
    norm_modulate(x_BTD, weight_D, shift_BD, scale_BD) -> h_BTD
    gated_residual(x_BTD, branch_BTD, bias_D, gate_BD) -> x_BTD
    mlp(h_BTD, w12_DF2, bias_F2, w3_FD, rate=0.0, keys_B=None) -> BTD
        h @ w12 + bias split into [a | b]; silu(a) * b; dropout of that at `rate`, if there are keys (one an image); @ w3.
    qkv_attention(qkv_BTC, bias_C, q_weight_N, k_weight_N, cos_TN, sin_TN, num_heads, drop=0) -> B(T-drop)D
        bias; split q | k | v, each heads x head_dim; RMSNorm of q and k over the head; RoPE; softmax(q k^T / sqrt(N)) v.
        The first `drop` tokens are keys and values only. cos_TN and sin_TN hold each angle twice in a row (published
        interleaved RoPE); constants, no gradient.
    prepare_qkv(kernel_DC, bias_C, q_weight_N, k_weight_N, num_heads) -> the same four
        Reorders the columns of published weights as this implementation's `qkv_attention` expects them: a permutation within
        each head of q and k. Applied to the weights, before the matmul, where it is cheap.
    packing.pack(parts, dtype) -> (R, S)
    packing.unpack(packed_RS, sizes) -> [(R, size), ...]
        Arrays (R, ...), or (1, ...) for all rows, one behind the other on their way to R devices (`jitjax.exchange`), and
        apart again; no operations of the network.
    """

    residual_norm_modulate: Callable[..., tuple[jax.Array, jax.Array]]
    norm_modulate: Callable[..., jax.Array]
    gated_residual: Callable[..., jax.Array]
    mlp: Callable[..., jax.Array]
    qkv_attention: Callable[..., jax.Array]
    prepare_qkv: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]
    packing: pack.Packing


PLAIN = Ops(
    residual_norm_modulate=norm.plain_residual_norm_modulate,
    norm_modulate=norm.plain_norm_modulate,
    gated_residual=norm.plain_gated_residual,
    mlp=swiglu.plain_mlp,
    qkv_attention=attention.plain_qkv_attention,
    prepare_qkv=lambda kernel, bias, q_weight, k_weight, num_heads: (kernel, bias, q_weight, k_weight),
    packing=pack.PLAIN,
)


FUSED = Ops(
    residual_norm_modulate=norm.fused_residual_norm_modulate,
    norm_modulate=norm.fused_norm_modulate,
    gated_residual=norm.fused_gated_residual,
    mlp=swiglu.fused_mlp,
    qkv_attention=attention.fused_qkv_attention,
    prepare_qkv=attention.prepare_qkv,
    packing=pack.FUSED,
)


def with_visible_matmuls(ops: Ops) -> Ops:
    """The same operations with every matmul left to XLA, where a rematerialisation policy can see it."""
    return dataclasses.replace(ops, mlp=swiglu.separate_mlp) if ops == FUSED else ops


def get_ops(name: str) -> Ops:
    """The operations by name: "plain" or "fused" (what `resolve` returned).

    Where the program is not compiled for a GPU, the fused operations run in an interpreter: right, and very slow.

    Raises:
      ValueError: another name.
    """
    if name not in ("plain", "fused"):
        raise ValueError(f"kernels must be 'plain' or 'fused', not {name!r}")
    return PLAIN if name == "plain" else FUSED


def resolve(
    kernels: str,
    *,
    dtype: Any,
    geometry: Any,
    device: jax.Device | None = None,
) -> tuple[str, str]:
    """Which implementation a run uses and, in words, why: ("plain" | "fused", reason).

    The fused kernels take any batch size, number of tokens, width and SwiGLU width, and head dimensions up to 128. Attention
    has kernels of its own for Hopper, which take fewer shapes; the reason names a fallback.

    Args:
      kernels: "auto" (fused where it is known to be faster, else plain), "fused" (or say why not) or "plain".
      dtype: compute type of the activations.
      geometry: the model's, a `jitjax.geometry.Geometry`.
      device: the one that the run uses; default the first.

    Raises:
      UserError: "fused" was asked for and cannot run here, or `kernels` is none of the three.
    """
    if kernels not in ("auto", "fused", "plain"):
        raise UserError(f"--config.kernels={kernels!r} is unknown: use auto, fused or plain")
    if kernels == "plain":
        return "plain", "as configured"
    device = device or jax.local_devices()[0]
    obstacle = _obstacle(device, jnp.dtype(dtype), geometry.head_dim)
    if kernels == "fused":
        if obstacle:
            raise UserError(f"--config.kernels=fused cannot run here: {obstacle}; use --config.kernels=auto or plain")
        return "fused", f"as configured; {_attention(device, geometry)}"
    if not obstacle and _compute_capability(device) < 9.0:
        obstacle = f"{device.device_kind} is older than Hopper, where the kernels were tuned (try --config.kernels=fused)"
    if obstacle:
        return "plain", obstacle
    kinds = f"{device.device_kind}, {jnp.dtype(dtype).name}"
    return "fused", f"{kinds}; {_attention(device, geometry)}"


def _attention(device: jax.Device, geometry: Any) -> str:
    """Which fused kernels attention uses, in words."""
    if _compute_capability(device) != 9.0:
        return "attention by the Triton kernels (not a Hopper card)"
    tokens, context = geometry.tokens, geometry.context_length
    shapes = {(tokens, 0), (tokens + context, 0), (tokens + context, context)}
    reasons = sorted({attention.no_hopper(*shape, geometry.head_dim) for shape in shapes} - {""})
    if reasons:
        return f"attention by the Triton kernels for {', '.join(reasons)}"
    backward = sorted({attention.no_hopper_backward(t, geometry.head_dim) for t, _ in shapes} - {""})
    exception = f", backward by the Triton ones for {', '.join(backward)}" if backward else ""
    return f"attention by the Hopper kernels{exception}"


def _compute_capability(device: jax.Device) -> float:
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # not an NVIDIA card
        return 0.0


def _obstacle(device: jax.Device, dtype: Any, head_dim: int) -> str:
    """Why the fused kernels cannot run, or an empty string."""
    if device.platform != "gpu" or not _compute_capability(device):
        return f"fused kernels need an NVIDIA GPU and this is {device.device_kind}"
    if _compute_capability(device) < 8.0:
        return f"fused kernels need an Ampere card or newer and this is {device.device_kind}"
    if triton.UNAVAILABLE:
        return triton.UNAVAILABLE
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"fused kernels are for bfloat16 and float16, not {dtype.name}"
    if head_dim > 128:
        return f"fused attention takes head dimensions up to 128, not {head_dim}"
    return ""
