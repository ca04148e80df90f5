"""Mistakes that other implementations have made, or could: each is a change of one line of ours that the parity checks must
notice. `python tests/parity_report.py --mutations` applies them and prints which check notices which. It is no part of the test
suite, since it finds the lines by their wording: a line that was rewritten is reported, and its entry here has to follow.

A mutation replaces a piece of a function's source and swaps the function's code in place, so every reference to it, also in
other modules, runs the mistake. Checks run without jit, where nothing stays compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import parity_checks
from parity_rows import Row

from jitjax import model as jit_model


@dataclasses.dataclass(frozen=True)
class Mutation:
    mistake: str
    target: str  # module:function, below jitjax
    old: str
    new: str
    check: str


MUTATIONS = [
    Mutation("RoPE: columns before rows", "model:rope_tables", "([rows, columns]", "([columns, rows]", "forward"),
    Mutation(
        "RoPE: half-split pairs (GPT-NeoX) instead of interleaved",
        "kernels.attention:rotate_pairs",
        "return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)",
        "a, b = jnp.split(x, 2, axis=-1); return jnp.concatenate([-b, a], axis=-1)",
        "forward",
    ),
    Mutation(
        "RoPE: angles tiled, not repeated in pairs",
        "model:rope_tables",
        "np.repeat(np.outer(np.arange(grid, dtype=np.float64), frequency), 2, axis=1)",
        "np.tile(np.outer(np.arange(grid, dtype=np.float64), frequency), (1, 2))",
        "forward",
    ),
    Mutation("RoPE: context tokens rotated", "model:rope_tables", "np.zeros(", "np.ones(", "forward"),
    Mutation("RoPE: frequencies of the whole head", "model:rope_tables", "/ per_axis)", "/ head_dim)", "forward"),
    Mutation("positions: row before column", "model:position_table", "([columns, rows]", "([rows, columns]", "forward"),
    Mutation("positions: cosines first", "model:position_table", "np.sin(angles), np.cos", "np.cos(angles), np.sin", "forward"),
    Mutation("RMSNorm: epsilon 1e-5", "kernels.norm:plain_norm_modulate", "+ EPS", "+ 1e-5", "modules"),
    Mutation("query/key norm: epsilon 1e-5", "kernels.attention:_norm_rope", "+ EPS", "+ 1e-5", "modules"),
    Mutation("modulation: scale without 1 +", "kernels.norm:plain_norm_modulate", "(1 + scale_BD", "(scale_BD", "forward"),
    Mutation("RMSNorm: weight left out", "kernels.norm:plain_norm_modulate", "* weight_D.astype(f32)", "", "forward"),
    Mutation("time: multiplied by 1000", "model:time_features", "t_B.astype(jnp.float32)", "1000 * t_B", "forward"),
    Mutation(
        "time: sines first",
        "model:time_features",
        "jnp.cos(angles), jnp.sin(angles)",
        "jnp.sin(angles), jnp.cos(angles)",
        "forward",
    ),
    Mutation("time: frequencies over half - 1", "model:time_features", "np.float32(half)", "np.float32(half - 1)", "forward"),
    Mutation("context tokens from c (time and label)", "model:JiT._forward", "(y_BD[:, None] +", "(c_BD[:, None] +", "forward"),
    Mutation(
        "context tokens one block late", "model:JiT._forward", "i == g.context_start", "i == g.context_start + 1", "forward"
    ),
    Mutation("context tokens last", "model:JiT._forward", "([context_BTD, x_BTD]", "([x_BTD, context_BTD]", "forward"),
    Mutation(
        "adaLN: scale before shift",
        "model:Block.__call__",
        "shift_a, scale_a, gate_a, shift_m",
        "scale_a, shift_a, gate_a, shift_m",
        "forward",
    ),
    Mutation("adaLN: no silu on the conditioning", "model:JiT._forward", "c_BD = jax.nn.silu(", "c_BD = (", "forward"),
    Mutation("SwiGLU: halves swapped", "kernels.swiglu:plain_swiglu", "a, b = ", "b, a = ", "forward"),
    Mutation("SwiGLU: hidden width rounded", "model:Geometry.mlp_hidden", "return int(int", "return round(int", "modules"),
    Mutation("output bias left out", "kernels.norm:plain_gated_residual", "+ bias_D.astype(f32)", "", "forward"),
    Mutation("patches: channels first", "model:patchify", "(0, 1, 3, 2, 4, 5)", "(0, 1, 3, 5, 2, 4)", "forward"),
    Mutation("unpatchify: rows and columns swapped", "model:unpatchify", "(0, 1, 3, 2, 4, 5)", "(0, 1, 4, 2, 3, 5)", "forward"),
    Mutation("velocity: 1 - t not clipped", "diffusion:convert", "jnp.maximum(1 - t, t_eps)", "1 - t + 1e-9", "combinations"),
    Mutation(
        "target: exact, not clipped",
        "diffusion:loss_per_image",
        "- convert(truth, prediction, loss, z, t_B, t_eps)",
        "- {'x': x, 'epsilon': e, 'v': x - e}[loss]",
        "combinations",
    ),
    Mutation("noise and data swapped", "diffusion:noised", "t * x + (1 - t) * e", "t * e + (1 - t) * x", "combinations"),
    Mutation("pixels truncated, not rounded", "diffusion:to_uint8", "jnp.round(", "jnp.floor(", "uint8"),
    Mutation("Heun's corrector also in the last step", "sampling:integrate", "and i < steps - 1", "", "sampler_calls"),
    Mutation("guidance interval not strict below", "sampling:guided", "(t > low)", "(t >= low)", "sampler_calls"),
    Mutation(
        "guidance of Heun's second call decided by the first",
        "sampling:integrate",
        "bool(on[i + 1])",
        "bool(on[i])",
        "sampler_calls",
    ),
    Mutation("guidance around the labelled velocity", "sampling:sample_fn", "v = v_null + cfg", "v = v + cfg", "sampler"),
    Mutation(
        "null label: the last class",
        "sampling:sample_fn",
        "full_like(labels, null_label)",
        "full_like(labels, null_label - 1)",
        "sampler",
    ),
    Mutation(
        "velocity in the sampler from the next time",
        "sampling:integrate",
        "v = velocity(z, t, first)",
        "v = velocity(z, t_next, first)",
        "sampler",
    ),
    Mutation(
        "EMA before the step",
        "step:make_train_step",
        "update_ema(state.ema, new_params,",
        "update_ema(state.ema, state.params,",
        "step",
    ),
    Mutation(
        "EMA with decay and 1 - decay swapped", "optimizer:update_ema", "else 1 - float(name)", "else float(name)", "step"
    ),
    Mutation(
        "learning rate one step early", "step:make_train_step", "schedule(state.step)", "schedule(state.step + 1)", "step"
    ),
    Mutation("weight decay on every tensor", "optimizer:decay_mask", "value.ndim > 1", "True", "step"),
    Mutation("no weight decay", "optimizer:make_optimizer", "weight_decay=o.weight_decay", "weight_decay=0.0", "step"),
    Mutation(
        "L2 in the gradient instead of decoupled decay",
        "optimizer:make_optimizer",
        "return optax.adamw(1.0, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decay_mask)",
        "return optax.chain(optax.add_decayed_weights(o.weight_decay, decay_mask), "
        "optax.adam(1.0, b1=o.b1, b2=o.b2, eps=o.eps))",
        "step",
    ),
    Mutation("AdamW: beta2 0.999", "optimizer:make_optimizer", "b2=o.b2", "b2=0.999", "step"),
    Mutation("AdamW: epsilon 1e-6", "optimizer:make_optimizer", "eps=o.eps", "eps=1e-6", "step"),
    Mutation(
        "cosine over the whole run, warm-up included",
        "optimizer:learning_rate",
        "max(total - warmup, 1e-9)",
        "max(total, 1e-9)",
        "schedules",
    ),
    Mutation("warm-up from one step up", "optimizer:learning_rate", "peak * step /", "peak * (step + 1) /", "schedules"),
    Mutation(
        "Xavier of q, k and v by themselves",
        "model:Attention.__init__",
        "self.qkv = linear(g.width, 3 * g.width, rngs)",
        "self.qkv = linear(g.width, 3 * g.width, rngs, init=nnx.initializers.variance_scaling(1, 'fan_in', 'uniform'))",
        "init",
    ),
    Mutation(
        "Xavier of the patch convolution with Flax's fans",
        "model:PatchEmbed.__init__",
        "self.proj1 = linear(g.patch_values, g.bottleneck, rngs, use_bias=False)",
        "self.proj1 = linear(g.patch_values, g.bottleneck, rngs, use_bias=False, init=lambda key, shape, dtype: "
        "xavier(key, (g.patch_size, g.patch_size, 3, g.bottleneck), dtype).reshape(shape))",
        "init",
    ),
    Mutation(
        "adaLN not zero at the start", "model:Block.__init__", "6 * g.width, rngs, init=zeros)", "6 * g.width, rngs)", "init"
    ),
    Mutation("photographs: bilinear", "data.image:preprocess", "Resampling.BICUBIC", "Resampling.BILINEAR", "photographs"),
    Mutation(
        "photographs: crop rounded up",
        "data.image:preprocess",
        "(scaled[0] - size) // 2, (scaled[1] - size) // 2",
        "(scaled[0] - size + 1) // 2, (scaled[1] - size + 1) // 2",
        "photographs",
    ),
]


class Outdated(Exception):
    """The line that a mutation changes does not exist any more."""


@functools.lru_cache(maxsize=1)
def true_gradients() -> list[Any]:
    """Gradients along the true trajectory, for the mutations that come behind them."""
    record: list[Any] = []
    parity_checks.trajectory("tiny_train", record=record)
    jax.effects_barrier()
    return record


def eager(check: Callable[[], list[Row]]) -> Callable[[], list[Row]]:
    def run() -> list[Row]:
        with jax.disable_jit():
            return check()

    return run


CHECKS: dict[str, Callable[[], list[Row]]] = {
    "forward": eager(parity_checks.forward_tiny),
    "modules": eager(parity_checks.modules),
    "combinations": eager(parity_checks.combinations),
    "uint8": eager(parity_checks.uint8),
    "sampler_calls": parity_checks.sampler_calls,
    "sampler": eager(functools.partial(parity_checks.sampler, "heun_s5_cfg2.9")),
    "schedules": eager(parity_checks.schedules),
    "step": lambda: parity_checks.trajectory("tiny_train", replay=true_gradients()),
    "init": functools.partial(parity_checks.initial_weights, "JiT-nano/4", 32),
    "photographs": parity_checks.photographs,
}


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """Inside, the mutation's function runs the mistake."""
    module, _, path = mutation.target.partition(":")
    try:
        function: Any = importlib.import_module(f"jitjax.{module}")
        for name in path.split("."):
            function = inspect.getattr_static(function, name)
    except (ImportError, AttributeError) as error:
        raise Outdated(f"{mutation.target} is gone ({error}): adapt tests/parity_mutations.py") from error
    function = function.fget if isinstance(function, property) else inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutation.old) != 1:
        raise Outdated(f"{mutation.target} does not have {mutation.old!r} once: adapt tests/parity_mutations.py")
    body = source[source.index("def ") :].replace(mutation.old, mutation.new)
    scope: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + body, function.__globals__, scope)  # noqa: S102
    code = function.__code__
    function.__code__ = scope[function.__name__].__code__
    try:
        forget()
        yield
    finally:
        function.__code__ = code
        forget()


def forget() -> None:
    """Empty the caches that hold results of functions that may be mutated."""
    for cached in (jit_model.position_table, jit_model.rope_tables, jit_model.graphdef_of, parity_checks.small_params):
        cached.cache_clear()


def caught(mutation: Mutation) -> list[Row]:
    """The rows that are beyond their tolerance under the mutation."""
    if mutation.check == "step":
        true_gradients()
    with applied(mutation):
        return [row for row in CHECKS[mutation.check]() if not row.ok]
