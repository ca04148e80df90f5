"""The fused operations equal the plain ones, in value and in every gradient, and lower for CUDA at every published size.

On a CPU the fused kernels run in Pallas' interpreter. Lowering needs no GPU: it shows that a kernel uses nothing that the
Triton backend of this jax refuses (not that it fits registers).
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_settings
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jitjax import kernels
from jitjax import model as jit_model
from jitjax.errors import UserError
from jitjax.geometry import geometry_of, make_geometry
from jitjax.kernels import attention, hopper_norm, hopper_rope, lowered, masks, mosaic, norm, pack, swiglu, triton

PLAIN, FUSED = kernels.get_ops("plain"), kernels.get_ops("fused")
# Published: width, heads, SwiGLU hidden width.
SIZES = {"B": (768, 12, 2048), "L": (1024, 16, 2730), "H": (1280, 16, 3413), "G": (1664, 16, 4437)}
SLOW = pytest.param(288, 0, 4, 80, marks=pytest.mark.slow)  # tokens, dropped, heads, features


def draws(seed=0):
    """normal(*shape): fresh float32 numbers at every call."""
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def values_and_gradients(function, arguments, cotangents):
    @jax.jit
    def run(arguments, cotangents):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, value))

    return jax.tree.leaves(run(arguments, cotangents))


def relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(value - reference) / (np.linalg.norm(reference) + 1e-30)


def assert_same(function, arguments, cotangents, tolerance=3e-6):
    """`function(ops, *arguments)` and its gradients are the same for both implementations."""
    plain = values_and_gradients(functools.partial(function, PLAIN), arguments, cotangents)
    fused = values_and_gradients(functools.partial(function, FUSED), arguments, cotangents)
    for i, (a, b) in enumerate(zip(fused, plain, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, b) < tolerance, f"output {i}"


def norm_inputs(b, t, d):
    """x, branch, bias, gate, weight, shift, scale; cotangents of x and h."""
    normal = draws()
    x, branch, dx, dh = (normal(b, t, d) for _ in range(4))
    return (x, branch, normal(d), normal(b, d), 1 + 0.3 * normal(d), normal(b, d), 0.3 * normal(b, d)), (dx, dh)


def attention_inputs(b, t, heads, n, width=8):
    """h, qkv kernel, bias, q and k norm weight; cotangent; cos and sin."""
    normal = draws()
    angles = jnp.repeat(3 * normal(t, n // 2), 2, axis=1)
    parameters = normal(width, 3 * heads * n), normal(3 * heads * n), 1 + 0.3 * normal(n), 1 + 0.3 * normal(n)
    return (normal(b, t, width), *parameters), normal(b, t, heads * n), (jnp.cos(angles), jnp.sin(angles))


def projected_attention(ops, h, *weights, rope, heads, drop=0):
    """From the input of the qkv projection on, with weights in the published order, as the model does it."""
    kernel, *rest = ops.prepare_qkv(*weights, heads)
    return ops.qkv_attention(h @ kernel.astype(h.dtype), *rest, *rope, heads, drop)


def mlp_inputs(b, t, d, f):
    """h, w12, bias, w3; cotangent."""
    normal = draws()
    return (normal(b, t, d), d**-0.5 * normal(d, 2 * f), normal(2 * f), f**-0.5 * normal(f, d)), normal(b, t, d)


# Rows that tile evenly, rows that do not, a width that is no power of two, and one above a single tile's worth of rows.
@pytest.mark.parametrize("shape", [(2, 8, 128), (2, 5, 24), (1, 51, 96)])
def test_norm_operations(shape):
    arguments, cotangents = norm_inputs(*shape)
    x, branch, bias, gate, weight, shift, scale = arguments
    assert_same(lambda ops, *a: ops.residual_norm_modulate(*a), arguments, cotangents)
    assert_same(lambda ops, *a: ops.norm_modulate(*a), (x, weight, shift, scale), cotangents[1])
    assert_same(lambda ops, *a: ops.gated_residual(*a), (x, branch, bias, gate), cotangents[0])


def test_norm_gradients_where_one_output_is_unused():
    """Behind the last block nobody uses the residual stream, and its cotangent is a symbolic zero."""
    arguments, cotangents = norm_inputs(2, 6, 24)
    for used in (0, 1):
        assert_same(lambda ops, *a, i=used: ops.residual_norm_modulate(*a)[i], arguments, cotangents[used])


@pytest.mark.parametrize("width", [256, pytest.param(896, marks=pytest.mark.slow)])
def test_hopper_norm(width, monkeypatch):
    """In Pallas' simulation; a row on one warp and on two, with and without tokens to drop and a gradient from behind."""
    monkeypatch.setattr(norm, "_on_hopper", lambda *shape: True)
    monkeypatch.setattr(
        norm,
        "hopper_norm",
        types.SimpleNamespace(
            forward=functools.partial(hopper_norm.forward, interpret=True),
            backward=functools.partial(hopper_norm.backward, interpret=True),
        ),
    )
    (x, branch, *vectors), (dx, dh) = norm_inputs(1, 24, width)
    _, _, weight, shift, scale = vectors
    for tokens in (24, 20):
        arguments = x, branch[:, :tokens], *vectors
        assert_same(lambda ops, *a: ops.residual_norm_modulate(*a), arguments, (dx[:, :tokens], dh[:, :tokens]))
    assert_same(lambda ops, *a: ops.residual_norm_modulate(*a)[1], (x, branch, *vectors), dh)
    assert_same(lambda ops, *a: ops.norm_modulate(*a), (x, weight, shift, scale), dh)


@pytest.mark.parametrize("tokens", [8, 9, 3])
def test_norm_drops_the_leading_tokens_that_the_branch_lacks(tokens):
    (x, branch, *vectors), (dx, dh) = norm_inputs(2, 12, 24)
    arguments = x, branch[:, :tokens], *vectors
    assert_same(lambda ops, *a: ops.residual_norm_modulate(*a), arguments, (dx[:, :tokens], dh[:, :tokens]))


@pytest.mark.parametrize("shape", [(2, 8, 128), (2, 37, 35)])
def test_swiglu(shape):
    b, t, f = shape
    normal = draws()
    assert_same(separate_swiglu, (normal(b, t, 2 * f), normal(2 * f)), normal(b, t, f))


def separate_swiglu(ops, *arguments):
    return (swiglu.plain_swiglu if ops is PLAIN else swiglu.fused_swiglu)(*arguments)


def test_mlp_and_its_padding():
    """43 hidden units are padded; dropout takes the same ones whether they are or not."""
    arguments, cotangent = mlp_inputs(2, 8, 12, 43)
    assert swiglu.pad_hidden(*arguments[1:])[0].shape[1] % 256 == 0
    assert_same(lambda ops, *a: ops.mlp(*a), arguments, cotangent)
    assert_same(lambda ops, *a: ops.mlp(*a, 0.3, jax.random.split(jax.random.key(1), 2)), arguments, cotangent)
    assert_same(lambda ops, *a: kernels.with_visible_matmuls(ops).mlp(*a), arguments, cotangent)


@pytest.mark.parametrize(
    ("b", "t", "f", "blocks", "rate"),
    [
        pytest.param(2, 128, 384, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(3, 72, 256, 2, 0.0, marks=pytest.mark.slow),
        (3, 72, 384, 1, 0.3),
    ],
)
def test_hopper_mlp(b, t, f, blocks, rate, monkeypatch):
    """In Pallas' simulation. 384 hidden units leave half a tile of columns backward, 216 rows part of a tile of rows. One block
    goes through all tiles, its ring buffers of operands, subtiles and biases refilled; two share them unevenly."""
    monkeypatch.setattr(mosaic, "multiprocessors", lambda: blocks)
    arguments, cotangent = mlp_inputs(b, t, 192, f)
    keys = jax.random.split(jax.random.key(1), b)

    def run(ops, *arguments):
        if ops is PLAIN:
            return ops.mlp(*arguments, rate, keys)
        return swiglu.hopper_mlp(*arguments, masks.keep_mask(keys, t, f, rate) if rate else None, rate)

    assert_same(run, arguments, cotangent)


def test_dropout_mask():
    """Values stay at the rate, independent of neighbours, of other images and of the size of what it is for."""
    keys, rate = jax.random.split(jax.random.key(0), 3), 0.2
    keep = masks.keep_mask(keys, 64, 1001, rate)
    assert keep.shape == (3, 64, 1001) and set(np.unique(keep)) == {0, 1}
    wider = masks.keep_mask(keys[1:], 80, 1010, rate)
    np.testing.assert_array_equal(wider[:, :64, :1001], keep[1:])
    x = np.asarray(keep, np.float64) - (1 - rate)
    spread = np.sqrt(rate * (1 - rate) / 64 / 1001)  # of a mean over an image
    assert abs(x.mean((1, 2))).max() < 4 * spread
    shifted = [np.roll(x, shift, axis) for axis in (1, 2) for shift in (1, 2, 3, 4, 8)] + [np.roll(x, 1, 0)]
    assert max(abs((x * y).mean((1, 2))).max() for y in shifted) < 5 * rate * (1 - rate) / np.sqrt(64 * 1001)
    y = masks.dropout(jnp.ones((3, 64, 1001), jnp.bfloat16), rate, keys)
    assert set(np.unique(y.astype(jnp.float32))) == {0, 1.25}


# Head dimensions 64, 80 and 104 are the published ones; 37 tokens leave masked rows, 3 heads are no power of two.
@pytest.mark.parametrize(("t", "heads", "n"), [(64, 2, 64), (37, 3, 16), (40, 1, 80), (17, 2, 104), (80, 1, 12)])
def test_attention(t, heads, n):
    arguments, cotangent, rope = attention_inputs(1, t, heads, n)
    assert_same(functools.partial(projected_attention, rope=rope, heads=heads), arguments, cotangent)


@pytest.mark.parametrize(("t", "drop"), [(72, 8), (37, 20)])
def test_attention_with_tokens_that_are_keys_only(t, drop):
    arguments, cotangent, rope = attention_inputs(2, t, 2, 16)
    attend = functools.partial(projected_attention, rope=rope, heads=2, drop=drop)
    assert_same(attend, arguments, cotangent[:, drop:])


@pytest.mark.parametrize(
    ("t", "drop", "heads", "n"),
    [
        (96, 0, 3, 64),
        pytest.param(160, 0, 1, 64, marks=pytest.mark.slow),
        pytest.param(160, 32, 4, 64, marks=pytest.mark.slow),
        pytest.param(96, 0, 1, 80, marks=pytest.mark.slow),
        pytest.param(160, 32, 1, 80, marks=pytest.mark.slow),
        pytest.param(288, 0, 4, 80, marks=pytest.mark.slow),
    ],
)
def test_hopper_attention(t, drop, heads, n, monkeypatch):
    """The kernels for Hopper in Pallas' simulation of its barriers and copies. 96 and 160 queries leave half a tile, and one
    block loops over all pairs of image and head, with three of them twice through its two slots. 96 tokens are too few for
    the backward kernel, 4 heads the fewest for that of RoPE. Heads of 80 features have kernels of their own."""
    monkeypatch.setattr(mosaic, "multiprocessors", lambda: 1)
    monkeypatch.setattr(mosaic, "TRANSPOSED_STORES", True)  # no matter in the simulation
    arguments, cotangent, rope = attention_inputs(1, t, heads, n)

    def attend(ops, h, *weights):
        if ops is PLAIN:
            return projected_attention(ops, h, *weights, rope=rope, heads=heads, drop=drop)
        kernel, *rest = ops.prepare_qkv(*weights, heads)
        return attention._fused(h @ kernel, *rest, *rope, heads, drop, True)

    assert_same(attend, arguments, cotangent[:, drop:], tolerance=1e-5)
    # Where no gradient is wanted, the kernel for heads of 64 writes less. Waited for, since the simulation runs programs of its
    # own on the device, which would wait for what is put there in the meantime.
    without_gradient = jax.block_until_ready(attend(FUSED, *arguments))
    assert relative_error(without_gradient, attend(PLAIN, *arguments)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("n", [80, 64])
def test_hopper_rope_goes_through_many_images(n):
    """A ring buffer of two tiles, refilled many times; the last block with fewer tiles; queries and keys in several groups;
    against the Triton kernel. The values' third of the gradient stays as it is."""
    b, t, heads = 6, 16, 4
    normal = draws()
    gradients = normal(b, t, 3 * heads, n), normal(b, t, heads, n), normal(b, t, heads, n)
    qkv, bias, weights = normal(b, t, 3 * heads * n), normal(3 * heads * n), (1 + 0.3 * normal(n), 1 + 0.3 * normal(n))
    angles = normal(t, n // 2)
    doubled = (jnp.repeat(x, 2, axis=1) for x in (jnp.cos(angles), jnp.sin(angles)))
    want = attention._norm_rope_backward(*gradients, qkv, bias, *weights, *doubled, heads)
    for tiles in (hopper_rope.Tiles(1, 2, 4), hopper_rope.Tiles(2, 2, 3), None):
        shaped = qkv.reshape(gradients[0].shape), bias.reshape(-1, n)
        got = hopper_rope.backward(*gradients, *shaped, *weights, jnp.cos(angles), jnp.sin(angles), interpret=True, tiles=tiles)
        for i, (a, w) in enumerate(zip(got, want, strict=True)):
            assert relative_error(a.reshape(w.shape), w) < 3e-6, f"output {i}"


def test_attention_survives_extreme_scores():
    """Sharp softmax with rows of very negative scores: what stands in masked lanes (2^2000) must not reach the gradients."""
    (h, kernel, bias, q_weight, k_weight), cotangent, rope = attention_inputs(2, 3, 4, 12)
    arguments = h, kernel, bias, 40 * q_weight, 40 * k_weight
    attend = functools.partial(projected_attention, FUSED, rope=rope, heads=4)
    assert all(np.isfinite(x).all() for x in values_and_gradients(attend, arguments, cotangent))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fused_is_as_accurate_as_plain(dtype):
    """Against float32 on the same rounded inputs, in half precision, with a little room for another order of sums."""

    def check(function, activations, parameters, cotangents):
        rounded = [x.astype(dtype) for x in activations]
        reference = values_and_gradients(
            functools.partial(function, PLAIN), (*(x.astype(jnp.float32) for x in rounded), *parameters), cotangents
        )
        plain, fused = (
            values_and_gradients(functools.partial(function, ops), (*rounded, *parameters), cotangents)
            for ops in (PLAIN, FUSED)
        )
        for i, (r, p, f) in enumerate(zip(reference, plain, fused, strict=True)):
            assert relative_error(f, r) < 1.3 * relative_error(p, r) + float(jnp.finfo(dtype).eps) / 2, f"output {i}"

    (x, branch, bias, gate, weight, shift, scale), cotangents = norm_inputs(2, 32, 96)
    half = [c.astype(dtype).astype(jnp.float32) for c in cotangents]

    def residual_norm(ops, x, branch, gate, shift, scale, bias, weight):
        return ops.residual_norm_modulate(x, branch, bias, gate, weight, shift, scale)

    check(residual_norm, (x, branch, gate, shift, scale), (bias, weight), tuple(half))
    check(separate_swiglu, (draws()(2, 32, 192),), (draws()(192),), half[0])
    (h, *parameters), cotangent, rope = attention_inputs(1, 48, 2, 32)
    check(functools.partial(projected_attention, rope=rope, heads=2), (h,), parameters, cotangent)


def test_whole_model_with_fused_kernels():
    """The loss gradient of every parameter of a small JiT with context tokens and with nothing left at zero."""
    config = small_settings(model__depth=2, model__width=32)
    geometry = geometry_of(config.model, config.data.image_size, 4)
    normal = draws(1)
    params = {name: p + 0.1 * normal(*p.shape) for name, p in jit_model.init_fn(geometry)(jax.random.key(0)).items()}
    z, target = normal(2, 8, 8, 3), normal(2, 8, 8, 3)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, ops):
        def loss(params):
            model = jit_model.merge(jit_model.graphdef_of(geometry), params)
            return jnp.mean((model(z, jnp.array([0.2, 0.7]), jnp.array([1, 4]), ops=ops) - target) ** 2)

        return jax.value_and_grad(loss)(params)

    (plain_loss, plain), (fused_loss, fused) = gradient(params, PLAIN), gradient(params, FUSED)
    assert relative_error(fused_loss, plain_loss) < 1e-5
    errors = {name: relative_error(fused[name], plain[name]) for name in params}
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("devices, shapes", [(2, [(3, 7), (4096,), (5000,), (1,)]), (8, [(24, 8)]), (3, [(8192,), (64,)])])
def test_packing(devices, shapes, backwards, monkeypatch):
    """One row after the other, in one buffer, and apart again, whichever program runs last. Parts of another type are cast on
    the way, those of one row are in all rows, and what is behind the last one is left out."""
    if backwards:
        turned = types.SimpleNamespace(**{name: getattr(pl, name) for name in ("when", "cdiv")})
        turned.program_id = lambda axis: pl.num_programs(axis) - 1 - pl.program_id(axis)
        monkeypatch.setattr(pack, "pl", turned)
    normal = draws()
    drawn = [normal(devices if i % 3 else 1, *shape) for i, shape in enumerate([(5,), *shapes])]
    parts = [part.astype(jnp.bfloat16) if i % 2 else part for i, part in enumerate(drawn)]
    sizes = [part.size // len(part) for part in parts]
    for dtype in (jnp.bfloat16, jnp.float32):
        flat = [np.asarray(part.astype(dtype)).reshape(len(part), -1) for part in parts]
        expected = [np.broadcast_to(part, (devices, part.shape[1])) for part in flat]
        for ops in (PLAIN, FUSED):
            packed = ops.packing.pack(parts, dtype)
            assert packed.dtype == dtype
            np.testing.assert_array_equal(packed, np.concatenate(expected, axis=1))
            for part, row in zip(ops.packing.unpack(packed, sizes[:-1]), expected, strict=False):
                assert part.dtype == dtype
                np.testing.assert_array_equal(part, row)

    def there_and_back(*parts):
        return FUSED.packing.unpack(FUSED.packing.pack(parts, jnp.bfloat16), sizes)

    text = lower_for_cuda(there_and_back, *(struct(*part.shape) for part in parts))
    assert text.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("elements, fused", [(2**31 - pack.BLOCK, True), (2**31 - pack.BLOCK + 2, False)])
def test_pack_counts_to_the_end_of_its_last_block(elements, fused):
    """In 32 bits: where the masked rest of the last block would pass them, XLA concatenates."""
    programs = (
        jax.make_jaxpr(lambda part: FUSED.packing.pack([part], jnp.bfloat16))(struct(2, elements // 2)),
        jax.make_jaxpr(lambda packed: FUSED.packing.unpack(packed, [elements // 2 - 64]))(struct(2, elements // 2)),
    )
    for program in programs:
        assert any(eqn.primitive.name == "pallas_call" for eqn in program.eqns) == fused


@pytest.mark.parametrize("width", [1, 12, 24, 32, 40, 52, 64, 80, 104, 768, 1024, 1280, 1664, 4437])
@pytest.mark.parametrize("options", [{}, {"waste": 0.25}, {"smallest": 16}])
def test_spans_cover_a_row_once(width, options):
    spans = triton.spans(width, **options)
    covered = [i for p in spans for i in range(p.start, p.start + p.size) if p.limit is None or i < p.limit]
    assert covered == list(range(width))
    assert all(p.size & (p.size - 1) == 0 and p.size >= options.get("smallest", 1) for p in spans)


# ---------------------------------------------------------------- lowering for CUDA


def lower_for_cuda(function, *shapes, devices=1):
    """StableHLO text of `function` as it would be compiled for H200s."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def parameter(*shape):
    return struct(*shape, dtype=jnp.float32)


def with_gradient(function):
    def both(*arguments):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(value)

    return both


# The other sizes and numbers of tokens take long, and mostly the same paths.
@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        pytest.param(size, tokens, marks=[] if (size, tokens) in (("B", 288),) else pytest.mark.slow)
        for size in SIZES
        for tokens in (256, 288, 264, 77)
    ],
)
def test_every_published_size_lowers_for_cuda(size, tokens):
    width, heads, hidden = SIZES[size]
    n = width // heads
    x, vector = struct(2, tokens, width), struct(2, width)
    operations = {
        "residual_norm_modulate": (x, x, parameter(width), vector, parameter(width), vector, vector),
        "norm_modulate": (x, parameter(width), vector, vector),
        "gated_residual": (x, x, parameter(width), vector),
        "mlp": (x, parameter(width, 2 * hidden), parameter(2 * hidden), parameter(hidden, width)),
    }

    def mlp_with_dropout(*arguments):
        return FUSED.mlp(*arguments, 0.2, jax.random.split(jax.random.key(0), 2))

    def attend(qkv, bias, q_weight, k_weight):
        return FUSED.qkv_attention(qkv, bias, q_weight, k_weight, *jnp.ones((2, tokens, n)), heads)

    functions = {name: (getattr(FUSED, name), shapes) for name, shapes in operations.items()}
    functions["mlp, dropout"] = mlp_with_dropout, operations["mlp"]
    functions["qkv_attention"] = attend, (struct(2, tokens, 3 * width), parameter(3 * width), parameter(n), parameter(n))
    for name, (function, shapes) in functions.items():
        text = lower_for_cuda(with_gradient(function), *shapes)
        assert "__gpu$xla.gpu.triton" in text or "mosaic_gpu" in text, name
        if name == "qkv_attention":
            # Forward, RoPE's backward pass and between them attention's own, which jax 0.10 cannot lower for heads of 64.
            hopper = {64: 2 + mosaic.TRANSPOSED_STORES, 80: 3}.get(n, 0)
            only_rope = tokens % 8 == 0 and n in hopper_rope.HEAD_DIMS
            assert text.count("mosaic_gpu_v2") == (hopper if tokens % 32 == 0 else only_rope)
        elif name.startswith("mlp"):
            assert text.count("mosaic_gpu_v2") == 2
        elif "norm" in name:
            assert ("mosaic_gpu_v2" in text) == (tokens % 4 == 0)


def test_lowered_kernels_are_cached_between_starts(tmp_path, monkeypatch):
    """What a second start reads is what the first one lowered; a damaged file is lowered again."""
    x, vector = struct(2, 8, 256), struct(2, 256)

    def forward(x, weight, shift, scale):
        return hopper_norm.forward(x, weight, shift, scale)

    def lower():
        lowered._exported.cache_clear()  # as in a new process
        jax.clear_caches()
        text = lower_for_cuda(forward, x, parameter(256), vector, vector)
        return re.search(r"mosaic_gpu_v2.*?module = .*", text)[0]

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        first = lower()
        (file,) = (tmp_path / "kernels").iterdir()
        with monkeypatch.context() as patch:
            patch.setattr(jax.export, "export", None)  # not called
            assert lower() == first
        file.write_bytes(file.read_bytes()[:1000])
        assert lower() == first
        assert len(file.read_bytes()) > 1000
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.slow
def test_matmuls_stay_visible_where_remat_has_to_see_them():
    """`remat=dots` saves the results of XLA's matmuls only; inside our kernel they would be recomputed."""
    geometry = make_geometry("JiT-B/4", 64, 10, depth=1, context_length=0, width=256, heads=4)
    graphdef, params = jit_model.graphdef_of(geometry), jax.eval_shape(jit_model.init_fn(geometry), jax.random.key(0))

    def loss(params, z, t, y, remat):
        model = jit_model.merge(graphdef, params)
        return jnp.sum(model(z, t, y, dtype=jnp.bfloat16, ops=FUSED, remat=remat).astype(jnp.float32))

    shapes = params, struct(2, 64, 64, 3, dtype=jnp.float32), parameter(2), struct(2, dtype=jnp.int32)
    for remat, there in (("none", True), ("full", True), ("dots", False)):
        text = lower_for_cuda(jax.grad(functools.partial(loss, remat=remat)), *shapes)
        assert ("mlp_hopper" in text) == there, remat


def test_kernels_run_per_shard():
    """Under the train step's shard_map a fused operation moves nothing between devices."""
    spec = P("data")

    @functools.partial(jax.shard_map, in_specs=(spec, P(), spec, spec), out_specs=spec, check_vma=False)
    def sharded(x, weight, shift, scale):
        return with_gradient(FUSED.norm_modulate)(x, weight, shift, scale)[1][0]

    text = lower_for_cuda(sharded, struct(16, 256, 768), parameter(768), struct(16, 768), struct(16, 768), devices=8)
    assert "mosaic_gpu_v2" in text and "tensor<2x256x768xbf16>" in text
    assert not any(name in text for name in ("all_gather", "all_reduce", "all_to_all", "collective_permute"))


# ---------------------------------------------------------------- choice


def card(capability, kind="NVIDIA H200", platform="gpu"):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


def test_resolve_says_which_and_why(monkeypatch):
    monkeypatch.setattr(mosaic, "TRANSPOSED_STORES", False)  # as in jax 0.10

    def shape(**overrides):
        return dict(geometry=make_geometry("JiT-B/4", 64, 10, **overrides))

    b = shape()
    assert kernels.resolve("auto", dtype="bfloat16", device=card("9.0"), **b)[0] == "fused"
    assert kernels.resolve("plain", dtype="bfloat16", device=card("9.0"), **b)[0] == "plain"
    for device, dtype, words in (
        (card("8.0", "NVIDIA A100"), "bfloat16", "A100"),
        (card("7.0", "NVIDIA V100"), "float16", "Ampere"),
        (card("gfx942", "AMD MI300X"), "bfloat16", "NVIDIA"),
        (card("9.0"), "float32", "float32"),
        (None, "bfloat16", "cpu"),
    ):
        name, reason = kernels.resolve("auto", dtype=dtype, device=device, **b)
        assert name == "plain" and words in reason
    assert kernels.resolve("fused", dtype="bfloat16", device=card("8.0"), **b)[0] == "fused"  # the user knows better
    for overrides, words in (
        ({}, "attention by the Hopper kernels, backward by the Triton ones for jax"),
        ({"patch_size": 2}, "Triton kernels for 1024 tokens"),
        ({"heads": 16}, "Triton kernels for heads of 48 features, not 64 or 80"),
    ):
        assert words in kernels.resolve("auto", dtype="bfloat16", device=card("9.0"), **shape(**overrides))[1]
    wide = shape(width=1280, heads=16)
    assert kernels.resolve("auto", dtype="bfloat16", device=card("9.0"), **wide)[1].endswith("attention by the Hopper kernels")
    with pytest.raises(UserError, match=r"--config\.kernels=fused cannot run here"):
        kernels.resolve("fused", dtype="bfloat16", **b)
    with pytest.raises(UserError, match="auto, fused or plain"):
        kernels.resolve("fast", dtype="bfloat16", **b)


def test_norm_statistics_are_float32_in_half_precision():
    """Squares of bfloat16 activations of this size overflow or lose everything if summed in half precision."""
    x = jnp.full((1, 4, 64), 3e4, jnp.float16)
    one, zero = jnp.ones((64,)), jnp.zeros((1, 64), jnp.float16)
    for function in (norm.plain_norm_modulate, norm.fused_norm_modulate):
        np.testing.assert_allclose(np.asarray(function(x, one, zero, zero), np.float32), 1.0, rtol=1e-3)
