"""The optimizer step: accumulation, communication, sharding, non-finite gradients, precision."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEEPER, small_settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax import diffusion, exchange, gradients, hlo, kernels, model, sharding, step
from jitjax.from_settings import Setup, make_step
from jitjax.geometry import geometry_of
from jitjax.kernels import pack
from jitjax.plan import make_plan

CLASSES = 5


DATA, ZERO, FSDP, HYBRID = (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1)  # data x zero x fsdp


def build(config, axes, objective=None):
    """State and step on a mesh of these sizes, on the first devices."""
    devices = int(np.prod(axes))
    mesh = sharding.make_mesh(*axes, jax.devices()[:devices])
    geometry = geometry_of(config.model, config.data.image_size, CLASSES)
    plan = make_plan(config, images=640, tokens_per_image=geometry.tokens, devices=devices)
    init = functools.partial(step.init_state, geometry, config.optim, config.dtype)
    placed = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = jax.jit(init, out_shardings=placed)(jax.random.key(0))
    return state, make_step(Setup(config, geometry, mesh, plan, "plain", ""), objective), plan, mesh


def batches(plan, mesh, count, size=8):
    rng = np.random.default_rng(0)
    for _ in range(count):
        batch = {
            "image": rng.integers(0, 256, (plan.global_batch, size, size, 3), dtype=np.uint8),
            "label": rng.integers(0, CLASSES, (plan.global_batch,), dtype=np.int32),
        }
        yield jax.device_put(batch, NamedSharding(mesh, sharding.BATCH))


def run(config, axes, steps=3, objective=None):
    """Losses and last state. Everywhere all steps share one trace: a second one would compile the model again in mid-run."""
    state, train_step, plan, mesh = build(config, axes, objective)
    losses = []
    chex.clear_trace_counter()
    with mock.patch.object(step, "update_ema", chex.assert_max_traces(step.update_ema, n=1)):
        for batch in batches(plan, mesh, steps):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["train/loss"]))
    return np.array(losses), jax.device_get(state)


@pytest.fixture
def split_small(monkeypatch):
    """Let fsdp split the small model's arrays too."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)


@pytest.fixture(scope="module")
def reference():
    """32 images a step on one device, in one piece."""
    return run(small_settings(**EVERYTHING, batch_size=32), (1, 1, 1))


EVERYTHING = DEEPER | {"model__proj_dropout": 0.2, "model__class_loss": 100.0}
SLOW_MESHES = (((2, 2, 1), 2), (ZERO, 4), (DATA, 1), (DATA, 2), (FSDP, 1), ((2, 1, 4), 2), ((1, 2, 1), 4), ((1, 1, 1), 2))


@pytest.mark.parametrize(
    "axes, micro_batches",
    [(HYBRID, 1), ((1, 1, 4), 2), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in SLOW_MESHES)],
)
def test_same_curve_on_any_mesh_and_for_any_cut(reference, split_small, axes, micro_batches):
    """The same 32 images a step give the same losses and weights, however they are spread: k micro-batches on d devices
    equal one batch. Noise, times, dropped labels and dropout depend on the image's place in the global batch only. With the
    auxiliary class loss, whose head begins as zeros."""
    size = 32 // int(np.prod(axes)) // micro_batches
    config = small_settings(**EVERYTHING, batch_size=size, optim__accumulation_steps=micro_batches)
    losses, state = run(config, axes)
    np.testing.assert_allclose(losses, reference[0], rtol=2e-6)
    for name, value in reference[1].params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-5, err_msg=name)
    assert np.abs(reference[1].params["class_head.kernel"]).mean() > 1e-4
    assert int(state.step) == 3 and int(state.opt_state[0].count) == 3  # optimizer steps, not micro-steps


def with_small_activations(output, x, e, t, activations):
    """A loss of one's own, of what the network computes in front of the blocks, inside two of them and behind."""
    assert set(activations) == set(with_small_activations.activations)
    squares = sum(jnp.mean(jnp.square(value.astype(jnp.float32)), axis=(1, 2)) for value in activations.values())
    return diffusion.published_objective("x", "v", 0.05)(output, x, e, t) + 0.1 * squares


with_small_activations.activations = ("embed", "blocks.0.mlp", "blocks.1.attn", "final")


@pytest.mark.parametrize("axes, micro_batches", [(FSDP, 1), ((2, 1, 2), 2), pytest.param(ZERO, 2, marks=pytest.mark.slow)])
def test_a_loss_on_activations_is_the_same_on_any_mesh(split_small, axes, micro_batches):
    options = EVERYTHING | {"model__depth": 3, "remat": "full"}
    results = []
    for mesh, cut in (((1, 1, 1), 1), (axes, micro_batches)):
        config = small_settings(**options, batch_size=32 // int(np.prod(mesh)) // cut, optim__accumulation_steps=cut)
        results.append(run(config, mesh, objective=with_small_activations))
    (losses, one), (found, state) = results
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    for name, value in one.params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-5, err_msg=name)
    plain, _ = run(small_settings(**options, batch_size=32), (1, 1, 1))
    assert np.all(np.abs(plain - losses) > 1e-4)


def outside_loops(text):
    """{operation: bytes} of the collectives of an HLO text that run once, and the bytes of those in loops."""
    ops = hlo.collectives(text, 8)
    once = {kind: sum(op.bytes for op in ops if op.kind == kind and op.times == 1) for kind in {op.kind for op in ops}}
    return once, sum(op.bytes for op in ops if op.times != 1)


@pytest.mark.parametrize("axes", [HYBRID, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (DATA, ZERO))])
def test_gradients_cross_devices_once_per_optimizer_step(split_small, axes):
    """Read off the compiled HLO: every collective stands outside the loop over micro-batches, and the bytes are those of one
    all-reduce, or of one exchange of parts and one gathering of weights, whatever the number of micro-batches. (Of one
    micro-batch adaLN's kernels do not cross: below.)"""
    totals = []
    for micro_batches in (2, 4):
        config = small_settings(batch_size=2, optim__accumulation_steps=micro_batches)
        state, train_step, plan, mesh = build(config, axes)
        text = train_step.lower(state, next(batches(plan, mesh, 1))).compile().as_text()
        assert " while(" in text
        total, inside = outside_loops(text)
        assert not inside
        totals.append(total)
    slack = 64  # bytes of loss, count, the norm's partial sum and whether the sums are finite
    assert totals[0] == totals[1]

    data, zero, _ = axes
    whole = sum(p.size for name, p in state.params.items() if sharding.split_axis(name, p.shape, zero) is None)
    split = sum(p.size for p in state.params.values()) - whole
    assert bool(split) == (zero > 1)
    assert totals[0]["all-reduce"] - 4 * (whole + (split // zero if data > 1 else 0)) in range(slack)
    turns = sum(op.kind == "all-to-all" for op in hlo.collectives(text, 8)) * zero * exchange.TURN
    assert totals[0].get("all-to-all", 0) == 4 * (2 * split + turns)  # weights there, gradients back


def equations(jaxpr, inside=()):
    """Every equation of a jaxpr and those inside it, with the names of the primitives around it."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
                yield from equations(getattr(sub, "jaxpr", sub), (*inside, eqn.primitive.name))


def inner(param):
    sub = getattr(param, "jaxpr", param)
    return sub if hasattr(sub, "eqns") else None


def transfers(train_step, *args):
    """Of every all-to-all and all-gather of weights and gradients in a program, in order: (how many numbers cross, how many
    matmuls have to come before it, and which of the earlier ones)."""
    jaxpr = jax.make_jaxpr(train_step)(*args).jaxpr
    while not any(eqn.primitive.name == "all_to_all" for eqn in jaxpr.eqns):  # inside jit and shard_map
        jaxpr = max((sub for eqn in jaxpr.eqns for sub in map(inner, eqn.params.values()) if sub), key=lambda j: len(j.eqns))
    behind, matmuls, found, numbers = {}, {}, [], []  # the equations that each variable follows from; the matmuls in each
    for number, eqn in enumerate(jaxpr.eqns):
        nested = (sub for value in eqn.params.values() if (sub := inner(value)) is not None)
        matmuls[number] = (eqn.primitive.name == "dot_general") + sum(
            inside.primitive.name == "dot_general" for sub in nested for inside, _ in equations(sub)
        )
        before = set().union(*(behind[v] for v in eqn.invars if isinstance(v, jax.extend.core.Var) and v in behind))
        behind |= dict.fromkeys(eqn.outvars, before | {number})
        if eqn.primitive.name in ("all_to_all", "all_gather") and "by_columns" not in str(eqn.source_info.name_stack):
            rows, size = eqn.outvars[0].aval.shape
            earlier = [i for i, n in enumerate(numbers) if n in before]
            found.append((rows * (size - exchange.TURN), sum(matmuls[n] for n in before), earlier))
            numbers.append(number)
    return found


def crossing(state, stays=()):
    """{name: size} of the parameters that cross devices apart from the small ones: not those of names that end so."""
    return {name: p.size for name, p in state.params.items() if not (sharding.is_small(p.shape) or name.endswith(tuple(stays)))}


ADALN = [f"{layer}.adaln.kernel" for layer in ("1", "final")]  # of a model of two blocks, with `zero`


def _step_and_arguments(config, axes):
    state, train_step, plan, mesh = build(config, axes)
    return train_step, state, next(batches(plan, mesh, 1))


@pytest.mark.parametrize("axes", [ZERO, FSDP])
def test_weights_are_gathered_by_nccl_between_processes(split_small, monkeypatch, axes):
    """Which brings a part to a node once, where an all-to-all would bring it once for each of its cards. In which way they
    cross changes no number."""
    train_step, state, batch = _step_and_arguments(small_settings(batch_size=1), axes)
    alone = jax.device_get(train_step(state, batch)[0].params)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    train_step, state, batch = _step_and_arguments(small_settings(batch_size=1), axes)
    text = train_step.lower(state, batch).as_text()
    assert text.count("stablehlo.all_gather") > 1 and "_xla_gpu_collective_stream" not in text
    found = transfers(train_step, state, batch)
    assert axes == FSDP or all(earlier == [*range(i)] for i, (*_, earlier) in enumerate(found))
    together = train_step(state, batch)[0].params
    monkeypatch.undo()
    chex.assert_trees_all_equal(jax.device_get(together), alone)


def test_fsdp_gathers_block_by_block_and_again_for_the_backward_pass(split_small):
    """Every block's weights cross twice, but the last one's; each time only after all activations (or their gradients) in
    front of the neighbouring block have been computed, so that never more than two blocks are gathered."""
    depth = 5
    config = small_settings(**DEEPER | {"model__depth": depth}, batch_size=1)
    state, train_step, plan, mesh = build(config, FSDP)
    found = transfers(train_step, state, next(batches(plan, mesh, 1)))
    sizes = crossing(state, [sharding.COLUMNS])
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    assert sum(size for size, *_ in found) == 2 * sum(sizes.values()) + blocks * (depth - 1) // depth
    forward = [matmuls for _, matmuls, _ in found[: 1 + depth]]  # what is around the blocks, block 0, 1, ...
    # The matmuls of a block: qkv, two of attention, projection, two of the MLP. Block 1 waits for the patches'.
    assert forward[:3] == [0, 0, 2]
    assert forward[3] == forward[2] + 2 + 2 + 6  # the conditioning; modulations of all blocks together, and the last layer's
    assert all(after == before + 6 for before, after in itertools.pairwise(forward[3:]))
    backward = range(1 + depth, 1 + depth + 2 * depth - 1)  # weights of the next block, sums of this one's gradients, ...
    assert all(found[i][0] == blocks // depth for i in backward)
    weights, sums = [*backward[:-1:2]], [*backward[1:-1:2], backward[-1]]
    behind = [found[i][1] for i in weights]
    assert behind[0] > 2 + 2 + 2 + 6 * depth  # the whole forward pass
    # Gradients of activations, not of weights: all that reads a block's weights.
    assert all(after == before + 8 for before, after in itertools.pairwise(behind))
    assert not any(set(sums) & set(found[i][2]) for i in weights)
    assert all(before in found[i][2] for before, i in itertools.pairwise(sums))
    program = jax.make_jaxpr(train_step)(state, next(batches(plan, mesh, 1))).jaxpr
    assert sum(eqn.primitive.name == "optimization_barrier" for eqn, _ in equations(program)) == depth  # around what all share


def operands(config, axes, primitive, by_columns=False):
    """{type: number of elements} of what goes into the collectives of one kind, in the program before it is compiled, of
    weights and gradients or of what crosses instead of them; and how many parameters cross."""
    state, train_step, plan, mesh = build(config, axes)
    sizes = {}
    for eqn, _ in equations(jax.make_jaxpr(train_step)(state, next(batches(plan, mesh, 1))).jaxpr):
        if eqn.primitive.name.startswith(primitive) and ("by_columns" in str(eqn.source_info.name_stack)) == by_columns:
            for operand in eqn.invars:
                sizes[str(operand.aval.dtype)] = sizes.get(str(operand.aval.dtype), 0) + operand.aval.size
    return sizes, sum(crossing(state, ADALN if axes == ZERO else ()).values())


def test_rows_have_the_derivatives_of_an_index():
    """Backward, forward, and forward over backward, with rows that are chosen several times and rows that are not; and inside a
    `jax.shard_map` of one's own, which checks types that the step's does not."""
    table, direction, weights = (jax.random.normal(key, (8, 5)) for key in jax.random.split(jax.random.key(0), 3))
    index = jnp.array([3, 0, 3, 6, 3, 0, 1, -1])
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("d",))
    results = []
    for choose in (model.rows, lambda table, index: table[index]):

        def function(table, choose=choose):
            return jnp.sum(weights * jnp.sin(choose(table, index)))

        def of_one_device(table, index, weights, choose=choose):
            return jax.lax.psum(jnp.sum(weights * jnp.sin(choose(table, index))), "d")

        spread = jax.shard_map(of_one_device, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
        both = jax.jvp(jax.value_and_grad(function), (table,), (direction,))
        results.append((*jax.jvp(function, (table,), (direction,)), *both, jax.jit(jax.grad(spread))(table, index, weights)))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer, axes", [("adamw", (1, 1, 1)), ("muon", ZERO), ("adamw", FSDP)])
def test_no_sum_depends_on_the_order_of_threads(split_small, optimizer, axes):
    """On a GPU a scatter adds by atomics, in another order each time, unless it writes to an address once, as that of the class
    loss: one in each row of the batch. (Kernels are opaque here; `bench kernels` repeats them on a card.)"""
    config = small_settings(**EVERYTHING, batch_size=4, optim__name=optimizer)
    state, train_step, plan, mesh = build(config, axes)
    program = jax.make_jaxpr(train_step)(state, next(batches(plan, mesh, 1))).jaxpr
    kinds = ("scatter", "cumsum", "cumlogsumexp", "reduce_window", "ffi_call")
    found = [eqn for eqn, _ in equations(program) if any(kind in eqn.primitive.name for kind in kinds)]
    for eqn in found:
        assert eqn.primitive.name.startswith("scatter"), eqn
        table, indices, _ = (var.aval.shape for var in eqn.invars)
        assert tuple(eqn.params["dimension_numbers"].operand_batching_dims) == (0,) and table[0] == np.prod(indices[:-1]), eqn
    assert found  # the class loss's


@pytest.mark.parametrize("axes, primitive", [(DATA, "psum"), (ZERO, "all_to_all")])
def test_gradients_cross_devices_in_bfloat16_where_asked(split_small, axes, primitive):
    """(The CPU widens a bfloat16 all-reduce when it compiles, so this is read off the program before.)"""
    sizes, large = operands(small_settings(batch_size=1, mesh__comm_dtype="bfloat16"), axes, primitive)
    assert sizes.pop("bfloat16") == large + (axes == ZERO) * 8 * exchange.TURN
    assert sum(sizes.values()) - (axes == ZERO) * large < 0.4 * large  # weights; biases, norm weights, loss and count


def test_adaln_crosses_as_inputs_and_products(split_small):
    """Its kernels neither as weights nor as gradients, where a device has columns of them: instead the conditioning of all
    images to all devices and each image's modulations to its device; back their gradients, in the compute type."""
    config = small_settings(**DEEPER, batch_size=2, dtype="bfloat16", mesh__comm_dtype="bfloat16")
    width = config.model.width
    for axes, layers in ((ZERO, [6, 2]), (FSDP, [6, 6, 2])):  # with `zero` the first block does not wait for products
        sizes, _ = operands(config, axes, "all_to_all", by_columns=True)
        assert sizes == {"bfloat16": 2 * (8 * 2 * width + 2 * width * sum(layers))}
    config = small_settings(**DEEPER, batch_size=2, optim__accumulation_steps=2)
    sizes, _ = operands(config, ZERO, "all_to_all", by_columns=True)
    assert not sizes  # nothing crosses in earlier micro-batches


def test_gradients_of_half_precision_cross_as_they_are(split_small):
    """With bfloat16 matmuls the gradients of matrices are bfloat16 numbers: sent as such, they cost half and lose nothing."""
    config = small_settings(batch_size=1, dtype="bfloat16")
    sizes, large = operands(config, ZERO, "all_to_all")
    state, *_ = build(config, ZERO)
    tables = sum(size for name, size in crossing(state).items() if not name.endswith(".kernel"))
    turn = 8 * exchange.TURN
    found = transfers(*_step_and_arguments(config, ZERO))
    assert all(earlier == [*range(i)] for i, (*_, earlier) in enumerate(found))  # those of either type
    assert tables and sizes["float32"] == 2 * (tables + turn)  # embeddings, which are added up in float32; their gradients
    assert (sizes["bfloat16"] - 2 * (large - tables)) // turn in range(2, 8)


@pytest.mark.slow
def test_gradients_of_half_precision_are_summed_in_float32(split_small):
    config = small_settings(batch_size=1, dtype="bfloat16")
    states = [run(config, axes, steps=2)[1] for axes in (DATA, ZERO)]
    for name, value in states[0].params.items():
        if name != "final.adaln.kernel":  # its gradient is one matmul over the images of all devices
            np.testing.assert_allclose(states[1].params[name], value, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("axes", [(1, 4, 1), (1, 1, 2), pytest.param((2, 1, 4), marks=pytest.mark.slow)])
def test_modulations_of_many_blocks_are_those_of_one_device(split_small, axes):
    """Several kernels of one shape, the same conditioning, and the last layer's."""
    config = small_settings(**DEEPER | {"model__depth": 4}, batch_size=8 // int(np.prod(axes)))
    (losses, state), (expected, reference) = run(config, axes), run(dataclasses.replace(config, batch_size=8), (1, 1, 1))
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    for name, value in reference.params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-5, err_msg=name)


LOWERED = """
import hashlib, os, sys
os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
sys.path[:0] = ["tests"]
import test_step
from jitjax import sharding
sharding.SMALLEST_SPLIT = 64
for axes in ((2, 2, 1), (2, 1, 2)):
    settings = test_step.small_settings(**test_step.DEEPER, batch_size=2)
    train_step, *arguments = test_step._step_and_arguments(settings, axes)
    print(hashlib.sha256(train_step.lower(*arguments).as_text().encode()).hexdigest())
"""


@pytest.mark.slow
def test_every_process_has_the_same_program():
    """Whatever Python's hash of strings, in which order sets are gone through: otherwise every start would compile again, and
    processes might send in different orders."""

    def lowered(seed):
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        return subprocess.run([sys.executable, "-c", LOWERED], cwd=root, env=environment, capture_output=True, text=True).stdout

    first, second = lowered("1"), lowered("3")
    assert len(first.split()) == 2 and first == second


def test_products_by_columns_have_float32_gradients():
    """Of bfloat16 rows and kernels: weight gradients that no device has rounded, against float64."""

    def draw(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)

    rows, grads, kernels = draw(0, 24, 16), draw(1, 2, 24, 8), [draw(2 + i, 16, 8).astype(jnp.float32) for i in range(2)]
    product, backward = jax.vjp(lambda *args: exchange._products(*args, pack.PLAIN), rows, kernels)
    exact = [np.asarray(x, np.float64) for x in (rows, grads, jnp.stack(kernels))]
    np.testing.assert_allclose(product.astype(jnp.float32), exact[0] @ exact[2], rtol=2**-8, atol=1e-2)
    of_rows, of_kernels = backward(grads)
    np.testing.assert_allclose(of_kernels, np.einsum("bd,kbp->kdp", exact[0], exact[1]), rtol=1e-5, atol=1e-5)
    expected = np.einsum("kbp,kdp->bd", exact[1], exact[2])
    np.testing.assert_allclose(of_rows.astype(jnp.float32), expected, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("group_bytes, groups", [(1, 4), (10**9, 1)])
def test_gradients_of_neighbouring_blocks_cross_together(split_small, monkeypatch, group_bytes, groups):
    """A small group is one block, or what is behind the blocks, or in front of them; a large one is the whole model. Weights
    cross block by block in any case, in the opposite order. Every transfer depends on what the one before it has brought:
    otherwise XLA is free to put all of them at one end of the step, and does."""
    monkeypatch.setattr(gradients, "GROUP_BYTES", group_bytes)
    state, train_step, plan, mesh = build(small_settings(**DEEPER, batch_size=1), ZERO)
    found = transfers(train_step, state, next(batches(plan, mesh, 1)))
    large = crossing(state, ADALN)
    weights, sums = found[:-groups], found[-groups:]
    first, second = (sum(size for name, size in large.items() if name.startswith(f"blocks.{i}.")) for i in range(2))
    behind = sum(size for name, size in large.items() if name.startswith(gradients.BEHIND))
    front = sum(large.values()) - behind - first - second
    assert [size for size, *_ in weights] == [front + first, second, behind]
    assert [size for size, *_ in sums] == ([behind, second, first, front] if groups > 1 else [sum(large.values())])
    assert all(earlier == [*range(i)] for i, (*_, earlier) in enumerate(found))
    assert all(matmuls == 0 for _, matmuls, _ in weights)


def test_transfers_are_scheduled_as_measured(split_small, monkeypatch):
    """The training step packs by the run's kernels, sends on a stream of its own, and is compiled for GPUs with options of
    ours, but for those that the user's flags name."""
    config = small_settings(batch_size=1)
    state, train_step, plan, mesh = build(config, ZERO)
    text = train_step.lower(state, next(batches(plan, mesh, 1))).as_text()
    found = transfers(train_step, state, next(batches(plan, mesh, 1)))
    assert text.count('_xla_gpu_collective_stream = "p2p"') == 1 < len(found)  # gradients, not weights
    used = kernels.PLAIN.packing._make(mock.Mock(side_effect=function) for function in kernels.PLAIN.packing)
    monkeypatch.setattr(kernels, "PLAIN", dataclasses.replace(kernels.PLAIN, packing=used))
    _, train_step, plan, mesh = build(config, ZERO)
    train_step.lower(state, next(batches(plan, mesh, 1)))
    gathers = used.unpack.call_count  # gradients are not unpacked
    batches_of_adaln = 1  # the last layer's
    assert 0 < gathers < used.pack.call_count == len(found) + batches_of_adaln

    def options(zero, fsdp=1, platform="gpu"):
        devices = np.array([mock.Mock(platform=platform)])
        return exchange.compiler_options(mock.Mock(shape={"zero": zero, "fsdp": fsdp}, devices=devices))

    assert len(exchange.SCHEDULE) == 3 and exchange.SCHEDULE["xla_gpu_dot_merger_threshold_mb"] == 0
    assert options(2) == options(1, 2) == exchange.SCHEDULE and options(1) is None and options(2, 1, "cpu") is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    assert options(2).keys() == exchange.SCHEDULE.keys() - {"xla_gpu_enable_latency_hiding_scheduler"}


def test_earlier_micro_batches_are_added_without_the_loss_scale(split_small):
    """float16, whose gradients carry a scale: on several devices the same as on one."""
    config = small_settings(**DEEPER, dtype="float16", batch_size=2, optim__accumulation_steps=2)
    alone = small_settings(**DEEPER, dtype="float16", batch_size=8, optim__accumulation_steps=4)
    (losses, state), (expected, reference) = run(config, (1, 8, 1)), run(alone, (1, 1, 1))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    for name, value in reference.params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-3, err_msg=name)


def test_optimizer_and_ema_run_once_per_optimizer_step():
    """AdamW's square roots stand outside the scan over micro-batches, and the averages move once by their formula."""
    config = small_settings(batch_size=1, optim__accumulation_steps=4)
    state, train_step, plan, mesh = build(config, ZERO)
    before = jax.device_get(state.params)
    batch = next(batches(plan, mesh, 1))

    jaxpr = jax.make_jaxpr(train_step)(state, batch).jaxpr
    roots = [inside for eqn, inside in equations(jaxpr) if eqn.primitive.name == "sqrt"]
    assert len(roots) == len(before) + 2  # one a parameter, two for norms: are the sums finite, and the gradient's
    assert not any("scan" in inside or "while" in inside for inside in roots)

    state, _ = train_step(state, batch)
    assert int(state.opt_state[0].count) == 1
    for decay in (0.9, 0.5):
        for name, value in state.params.items():
            expected = decay * before[name] + (1 - decay) * np.asarray(value)
            np.testing.assert_allclose(state.ema[str(decay)][name], expected, atol=1e-6)


def test_fsdp_splits_parameters_optimizer_and_averages():
    """On a 2x4 mesh each device holds a quarter of what is split, of every part of the state."""
    config = small_settings(model__width=128, model__heads=4)
    state, *_ = build(config, (2, 1, 4))
    moments = {"mu": state.opt_state[0].mu, "nu": state.opt_state[0].nu}
    for part in (state.params, *state.ema.values(), *moments.values()):
        kernel = part["blocks.0.attn.qkv.kernel"]
        assert kernel.shape == (128, 384) and kernel.addressable_shards[0].data.shape == (32, 384)
        per_device = {}
        for value in part.values():
            for shard in value.addressable_shards:
                per_device[shard.device] = per_device.get(shard.device, 0) + shard.data.nbytes
        whole = sum(value.nbytes for value in part.values())
        small = sum(value.nbytes for value in part.values() if value.sharding.is_fully_replicated)
        assert small < 0.1 * whole
        assert set(per_device.values()) == {small + (whole - small) // 4}


def test_non_finite_micro_gradient_is_left_out():
    """One micro-batch with a NaN gradient among four: the sum holds the three others and the count says three."""

    def loss(params, images, labels, keys):
        return jnp.where(labels == 9, jnp.nan, 1.0) * jnp.sum(params["w"]) * labels

    batch = {"image": jnp.zeros((4, 2, 2, 3), jnp.uint8), "label": jnp.array([1, 2, 9, 3])}
    keys = jax.random.split(jax.random.key(0), 4)
    objective = gradients.objective_of(loss)
    grads, loss_sum, count = gradients.accumulate(objective, {"w": jnp.ones(3)}, batch, keys, jnp.float32(1), micro_batches=4)
    np.testing.assert_array_equal(grads["w"], [6.0, 6.0, 6.0])
    assert float(count) == 3 and float(loss_sum) == 3 * 6


@pytest.mark.parametrize(
    "bad, used",
    [(1, (1, 3, 4, 5, 6)), (5, (1, 2, 4, 5))],
    ids=["an earlier micro-batch of one device", "the last one, and with it that of all devices"],
)
def test_non_finite_micro_gradient_of_one_device_of_two(bad, used):
    """Two devices with three micro-batches each. What was sent under the last one's backward pass is sent again without it."""

    def loss(params, images, labels, keys):
        return jnp.where(labels == 9, jnp.nan, 1.0) * jnp.sum(params["w"]) * labels

    labels = jnp.array([1, 2, 3, 4, 5, 6]).at[bad].set(9)
    mesh = sharding.make_mesh(1, 2, 1, jax.devices()[:2])
    params = {"w": jnp.ones((256, 128))}
    specs = sharding.specs(params, mesh)
    assert any(specs["w"])
    summed = gradients.make(loss, jax.eval_shape(lambda: params), mesh, micro_batches=3, dtype="float32", comm_dtype="float32")
    batch = {"image": jnp.zeros((6, 2, 2, 3), jnp.uint8), "label": labels}
    program = jax.shard_map(
        lambda params, batch, keys: summed(params, batch, keys, jnp.float32(1)),
        mesh=mesh,
        in_specs=(specs, sharding.BATCH, sharding.BATCH),
        out_specs=(specs, sharding.P(), sharding.P()),
        check_vma=False,
    )
    grads, loss_sum, count = jax.jit(program)(params, batch, jax.random.split(jax.random.key(0), 6))
    np.testing.assert_array_equal(grads["w"], np.full((256, 128), sum(used)))
    assert float(count) == len(used) and float(loss_sum) == sum(used) * params["w"].size


def test_a_loss_that_is_not_finite_changes_nothing():
    """Also where the gradient is finite: infinity plus a constant has the gradient of the constant."""
    config = small_settings(batch_size=1, optim__accumulation_steps=2)
    state, _, plan, mesh = build(config, ZERO)

    def loss(params, images, labels, keys):
        return jnp.sum(jnp.square(params["final.linear.bias"] - 1)) + jnp.where(labels == labels, jnp.inf, 0.0)

    train_step = step.make_train_step(
        loss, state, mesh, optim=config.optim, schedule=lambda number: 0.1, seed=0, dtype="float32"
    )
    before = jax.device_get(state)
    state, metrics = train_step(state, next(batches(plan, mesh, 1)))
    assert np.isfinite(metrics["train/grad_norm"]) and float(metrics["train/skipped_micro_batches"]) == 16
    chex.assert_trees_all_equal((before.params, before.opt_state, before.ema), (state.params, state.opt_state, state.ema))
    assert int(state.step) == 1


def test_float16_overflow_skips_the_step_and_halves_the_scale():
    """A scale that overflows leaves weights, moments and averages as they are; training goes on at half the scale."""
    config = small_settings(batch_size=1, dtype="float16")
    state, train_step, plan, mesh = build(config, ZERO)
    moved = {**state.params, "final.linear.kernel": state.params["final.linear.kernel"] + 10.0}
    scale = {**state.loss_scale, "scale": jnp.float32(2.0**24)}
    state = step.TrainState(
        state.step, moved, state.opt_state, state.ema, jax.device_put(scale, NamedSharding(mesh, sharding.P()))
    )
    before = jax.device_get(state)
    first, second = batches(plan, mesh, 2)
    state, metrics = train_step(state, first)
    assert not np.isfinite(metrics["train/grad_norm"]) and float(metrics["train/skipped_micro_batches"]) > 0
    for old, new in zip(
        jax.tree.leaves((before.params, before.opt_state, before.ema)),
        jax.tree.leaves((state.params, state.opt_state, state.ema)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert float(state.loss_scale["scale"]) == 2.0**23 and int(state.step) == 1
    good = {**state.loss_scale, "scale": jax.device_put(jnp.float32(1.0), NamedSharding(mesh, sharding.P()))}
    state, metrics = train_step(step.TrainState(state.step, state.params, state.opt_state, state.ema, good), second)
    assert np.isfinite(metrics["train/grad_norm"]) and int(state.opt_state[0].count) == 1


@pytest.mark.parametrize("dtype, rtol", [("bfloat16", 2e-2), pytest.param("float16", 4e-3, marks=pytest.mark.slow)])
def test_half_precision_follows_float32(reference, dtype, rtol):
    config = small_settings(**EVERYTHING, batch_size=4, dtype=dtype)
    losses, state = run(config, ZERO)
    np.testing.assert_allclose(losses, reference[0], rtol=rtol)
    assert all(value.dtype == np.float32 for value in state.params.values())


def test_clipping_bounds_the_update():
    """With clipping the norm that AdamW sees is the bound: its first moment after one step is (1 - b1) * bound long."""
    config = small_settings(batch_size=4, optim__clip_norm=1e-3)
    state, train_step, plan, mesh = build(config, ZERO)
    state, metrics = train_step(state, next(batches(plan, mesh, 1)))
    assert float(metrics["train/grad_norm"]) > 1e-2  # the logged norm is the unclipped one
    length = np.sqrt(sum(float(jnp.sum(jnp.square(m))) for m in state.opt_state[0].mu.values()))
    np.testing.assert_allclose(length, 0.1 * 1e-3, rtol=1e-4)


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_remat_changes_memory_not_numbers(reference, remat):
    losses, state = run(small_settings(**EVERYTHING, batch_size=4, remat=remat), ZERO)
    np.testing.assert_allclose(losses, reference[0], rtol=2e-6)
    for name, value in reference[1].params.items():  # of so few steps losses hardly depend on the blocks; weights do
        np.testing.assert_allclose(state.params[name], value, atol=2e-5, err_msg=name)


def test_mesh_that_does_not_fit_says_which_would():
    with pytest.raises(sharding.UserError, match="mesh.data=3 .*needs 6 devices, there are 8: .* each one of 1, 2, 4, 8"):
        sharding.make_mesh(3, None, 1)
    with pytest.raises(sharding.UserError, match="one of zero and fsdp"):
        sharding.make_mesh(None, 2, 4)


@pytest.mark.parametrize(
    "asked, sizes",
    [
        ((None, None, 1), ZERO),
        ((8, None, 1), DATA),
        ((4, None, 1), HYBRID),
        ((None, 2, 1), HYBRID),
        ((None, None, 4), (2, 1, 4)),
    ],
)
def test_mesh_by_default_shards_the_optimizer_over_what_is_left(asked, sizes):
    assert tuple(sharding.make_mesh(*asked).shape.values()) == sizes
