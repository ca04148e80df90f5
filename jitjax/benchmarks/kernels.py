"""The fused operations beside the plain ones on this device, their errors and times: the check of all kernels on a card.

    jitjax bench kernels --config configs/h200.py:finetune --config.batch_size=256

One JSON line for each operation and number of tokens that the model has, and one for the gradients of the whole model.

Errors are relative (norm of the difference over norm of the reference), the largest over all outputs and gradients of an
operation; the reference is the plain operation in float32 on the same rounded inputs. `as_accurate` means that no fused error
exceeds 1.3 times the plain one by more than half a unit in the last place of the compute type, and that every plain one is
below 0.5, since two wrong results say nothing. `repeatable` means that ten calls of the fused program gave the same bits,
without which a resumed run does not repeat the undisturbed one. Where one is false, or an error is not finite, the command
exits with code 2.

Errors come from the first `--check_images` images, times (value and gradient, in us, median) from the whole batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from jitjax import from_settings, kernels, model, step
from jitjax.benchmarks import common
from jitjax.errors import UserError
from jitjax.from_settings import Setup

CALLS = 10  # of one measurement, back to back

Function = Callable[..., Any]  # of (ops, *activations, *parameters)
Program = Callable[[], list[jax.Array]]  # compiled, with its arguments
# Name, tokens, what to check, what to time (None for the same), activations, parameters.
Case = tuple[str, int, Function, Function | None, list[jax.Array], list[jax.Array]]


def run(args: argparse.Namespace) -> None:
    """Check and time every operation, with the flags of `jitjax.bench`.

    Raises:
      UserError: a mistake in the configuration, or a fused operation that is less accurate than the plain one, or not
        repeatable.
    """
    setup = common.prepare(common.load(args))
    listed = list(cases(setup))
    common.say(f"compiling the programs of {len(listed)} operations and of the model ...")
    with ThreadPoolExecutor() as pool:  # all before anything is timed: compiling uses the card too
        begun = [begin_case(pool, *case, args.check_images) for _, _, *case in listed]
        of_model = [program.result() for program in begin_models(pool, setup, args.check_images)]
        compiled = [{name: program.result() for name, program in programs.items()} for programs in begun]
    judged = []  # name, record
    for (name, tokens, *_), programs in zip(listed, compiled, strict=True):
        record = compare(programs, setup.settings.dtype, args.repeats)
        common.emit({"benchmark": "kernels", "operation": name, "tokens": tokens, **record})
        judged.append((f"{name} at {tokens} tokens", record))
    record = judge(*(program() for program in of_model), setup.settings.dtype) | {"repeatable": repeatable(of_model[-1])}
    common.emit({"benchmark": "kernels", "operation": "model", **record, **common.describe(setup)})
    judged.append(("the model's gradients", record))
    if failed := [name for name, record in judged if not record["as_accurate"]]:
        raise UserError(f"less accurate fused than plain: {', '.join(failed)}; use --config.kernels=plain and report this")
    if failed := [name for name, record in judged if not record["repeatable"]]:
        raise UserError(f"not the same bits each time: {', '.join(failed)}; a resumed run may differ by roundings: report this")


def cases(setup: Setup) -> Iterator[Case]:
    """Every operation at the shapes that the model calls it with, on fresh random numbers of a trained model's size."""
    g, b, dtype = setup.geometry, setup.settings.batch_size, jnp.dtype(setup.settings.dtype)
    keys = iter(jax.random.split(jax.random.key(setup.settings.seed), 64))
    d, n, f = g.width, g.head_dim, g.mlp_hidden

    def half(*shape):
        return jax.random.normal(next(keys), (b, *shape), jnp.float32).astype(dtype)

    def vector(size, mean=0.0):
        return mean + 0.3 * jax.random.normal(next(keys), (size,), jnp.float32)

    def matrix(rows, columns):
        return rows**-0.5 * jax.random.normal(next(keys), (rows, columns), jnp.float32)

    def residual_norm(ops, x, branch, gate, shift, scale, bias, weight):
        return ops.residual_norm_modulate(x, branch, bias, gate, weight, shift, scale)

    def norm(ops, x, shift, scale, weight):
        return ops.norm_modulate(x, weight, shift, scale)

    def residual(ops, x, branch, gate, bias):
        return ops.gated_residual(x, branch, bias, gate)

    def mlp(ops, h, *weights, rate=0.0, visible=False):
        ops = kernels.with_visible_matmuls(ops) if visible else ops
        return ops.mlp(h, *weights, rate, jax.random.split(jax.random.key(0), len(h)))

    def attention(ops, qkv, bias, q_weight, k_weight, *, rope, drop=0):
        return ops.qkv_attention(qkv, bias, q_weight, k_weight, *rope, g.heads, drop)

    def ordered_attention(ops, qkv, *parameters, **options):
        """The same in the published order of features, whatever order the implementation wants."""
        columns = ops.prepare_qkv(jnp.arange(3 * d)[None], *(jnp.arange(p.size) for p in parameters), g.heads)
        parameters = [p[index] for p, index in zip(parameters, columns[1:], strict=True)]
        return attention(ops, qkv[..., columns[0][0]], *parameters, **options)

    def packing(ops, *arrays):
        """Copies what crosses devices, into a buffer and out of it, and has no gradients. The last one goes to all of them."""
        *parts, last = jax.lax.stop_gradient(arrays)
        parts.append(last[None])
        packed = ops.packing.pack(parts, parts[0].dtype)
        return packed, ops.packing.unpack(packed, [part.size // len(part) for part in parts])

    for context in sorted({0, g.context_length}):
        t = g.tokens + context
        rope = model.rope_tables(n, g.grid, context)
        qkv, weights = half(t, 3 * d), [vector(3 * d), vector(n, 1.0), vector(n, 1.0)]
        for label, options in (("", {}), (", last block", {"drop": context})):
            if context or not label:
                checked, timed = (functools.partial(f, rope=rope, **options) for f in (ordered_attention, attention))
                yield f"qkv_attention{label}", t, checked, timed, [qkv], weights
        for label, options in (
            ("", {}),
            (", dropout", {"rate": g.proj_dropout or 0.1}),
            (", matmuls left to XLA", {"visible": True}),  # as with remat=dots
        ):
            weights = [matrix(d, 2 * f), vector(2 * f), matrix(f, d)]
            yield f"mlp{label}", t, functools.partial(mlp, **options), None, [half(t, d)], weights
        vectors = half(d), half(d), half(d)
        weights = [vector(d), vector(d, 1.0)]
        yield "residual_norm_modulate", t, residual_norm, None, [half(t, d), half(t, d), *vectors], weights
        yield "norm_modulate", t, norm, None, [half(t, d), *vectors[1:]], weights[1:]
    if g.context_length:
        yield "gated_residual", g.tokens, residual, None, [half(g.tokens, d), half(g.tokens, d), half(d)], [vector(d)]
    yield "packing", g.tokens, packing, None, [half(16 * d), half(d + 1)], [vector(d)]


def with_gradients(function: Function, ops: kernels.Ops) -> Callable[..., Any]:
    """Jitted: values of function(ops, *arguments) and its gradients for random cotangents, as one list."""

    def run(arguments):
        value, pullback = jax.vjp(functools.partial(function, ops), *arguments)
        leaves, tree = jax.tree.flatten(value)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [  # rounded to bfloat16, so that they are the same for every compute type
            jax.random.normal(key, leaf.shape, jnp.bfloat16).astype(leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
        ]
        return [*leaves, *pullback(jax.tree.unflatten(tree, drawn))]

    return jax.jit(run)


def error(value: jax.Array, reference: jax.Array) -> float:
    """Norm of the difference over norm of the reference."""
    value, reference = value.astype(jnp.float32), reference.astype(jnp.float32)
    return float(jnp.linalg.norm(value - reference) / jnp.maximum(jnp.linalg.norm(reference), 1e-30))


def judge(reference: Sequence[jax.Array], plain: Sequence[jax.Array], fused: Sequence[jax.Array], dtype: Any) -> dict[str, Any]:
    """Largest errors of both, and whether fused is as accurate as plain in every single output."""
    plain_errors = [error(p, r) for p, r in zip(plain, reference, strict=True)]
    fused_errors = [error(f, r) for f, r in zip(fused, reference, strict=True)]
    rounding = float(jnp.finfo(dtype).eps) / 2
    return {
        "plain_error": round(max(plain_errors), 7),
        "fused_error": round(max(fused_errors), 7),
        "as_accurate": all(p < 0.5 and f < 1.3 * p + rounding for f, p in zip(fused_errors, plain_errors, strict=True)),
    }


def repeatable(program: Program) -> bool:
    """Whether `CALLS` calls of the program give the same bits. Compared on the device, since outputs may be large."""

    def bits(x):
        return x.view(f"uint{8 * x.dtype.itemsize}")

    first = [bits(x) for x in program()]
    return all(bool(jnp.array_equal(bits(x), y)) for _ in range(CALLS - 1) for x, y in zip(program(), first, strict=True))


def begin(pool: Executor, jitted: Any, *arguments: Any) -> Future[Program]:
    """A program with its arguments, compiling in `pool`."""
    lowered = jitted.lower(*arguments)
    return pool.submit(lambda: functools.partial(lowered.compile(), *arguments))


def begin_case(
    pool: Executor,
    checked: Function,
    timed: Function | None,
    activations: list[jax.Array],
    parameters: list[jax.Array],
    images: int,
) -> dict[str, Future[Program]]:
    """The programs of one operation: "exact" and, by kind, "plain", "fused" for errors, "plain timed", "fused timed"."""
    few = [x[:images] for x in activations]
    with jax.default_matmul_precision("float32"):
        exact = begin(
            pool, with_gradients(checked, kernels.get_ops("plain")), [x.astype(jnp.float32) for x in few] + parameters
        )
    programs = {"exact": exact}
    for kind in ("plain", "fused"):
        programs[kind] = begin(pool, with_gradients(checked, kernels.get_ops(kind)), few + parameters)
        programs[f"{kind} timed"] = begin(
            pool, with_gradients(timed or checked, kernels.get_ops(kind)), activations + parameters
        )
    return programs


def compare(programs: dict[str, Program], dtype: str, repeats: int) -> dict[str, Any]:
    """Errors and times of one operation, fused and plain, from `begin_case`."""
    times = {}
    for kind in ("plain", "fused"):
        run = programs[f"{kind} timed"]
        jax.block_until_ready(run())
        measured = []
        for _ in range(repeats):
            begun = time.perf_counter()
            for _ in range(CALLS):
                out = run()
            jax.block_until_ready(out)
            measured.append((time.perf_counter() - begun) / CALLS)
        times[f"{kind}_us"] = round(statistics.median(measured) * 1e6, 1)
    errors = judge(*(programs[name]() for name in ("exact", "plain", "fused")), dtype)
    return {**errors, "repeatable": repeatable(programs["fused timed"]), **times}


def begin_models(pool: Executor, setup: Setup, images: int) -> list[Future[Program]]:
    """Loss and gradient of every parameter of the whole model for a few random images: plain in float32, plain, fused. All
    times the loss scale that training begins with, without which float16's gradients are zeros."""
    params = common.random_params(setup.geometry, jax.random.key(setup.settings.seed))
    batch = {name: value[:images] for name, value in common.random_batch(setup).items()}
    batch["label"] %= 3  # so that rows of the class embedding have gradients of several images
    keys = jax.random.split(jax.random.key(2), len(batch["label"]))

    scale = step.first_loss_scale(setup.settings.dtype)

    def program(dtype: str, kind: str) -> Future[Program]:
        settings = dataclasses.replace(setup.settings, dtype=dtype)
        loss = from_settings.make_loss(settings, setup.geometry, kernels.get_ops(kind))

        def run(params):
            return jax.tree.leaves(
                jax.value_and_grad(lambda p: scale * jnp.mean(loss(p, batch["image"], batch["label"], keys)))(params)
            )

        return begin(pool, jax.jit(run), params)

    dtype = setup.settings.dtype
    return [program(*which) for which in (("float32", "plain"), (dtype, "plain"), (dtype, "fused"))]
