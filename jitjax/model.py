"""JiT in flax.nnx: a plain vision transformer from a noised image to the clean image, in pixel space.

Source: "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720. Every number (epsilons, orders of
concatenation, initial scales) is the published implementation's, so that its weights give its outputs.

Shape letters used in array names, here and in `jitjax.kernels`:
    B images   T tokens (context tokens included)   D width   H heads   N head dimension   F SwiGLU hidden width
    C 3*D, the fused query|key|value width           S image side in pixels

Images are NHWC. The transformer is written once, on the five operations of `jitjax.kernels.Ops`; each has a plain
jnp implementation and a fused GPU one. A branch (attention or SwiGLU) leaves a block *without* its output bias, gate and
residual addition: they are `pending`, and merge with the next norm into one operation, one pass over memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jitjax import kernels
from jitjax.flops import CHANNELS, TIME_FEATURES
from jitjax.geometry import Geometry, make_geometry

Params = dict[str, jax.Array]  # {"blocks.0.attn.qkv.kernel": array, ...}
CLASS_HEAD = "class_head."


def without_class_head(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that draw images."""
    return {name: value for name, value in params.items() if not name.startswith(CLASS_HEAD)}


# ---------------------------------------------------------------- fixed tables


@functools.lru_cache(maxsize=16)
def position_table(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sin-cos positions, (grid*grid, width) float32. First half encodes the column, second half the row."""
    quarter = width // 4
    omega = 10000.0 ** -(np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.outer(np.arange(grid, dtype=np.float64), omega)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(axis, grid, axis=0), np.tile(axis, (grid, 1))
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


@functools.lru_cache(maxsize=16)
def rope_tables(head_dim: int, grid: int, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles, each (context_length + grid*grid, head_dim) float32.

    The first half of a head rotates with the row, the second half with the column; each angle is repeated for the
    adjacent pair that it rotates. Context tokens come first and are not rotated.
    """
    per_axis = head_dim // 2
    frequency = 10000.0 ** -(np.arange(0, per_axis, 2, dtype=np.float64) / per_axis)
    axis = np.repeat(np.outer(np.arange(grid, dtype=np.float64), frequency), 2, axis=1)
    rows, columns = np.repeat(axis, grid, axis=0), np.tile(axis, (grid, 1))
    angles = np.concatenate([rows, columns], axis=1)
    angles = np.concatenate([np.zeros((context_length, head_dim)), angles])
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def time_features(t_B: jax.Array) -> jax.Array:
    """Sinusoidal features of the raw time in [0, 1] (not scaled), (B, 256) float32: cosines first, then sines."""
    half = TIME_FEATURES // 2
    frequency = np.exp(-math.log(10000) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = t_B.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """(B, S, S, 3) -> (B, T, patch*patch*3); tokens row by row, values ordered (row in patch, column, channel)."""
    b, s, _, c = images.shape
    x = images.reshape(b, s // patch, patch, s // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (s // patch) ** 2, patch * patch * c)


def unpatchify(tokens: jax.Array, patch: int) -> jax.Array:
    """Inverse of `patchify`: (B, T, patch*patch*3) -> (B, S, S, 3)."""
    b, t, _ = tokens.shape
    grid = math.isqrt(t)
    x = tokens.reshape(b, grid, grid, patch, patch, CHANNELS)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, grid * patch, grid * patch, CHANNELS)


# ---------------------------------------------------------------- modules

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros
normal = nnx.initializers.normal(0.02)


def linear(n_in: int, n_out: int, rngs: nnx.Rngs, init=xavier, use_bias: bool = True) -> nnx.Linear:
    """An affine map with a (n_in, n_out) kernel, Xavier uniform unless `init` says otherwise, and a bias of zeros."""
    return nnx.Linear(n_in, n_out, kernel_init=init, bias_init=zeros, use_bias=use_bias, rngs=rngs)


def matmul(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """x @ kernel in the type of x, without the bias (the fused operations add it)."""
    return x @ layer.kernel[...].astype(x.dtype)


def affine(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """x @ kernel + bias in the type of x."""
    return matmul(layer, x) + layer.bias[...].astype(x.dtype)


def modulations(layer: nnx.Linear, c_BD: jax.Array, parts: int, product_BP: jax.Array | None = None) -> list[jax.Array]:
    """`affine`, cut into equal parts along the last axis. The bias is added part by part, which XLA makes one kernel of.
    `product_BP` is `matmul(layer, c_BD)` where that has been computed already."""
    x_BP = matmul(layer, c_BD) if product_BP is None else product_BP
    bias_BP = jnp.broadcast_to(layer.bias[...].astype(x_BP.dtype), x_BP.shape)
    cut = (jnp.split(array, parts, axis=-1) for array in (x_BP, bias_BP))
    return [x + bias for x, bias in zip(*cut, strict=True)]


@jax.custom_jvp
def rows(table_CD: jax.Array, index_B: jax.Array) -> jax.Array:
    """table[index], (B, D). Its derivative is a matmul, whose sums have a fixed order. In XLA's own the gradient is a scatter
    with atomic additions, which gave other bits each time on a GPU (measured on an H200)."""
    return table_CD[index_B]


@rows.defjvp
def _rows_derivative(primals, tangents):
    (table_CD, index_B), (tangent_CD, _) = primals, tangents
    counted_B = jnp.where(index_B < 0, index_B + len(table_CD), index_B)  # as in table[index]
    chosen_CB = jax.nn.one_hot(counted_B, len(table_CD), dtype=tangent_CD.dtype, axis=0)
    return rows(table_CD, index_B), jnp.einsum("cb,cd->bd", chosen_CB, tangent_CD, precision="highest")


class RMSNorm(nnx.Module):
    """Holds the weight only; the arithmetic (statistics in float32, epsilon 1e-6) is in `jitjax.kernels.norm`."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))


class PatchEmbed(nnx.Module):
    """Two linear maps with a bottleneck and nothing between them."""

    def __init__(self, g: Geometry, rngs: nnx.Rngs):
        self.proj1 = linear(g.patch_values, g.bottleneck, rngs, use_bias=False)
        self.proj2 = linear(g.bottleneck, g.width, rngs)

    def __call__(self, patches_BTV: jax.Array) -> jax.Array:
        return affine(self.proj2, matmul(self.proj1, patches_BTV))


class TimeEmbedder(nnx.Module):
    def __init__(self, g: Geometry, rngs: nnx.Rngs):
        self.fc1 = linear(TIME_FEATURES, g.width, rngs, init=normal)
        self.fc2 = linear(g.width, g.width, rngs, init=normal)

    def __call__(self, t_B: jax.Array, dtype: Any) -> jax.Array:
        return affine(self.fc2, jax.nn.silu(affine(self.fc1, time_features(t_B).astype(dtype))))


class LabelEmbedder(nnx.Module):
    """The class embedding: one row per class and, last, the null (unconditional) class."""

    def __init__(self, g: Geometry, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs.params(), (g.num_classes + 1, g.width), jnp.float32))

    def __call__(self, y_B: jax.Array) -> jax.Array:
        return rows(self.table[...], y_B)


class Attention(nnx.Module):
    def __init__(self, g: Geometry, dropout_rate: float, rngs: nnx.Rngs):
        self.qkv = linear(g.width, 3 * g.width, rngs)
        self.q_norm, self.k_norm = RMSNorm(g.head_dim), RMSNorm(g.head_dim)
        self.proj = linear(g.width, g.width, rngs)
        self.heads, self.dropout_rate = g.heads, dropout_rate

    def __call__(self, h_BTD, rope, keys_B, ops: kernels.Ops, drop: int = 0) -> jax.Array:
        """Everything up to the output projection, whose bias the caller adds. `keys_B` None means no dropout. The first
        `drop` tokens are attended to and have no output of their own: (B, T - drop, D)."""
        kernel = self.qkv.kernel[...].astype(h_BTD.dtype)
        weights = kernel, self.qkv.bias[...], self.q_norm.weight[...], self.k_norm.weight[...]
        if self.dropout_rate and keys_B is not None:
            qkv = h_BTD @ kernel
            a = kernels.qkv_attention_with_dropout(qkv, *weights[1:], *rope, self.heads, self.dropout_rate, keys_B)
            a = a[:, drop:]
        else:
            kernel, *rest = ops.prepare_qkv(*weights, self.heads)
            a = ops.qkv_attention(h_BTD @ kernel, *rest, *rope, self.heads, drop)
        return matmul(self.proj, a)


class SwiGLU(nnx.Module):
    def __init__(self, g: Geometry, dropout_rate: float, rngs: nnx.Rngs):
        self.w12 = linear(g.width, 2 * g.mlp_hidden, rngs)
        self.w3 = linear(g.mlp_hidden, g.width, rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, h_BTD, keys_B, ops: kernels.Ops) -> jax.Array:
        """Everything up to the output projection, whose bias the caller adds."""
        weights = self.w12.kernel[...], self.w12.bias[...], self.w3.kernel[...]
        return ops.mlp(h_BTD, *weights, self.dropout_rate, keys_B)


class Block(nnx.Module):
    """adaLN-Zero transformer block: x + gate * attn(...), then x + gate * swiglu(...)."""

    def __init__(self, g: Geometry, index: int, rngs: nnx.Rngs):
        # Dropout acts in the middle half of the network only.
        active = g.depth // 4 <= index < g.depth // 4 * 3
        attn_dropout, self.proj_dropout = (g.attn_dropout, g.proj_dropout) if active else (0.0, 0.0)
        self.norm1, self.norm2 = RMSNorm(g.width), RMSNorm(g.width)
        self.attn = Attention(g, attn_dropout, rngs)
        self.mlp = SwiGLU(g, self.proj_dropout, rngs)
        self.adaln = linear(g.width, 6 * g.width, rngs, init=zeros)

    def __call__(self, x_BTD, pending, c_BD, rope, keys_B3, ops: kernels.Ops, drop: int = 0, product_BP=None):
        """One block without its last residual addition, which merges with the next norm.

        Args:
          pending: (branch, bias, gate) that the block before left; None for the first block.
          c_BD: silu of the conditioning.
          rope: cosines and sines, see `rope_tables`.
          keys_B3: three dropout keys per image; None switches dropout off.
          drop: leading tokens that are attended to and end here.
          product_BP: see `modulations`.

        Returns:
          x after the attention's residual, (B, T - drop, D); this block's pending (branch, bias, gate).
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations(self.adaln, c_BD, 6, product_BP)
        keys = (None,) * 3 if keys_B3 is None else tuple(keys_B3[:, i] for i in range(3))
        if pending is None:
            h_BTD = ops.norm_modulate(x_BTD, self.norm1.weight[...], shift_a, scale_a)
        else:
            x_BTD, h_BTD = ops.residual_norm_modulate(x_BTD, *pending, self.norm1.weight[...], shift_a, scale_a)
        branch, bias = self.attn(h_BTD, rope, keys[0], ops, drop), self.attn.proj.bias[...]
        if self.proj_dropout and keys[1] is not None:
            branch = kernels.dropout(branch + bias.astype(branch.dtype), self.proj_dropout, keys[1])
            bias = jnp.zeros_like(bias)
        x_BTD, h_BTD = ops.residual_norm_modulate(x_BTD, branch, bias, gate_a, self.norm2.weight[...], shift_m, scale_m)
        return x_BTD, (self.mlp(h_BTD, keys[2], ops), self.mlp.w3.bias[...], gate_m)


class FinalLayer(nnx.Module):
    def __init__(self, g: Geometry, rngs: nnx.Rngs):
        self.norm = RMSNorm(g.width)
        self.adaln = linear(g.width, 2 * g.width, rngs, init=zeros)
        self.linear = linear(g.width, g.patch_values, rngs, init=zeros)


@functools.partial(jax.jit, static_argnames=("ops", "drop"))
def _apply_block(block: Block, x_BTD, pending, c_BD, rope, keys_B3, product_BP, *, ops: kernels.Ops, drop: int):
    # jitted so that blocks of equal structure are traced once: a deep model traces as fast as a shallow one.
    # (A scan over layers would too, but copies every saved activation: 40% slower, measured on an H200.)
    return block(x_BTD, pending, c_BD, rope, keys_B3, ops, drop, product_BP)


def in_sequence(stages: Sequence[Callable[..., Any]], blocks: Sequence[Block], carry: Any, shared: Any) -> Any:
    """Blocks one after the other: carry = stage(block, carry, shared)."""
    for stage, block in zip(stages, blocks, strict=True):
        carry = stage(block, carry, shared)
    return carry


REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class JiT(nnx.Module):
    """Just image Transformer. `model(z, t, y)` predicts the clean image (or noise or velocity, as it was trained).

    Example:
      >>> model = JiT(make_geometry("JiT-B/16", image_size=256, num_classes=1000), rngs=nnx.Rngs(0))
      >>> model(z, t, y).shape   # z (B, 256, 256, 3), t (B,), y (B,) int
      (B, 256, 256, 3)
    """

    def __init__(self, geometry: Geometry, *, rngs: nnx.Rngs):
        g = self.geometry = geometry
        self.patch_embed = PatchEmbed(g, rngs)
        self.t_embedder = TimeEmbedder(g, rngs)
        self.y_embedder = LabelEmbedder(g, rngs)
        if g.context_length:
            self.in_context_pos = nnx.Param(normal(rngs.params(), (g.context_length, g.width), jnp.float32))
        self.blocks = nnx.List([Block(g, i, rngs) for i in range(g.depth)])
        self.final = FinalLayer(g, rngs)
        if g.class_head:
            self.class_head = linear(g.width, g.num_classes, rngs, init=zeros)

    def __call__(
        self,
        z: jax.Array,
        t: jax.Array,
        y: jax.Array,
        *,
        dtype: Any = jnp.float32,
        ops: kernels.Ops | None = None,
        remat: str = "none",
        dropout_keys: jax.Array | None = None,
        run_blocks: Callable[..., Any] | None = None,
        condition: Callable[[Params, Params], Params] | None = None,
        observe: Callable[[str, jax.Array], None] | None = None,
        wanted: Collection[str] = (),
    ) -> jax.Array:
        """Args:
          z: noised images, (B, S, S, 3) float.
          t: times in [0, 1], (B,) float; 0 is noise, 1 is data.
          y: labels, (B,) int in [0, num_classes]; num_classes is the null label.
          dtype: type of the matmuls and activations; parameters stay float32.
          ops: plain or fused implementation, `jitjax.kernels.get_ops`; default plain.
          remat: what the backward pass computes again: "none", "dots" (all but matmuls) or "full".
          dropout_keys: one key per image, (B,) key array; None switches dropout off.
          run_blocks: how the blocks are run, with the signature of `in_sequence` (the default).
          condition: (adaLN kernels by parameter name, the conditioning of each) -> products by name, of those for which
            there is a better way than one matmul in each block.
          observe: called while tracing with ("embed", tokens), then for each block ("blocks.<i>.attn", tokens after the
            attention's residual) and ("blocks.<i>.mlp", the SwiGLU branch), last ("final", output), and with a class head
            ("class_logits", (B, num_classes) float32). For diagnosis.
          wanted: what of it to differentiate. `run_blocks` may trace each block by itself, whose activations are nothing to the
            outside; those in `wanted` are handed on from block to block and observed behind the last one.

        Returns:
          (B, S, S, 3) in `dtype`.

        Raises:
          ValueError: images of another size than the geometry's.
        """
        g = self.geometry
        if z.shape[1:] != (g.image_size, g.image_size, CHANNELS):
            raise ValueError(f"expected images (B, {g.image_size}, {g.image_size}, {CHANNELS}), got {z.shape}")
        # On a GPU "default" would round float32 matmuls to TF32.
        exact = jnp.dtype(dtype) == jnp.float32
        with jax.default_matmul_precision("float32") if exact else contextlib.nullcontext():
            return self._forward(z, t, y, dtype, ops, remat, dropout_keys, run_blocks, condition, observe, wanted)

    def _forward(self, z, t, y, dtype, ops, remat, dropout_keys, run_blocks, condition, observe, wanted):
        g = self.geometry
        observe = observe or (lambda name, x: None)
        ops = ops or kernels.get_ops("plain")
        if remat == "dots":
            ops = kernels.with_visible_matmuls(ops)

        keys = None
        if dropout_keys is not None and (g.attn_dropout or g.proj_dropout):
            keys = jax.vmap(lambda key: jax.random.split(key, (g.depth, 3)))(dropout_keys)  # (B, depth, 3)

        with jax.named_scope("embed"):
            y_BD = self.y_embedder(y)
            t_BD = self.t_embedder(t, dtype).astype(jnp.float32)
            c_BD = jax.nn.silu(t_BD + y_BD).astype(dtype)
            c_without_class_BD = jax.nn.silu(t_BD).astype(dtype) if g.class_start else None
            x_BTD = self.patch_embed(patchify(z.astype(dtype), g.patch_size))
            x_BTD = x_BTD + position_table(g.width, g.grid).astype(dtype)
            context_BTD = (y_BD[:, None] + self.in_context_pos[...]).astype(dtype) if g.context_length else None

        observe("embed", x_BTD)
        products = [None] * (g.depth + 1)
        if condition:
            kernels_DP = {f"blocks.{i}.adaln.kernel": block.adaln.kernel[...] for i, block in enumerate(self.blocks)}
            kernels_DP["final.adaln.kernel"] = self.final.adaln.kernel[...]
            inputs = {name: c_without_class_BD if i < g.class_start else c_BD for i, name in enumerate(kernels_DP)}
            found = condition(kernels_DP, inputs)
            products = [found.get(name) for name in kernels_DP]
        # Another way to run the blocks may look for what depends on weights alone, which a jitted block hides.
        apply_block = _apply_block.__wrapped__ if run_blocks else _apply_block

        def stage(i, block, carry, shared):
            x_BTD, pending, pooled_BD, handed_on = carry
            c_BD, c_without_class_BD, context_BTD, keys, products = shared
            if g.class_head and i == g.class_start:
                x_BTD, pending = ops.gated_residual(x_BTD, *pending), None
                pooled_BD = jnp.mean(x_BTD.astype(jnp.float32), axis=1)
            if g.context_length and i == g.context_start:
                if pending is not None:
                    x_BTD, pending = ops.gated_residual(x_BTD, *pending), None
                with jax.named_scope("embed"):
                    x_BTD = jnp.concatenate([context_BTD, x_BTD], axis=1)
            context = g.context_length if i >= g.context_start else 0
            # Only image tokens become pixels: in the last block context tokens are attended to and go no further.
            apply = functools.partial(apply_block, ops=ops, drop=context if i == g.depth - 1 else 0)
            if remat != "none":
                apply = jax.checkpoint(apply, policy=REMAT_POLICIES[remat])
            rope = rope_tables(g.head_dim, g.grid, context)
            c_BD = c_without_class_BD if i < g.class_start else c_BD
            x_BTD, pending = apply(block, x_BTD, pending, c_BD, rope, None if keys is None else keys[:, i], products[i])
            for name, value in ((f"blocks.{i}.attn", x_BTD), (f"blocks.{i}.mlp", pending[0])):
                if run_blocks and name in wanted:
                    handed_on = handed_on | {name: value}
                else:
                    observe(name, value)
            return x_BTD, pending, pooled_BD, handed_on

        stages = [functools.partial(stage, i) for i in range(g.depth)]
        shared = c_BD, c_without_class_BD, context_BTD, keys, products[:-1]
        carry = x_BTD, None, None, {}
        x_BTD, pending, pooled_BD, handed_on = (run_blocks or in_sequence)(stages, self.blocks, carry, shared)
        for name, value in handed_on.items():
            observe(name, value)

        shift, scale = modulations(self.final.adaln, c_BD, 2, products[-1])
        _, h_BTD = ops.residual_norm_modulate(x_BTD, *pending, self.final.norm.weight[...], shift, scale)
        output_BTV = affine(self.final.linear, h_BTD)
        observe("final", output_BTV)
        if g.class_head:
            observe("class_logits", affine(self.class_head, pooled_BD))
        return unpatchify(output_BTV, g.patch_size)


# ---------------------------------------------------------------- modules <-> flat parameters


def split(model: JiT) -> tuple[nnx.GraphDef, Params]:
    """A module as its structure and one flat dictionary of parameters, keyed by dotted path."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef, params: Mapping[str, jax.Array]) -> JiT:
    """Inverse of `split`; pure, so it may be called inside jit."""
    paths = {tuple(int(k) if k.isdigit() else k for k in name.split(".")): value for name, value in params.items()}
    return nnx.merge(graphdef, nnx.from_flat_state({path: nnx.Param(value) for path, value in paths.items()}))


class _Keys:
    """The keys of `nnx.Rngs(params=key)`, bit for bit, counted in Python: counted in an array, tracing JiT-H's initialisation
    takes five times as long, and its time grows with the square of the depth."""

    def __init__(self, key: jax.Array):
        self.key, self.count = key, itertools.count()

    def params(self) -> jax.Array:
        return jax.random.fold_in(self.key, next(self.count))


def init_fn(geometry: Geometry):
    """A pure function from a random key to freshly initialised parameters, for `jax.jit` or `jax.eval_shape`."""
    return lambda key: split(JiT(geometry, rngs=_Keys(key)))[1]


@functools.lru_cache(maxsize=32)
def graphdef_of(geometry: Geometry) -> nnx.GraphDef:
    """The structure alone, without computing any parameter."""
    return nnx.split(nnx.eval_shape(lambda: JiT(geometry, rngs=_Keys(jax.random.key(0)))), nnx.Param)[0]


def create_model(name: str, *, image_size: int, num_classes: int, seed: int = 0, **geometry: Any) -> JiT:
    """A freshly initialised model, e.g. create_model("JiT-B/16", image_size=256, num_classes=1000).

    `geometry` overrides single numbers of the named size (depth, width, heads, bottleneck, ...; see `Geometry`).
    """
    return JiT(make_geometry(name, image_size, num_classes, **geometry), rngs=nnx.Rngs(params=seed))
