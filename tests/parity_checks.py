"""Our numbers against the official PyTorch code's (tests/parity, and ../shared/parity for what is large), as rows of one table.

`CHECKS` maps a name to a function that returns `Row`s. test_parity.py asserts every row, parity_report.py prints them and
shows, with --mutations, that they notice mistakes. Float32 on the CPU; tolerances are those of the reference files' README.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from parity_files import Sample, find, load  # noqa: E402
from parity_rows import Row, SeededStateDict, compare, geometry_of, nchw, nhwc, small_model, small_params, worst  # noqa: E402
from PIL import Image  # noqa: E402

import jitjax  # noqa: E402
from jitjax import config as config_lib  # noqa: E402
from jitjax import diffusion, kernels, optimizer, sampling, settings, sharding, step  # noqa: E402
from jitjax import gradients as gradients_lib  # noqa: E402
from jitjax import model as jit_model  # noqa: E402
from jitjax.from_settings import Setup, make_loss, make_step  # noqa: E402
from jitjax.geometry import make_geometry
from jitjax.interop import official  # noqa: E402
from jitjax.kernels import attention  # noqa: E402
from jitjax.plan import make_plan  # noqa: E402

# ---------------------------------------------------------------- model


@dataclasses.dataclass
class Recorder:
    """`kernels.Ops` that record what goes through the residual stream. For use without jit."""

    streams: list = dataclasses.field(default_factory=list)  # (branch with its bias, x after it), two a block
    entries: list = dataclasses.field(default_factory=list)  # x where no branch was pending: first block, context start

    def ops(self) -> kernels.Ops:
        plain = kernels.get_ops("plain")

        def residual_norm_modulate(x, branch, bias, *rest):
            out = plain.residual_norm_modulate(x, branch, bias, *rest)
            self.streams.append((branch + bias, out[0]))
            return out

        def gated_residual(x, branch, bias, gate):
            out = plain.gated_residual(x, branch, bias, gate)
            self.streams.append((branch + bias, out))
            return out

        def norm_modulate(x, *rest):
            self.entries.append(x)
            return plain.norm_modulate(x, *rest)

        return dataclasses.replace(
            plain,
            residual_norm_modulate=residual_norm_modulate,
            gated_residual=gated_residual,
            norm_modulate=norm_modulate,
        )


def recorded_forward(model: jit_model.JiT, z, t, y) -> tuple[jax.Array, Recorder]:
    recorder = Recorder()
    with jax.disable_jit():
        out = model(z, t, y, ops=recorder.ops())
        if model.geometry.context_length:
            # The model cuts context tokens off inside its last block; the reference holds them to the block's end.
            g, x = model.geometry, recorder.streams[-3][1]
            del recorder.streams[-2:]
            c = jax.nn.silu(model.t_embedder(t, jnp.float32) + model.y_embedder(y))
            rope = jit_model.rope_tables(g.head_dim, g.grid, g.context_length)
            x, pending = model.blocks[-1](x, None, c, rope, None, recorder.ops())
            recorder.ops().gated_residual(x, *pending)
        return out, recorder


def forward_tiny() -> list[Row]:
    """Output and every stored activation of the tiny model; its weights come out of the recipe as stored."""
    f, name = load("tiny_forward.npz"), "tiny_forward"
    g, model = geometry_of(f["config"]), small_model(load("tiny_forward.npz"))
    z, t, y = jnp.asarray(nhwc(f["x"])), jnp.asarray(f["t"]), jnp.asarray(f["y"], jnp.int32)
    stored = {key[3:]: value for key, value in f.items() if key.startswith("sd/")}
    ours = official.to_state_dict(jit_model.split(model)[1], g, prefix="")
    rows = [
        worst([compare(name, key, ours[key], stored[key]) for key in stored if key != official.POSITIONS], "weights"),
        compare(name, "pos_embed", ours[official.POSITIONS], stored[official.POSITIONS], atol=1e-6),
    ]
    for label, context in (("rope", 0), ("rope_ctx", g.context_length)):
        cos, sin = jit_model.rope_tables(g.head_dim, g.grid, context)
        rows += [compare(name, f"{label}_{part}", table, f[f"{label}_{part}"], atol=1e-6)
                 for part, table in (("cos", cos), ("sin", sin))]  # fmt: skip

    out, recorder = recorded_forward(model, z, t, y)
    got = {
        "t_emb": model.t_embedder(t, jnp.float32),
        "y_emb": model.y_embedder(y),
        "tokens_before_pos": model.patch_embed(jit_model.patchify(z, g.patch_size)),
        "tokens": recorder.entries[0],
        "block1_in": recorder.entries[1],
        "final_in": recorder.streams[-1][1][:, g.context_length :],
        "final_tokens": jit_model.patchify(out, g.patch_size),
    }
    got["c"] = got["t_emb"] + got["y_emb"]
    for i in range(g.depth):
        (got[f"block{i}_attn"], _), (got[f"block{i}_mlp"], got[f"block{i}"]) = recorder.streams[2 * i : 2 * i + 2]
    wanted = [key[4:] for key in f if key.startswith("act/")]
    rows.append(worst([compare(name, key, got[key], f[f"act/{key}"], atol=2e-5) for key in wanted], "activations"))
    rows.append(compare(name, "output", out, nhwc(f["out"]), atol=2e-5))
    return rows


def forward_tiny_jit() -> list[Row]:
    """The call as users write it."""
    f = load("tiny_forward.npz")
    out = small_model(f)(jnp.asarray(nhwc(f["x"])), jnp.asarray(f["t"]), jnp.asarray(f["y"], jnp.int32))
    return [compare("tiny_forward", "output, jitted blocks", out, nhwc(f["out"]), atol=2e-5)]


def forward_large(model_name: str) -> list[Row]:
    """Output and the size of every block's output of a published geometry; the file's checksums prove its weights."""
    name = f"forward_{model_name}"
    f = load(f"{name}.npz")
    g, seed = geometry_of(f["config"]), int(f["weight_seed"])
    weights = SeededStateDict(g, seed)
    for key, sums in json.loads(str(f["checksums"])).items():
        if key != official.POSITIONS:
            assert zlib.crc32(weights[key].numpy().tobytes()) == sums["crc32"], f"{name}: the recipe draws another {key}"
    params = official.to_params(weights, g)
    count = sum(value.size for value in params.values()) + g.tokens * g.width
    z, t, y = jnp.asarray(nhwc(f["x"])), jnp.asarray(f["t"]), jnp.asarray(f["y"], jnp.int32)
    # One at a time from NumPy to JAX, so that L/16 is in memory once (1.8 GB).
    params = {key: jnp.asarray(params.pop(key)) for key in list(params)}
    out, recorder = recorded_forward(jit_model.merge(jit_model.graphdef_of(g), params), z, t, y)
    rms = [float(jnp.sqrt(jnp.mean(jnp.square(x)))) for _, x in recorder.streams[1::2]]
    return [
        compare(name, "parameters", count, f["n_params"]),
        compare(name, "rms of every block", rms, f["block_rms"], rtol=1e-5),
        compare(name, "output", out, nhwc(f["out"]), atol=5e-5),
    ]


def modules() -> list[Row]:
    """Building blocks by themselves."""
    f, name = load("modules.npz"), "modules"
    ops, zero = kernels.get_ops("plain"), lambda x: jnp.zeros((1, x.shape[-1]), x.dtype)
    rows = []

    x = jnp.asarray(f["rmsnorm/x"])[None]
    got = np.asarray(ops.norm_modulate(x, jnp.asarray(f["rmsnorm/weight"]), zero(x), zero(x)))[0]
    rows.append(compare(name, "rmsnorm", got, f["rmsnorm/out"], atol=1e-5, rtol=1e-6))
    x = jnp.asarray(f["rmsnorm_bf16/x"]).astype(jnp.bfloat16)[None]
    got = np.asarray(ops.norm_modulate(x, jnp.asarray(f["rmsnorm/weight"]), zero(x), zero(x))[0])
    want = f["rmsnorm_bf16/out"].astype(ml_dtypes.bfloat16)
    row = compare(name, "rmsnorm bf16", got, want)
    ulp = np.abs(np.spacing(want)).astype(np.float64)
    ulps = np.abs(got.astype(np.float64) - want.astype(np.float64)) / ulp
    rows.append(dataclasses.replace(row, tolerance="1 bf16 ulp", excess=float(ulps.max())))

    features = jit_model.time_features(jnp.asarray(f["time/t"]))
    rows.append(compare(name, "time features", features, f["time/features"], atol=1e-6))
    for key, width, grid in (("pos_W96_grid8", 96, 8), ("pos_W64_grid3", 64, 3)):
        rows.append(compare(name, key, jit_model.position_table(width, grid), f[key], atol=1e-6))
    for head_dim, grid, context in ((64, 16, 32), (80, 4, 3), (32, 8, 0)):
        key = f"rope_hd{head_dim}_grid{grid}_ctx{context}"
        cos, sin = jit_model.rope_tables(head_dim, grid, context)
        every = len(cos) // len(f[f"{key}/cos"])  # token that the file has
        cos, sin = cos[::every], sin[::every]
        rows += [compare(name, f"{key} tables", np.stack([cos, sin]), np.stack([f[f"{key}/cos"], f[f"{key}/sin"]]), atol=1e-6)]
        # RoPE is linear, so undoing the norm before it, a factor for each vector, leaves RoPE alone.
        x = jnp.asarray(f[f"{key}/x"]).transpose(0, 2, 1, 3)
        size = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + attention.EPS)
        rotated = attention._norm_rope(x, jnp.ones(head_dim), jnp.asarray(cos), jnp.asarray(sin)) * size
        rows.append(compare(name, key, rotated.transpose(0, 2, 1, 3), f[f"{key}/out"], atol=1e-5))

    g = geometry_of(f["patch/config"])
    model = small_model(f, int(f["patch/weight_seed"]), "patch/config")
    tokens = model.patch_embed(jit_model.patchify(jnp.asarray(nhwc(f["patch/x"])), g.patch_size))
    rows.append(compare(name, "patch embedding", tokens, f["patch/tokens"], of_max=2e-6))
    images = jit_model.unpatchify(jnp.asarray(f["unpatchify/tokens"]), g.patch_size)
    rows.append(compare(name, "unpatchify", images, nhwc(f["unpatchify/out"])))

    x, c = jnp.asarray(f["block/x"]), jax.nn.silu(jnp.asarray(f["block/c"]))
    block, rope = model.blocks[0], tuple(map(jnp.asarray, jit_model.rope_tables(g.head_dim, g.grid, g.context_length)))
    rows.append(
        compare(name, "attention", block.attn(x, rope, None, ops) + block.attn.proj.bias[...], f["block/attn"], atol=2e-5)
    )
    rows.append(compare(name, "swiglu", block.mlp(x, None, ops) + block.mlp.w3.bias[...], f["block/mlp"], atol=2e-5))
    out = ops.gated_residual(*(lambda x, pending: (x, *pending))(*block(x, None, c, rope, None, ops)))
    rows.append(compare(name, "block", out, f["block/out"], atol=2e-5))
    if "final/out" in f:
        shift, scale = jnp.split(jit_model.affine(model.final.adaln, c), 2, axis=-1)
        h = ops.norm_modulate(x, model.final.norm.weight[...], shift, scale)
        rows.append(compare(name, "final layer", jit_model.affine(model.final.linear, h), f["final/out"], atol=2e-5))
    qkv = jit_model.matmul(block.attn.qkv, jnp.asarray(f["attn_small/x"]))
    qk = (block.attn.q_norm.weight[...], block.attn.k_norm.weight[...])
    out = ops.qkv_attention(qkv, jnp.zeros(qkv.shape[-1]), *qk, *rope, g.heads)
    out = jit_model.affine(block.attn.proj, out)
    rows.append(compare(name, "attention, small input", out, f["attn_small/out"], atol=2e-5))
    return rows


PARAMETERS = {  # spec, section 1.1: trainable, with pos_embed, tensors
    ("JiT-B/16", 256): (131_123_712, 131_320_320, 183),
    ("JiT-B/32", 512): (133_190_400, 133_387_008, 183),
    ("JiT-L/16", 256): (458_877_664, 459_139_808, 351),
    ("JiT-L/32", 512): (461_534_176, 461_796_320, 351),
    ("JiT-H/16", 256): (952_514_368, 952_842_048, 463),
    ("JiT-H/32", 512): (956_055_616, 956_383_296, 463),
}


def parameter_counts() -> list[Row]:
    """Of the six published models, without allocating them."""
    rows = []
    for (model_name, size), wanted in PARAMETERS.items():
        g = make_geometry(model_name, size, 1000)
        shapes = jax.eval_shape(jit_model.init_fn(g), jax.random.key(0))
        trainable = sum(value.size for value in shapes.values())
        got = (trainable, trainable + g.tokens * g.width, len(shapes) + 1)
        rows.append(compare("spec 1.1", model_name, got, wanted))
    return [worst(rows, "parameter and tensor counts")]


def initial_weights(model_name: str = "JiT-B/16", image_size: int = 256) -> list[Row]:
    """Mean, spread and bounds of every tensor of a fresh model, cut to three equal blocks, against spec section 1.4.

    Allowed: five standard errors of the mean, and of the standard deviation; the bounds of a uniform draw may not be passed
    and must nearly be reached.
    """
    g = make_geometry(model_name, image_size, 1000, depth=3, context_start=1)
    params = jax.jit(jit_model.init_fn(g))(jax.random.key(0))
    shapes, rows, skip = official.official_shapes(g), {}, official.POSITIONS
    for key, ours in official.official_names(g).items():
        if key == skip:
            continue
        value, shape = np.asarray(params[ours], np.float32), shapes[key]
        kind, spread, bound = expected_init(key, shape)
        if kind == "constant":
            row = compare("initial weights", key, value, np.full_like(value, spread))
        else:
            n, fourth = value.size, 3.0 if kind == "normal" else 1.8
            mean, std = value.mean(dtype=np.float64), value.std(dtype=np.float64)
            allowed = 5 * spread / np.sqrt(n), 5 * spread * np.sqrt((fourth - 1) / (4 * n))
            largest = np.abs(value).max()
            inside = 0.0 if bound is None else (0.0 if 0.99 * bound < largest <= bound * (1 + 1e-6) else np.inf)
            tail = 0.0 if bound is not None else (0.0 if largest > 3 * spread else np.inf)  # not truncated
            excess = max(abs(mean) / allowed[0], abs(std - spread) / allowed[1], inside, tail)
            error = max(abs(mean), abs(std - spread))
            row = Row("initial weights", key, error, error / spread, "5 standard errors, bounds", excess)
        rows.setdefault(kind, []).append(row)
    return [worst(rows[kind], kind) for kind in rows]


def expected_init(key: str, shape: tuple[int, ...]) -> tuple[str, float, float | None]:
    """(kind, constant value or standard deviation, bound) by the official name, from spec section 1.4."""
    if "norm" in key:
        return "constant", 1.0, None
    if key.endswith(".bias") or "adaLN" in key or key.startswith("final_layer.linear"):
        return "constant", 0.0, None
    if key.startswith("t_embedder") or key.startswith("y_embedder") or key == "in_context_posemb":
        return "normal", 0.02, None
    limit = float(np.sqrt(6 / (shape[0] + np.prod(shape[1:]))))  # Xavier on the matrix (out, everything else)
    return "uniform", limit / np.sqrt(3), limit


# ---------------------------------------------------------------- training


def training_config(**overrides) -> settings.Settings:
    config = config_lib.default_config()
    config.dtype, config.kernels, config.total_steps = "float32", "plain", 30
    config.model.class_conditional = True
    config.update_from_flattened_dict(overrides)
    return settings.from_mapping(config)


@contextlib.contextmanager
def recorded_randomness(t, e, dropped) -> Iterator[None]:
    """Inside, whatever a training step draws for (step, image) comes from these tables: t[step, image] and so on.

    Keys become the two numbers themselves: `fold_in` shifts one in, `split` copies, and the draws look up. So the step's own
    code runs unchanged with the numbers that the official run drew.
    """
    t, e, dropped = jnp.asarray(t), jnp.asarray(e), jnp.asarray(dropped)
    index = lambda key: tuple(jax.random.key_data(key).astype(jnp.int32))  # noqa: E731
    random = mock.patch.multiple(
        jax.random,
        fold_in=lambda key, data: jax.random.wrap_key_data(
            jnp.stack([jax.random.key_data(key)[1], jnp.asarray(data).astype(jnp.uint32)])
        ),
        split=lambda key, num=2: [key] * num,
        normal=lambda key, shape: e[index(key)],
        bernoulli=lambda key, p: dropped[index(key)],
    )
    with random, mock.patch.object(diffusion, "sample_times", lambda key, mean, std: t[index(key)]):
        yield


def gradients() -> list[Row]:
    """Loss and gradient of every parameter, through the training step's own loss."""
    f, name = load("tiny_grads.npz"), "tiny_grads"
    g, params = geometry_of(f["config"]), small_params(str(f["config"]), int(f["weight_seed"]))
    loss = make_loss(training_config(), g, kernels.get_ops("plain"))
    images, dropped = jnp.asarray(nhwc(f["x_uint8"])), f["y"] == g.num_classes
    labels = jnp.asarray(np.where(dropped, 0, f["y"]), jnp.int32)
    with recorded_randomness(f["t"][None], nhwc(f["e"])[None], dropped[None]):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)), i))(
            jnp.arange(len(labels))
        )
        objective = jax.value_and_grad(lambda p: jnp.mean(loss(p, images, labels, keys)))
        value, grads = jax.jit(objective)(params)
    grads = official.to_state_dict(grads, g, prefix="")
    wanted = {key[5:]: value for key, value in f.items() if key.startswith("grad/")}
    assert set(wanted) == set(grads) - {official.POSITIONS}
    rows = [compare(name, key, grads[key], wanted[key], of_max=2e-5) for key in wanted]
    return [compare(name, "loss", value, f["loss"], rtol=1e-5), worst(rows, "gradients, every parameter")]


def trajectory(fixture: str, replay: list | None = None, record: list | None = None, *, full: bool = False) -> list[Row]:
    """30 whole training steps: loss, learning rate, then weights and both EMAs. (A file of fewer steps has no weights.)

    `record` collects (gradients, loss) of every step; given back as `replay`, they stand in for the network, so that only
    the rest of the step is compiled: for mutations behind the gradient.
    """
    f = load(f"{fixture}.npz", full=full)
    g, args = geometry_of(f["config"]), json.loads(str(f["args"]))
    per_epoch, decays = int(f["steps_per_epoch"]), (args["ema_decay1"], args["ema_decay2"])
    scheduled = f["lr"][0] == 0
    config = training_config(**{
        "batch_size": 4, "optim.lr": float(f["lr"].max()), "optim.ema_decays": decays,
        "optim.warmup_steps": 2 * per_epoch if scheduled else 0, "optim.schedule": "cosine" if scheduled else "constant",
        "optim.min_lr": 1e-5 if scheduled else 0.0, "optim.weight_decay": 0.05 if scheduled else 0.0,
    })  # fmt: skip
    plan = make_plan(config, images=4 * per_epoch, tokens_per_image=g.tokens, devices=1)
    params = {k: jnp.array(v) for k, v in small_params(str(f["config"]), int(f["weight_seed"])).items()}
    state = step.fresh_state(params, {str(d): jax.tree.map(jnp.copy, params) for d in decays}, config.optim, config.dtype)
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    state = jax.device_put(state, sharding.shardings(state, mesh))  # as after a step, so that one compilation serves all
    dropped, losses, rates = f["y"] == g.num_classes, [], []
    accumulate = gradients_lib.accumulate

    def recorded(*args, **options):
        grads, loss, count = accumulate(*args, **options)
        jax.debug.callback(lambda *values: record.append(values), grads, loss)
        return grads, loss, count

    def replayed(objective, params, batch, *_, **__):
        return batch["image"]["grads"], batch["image"]["loss"][0], jnp.float32(1)

    source = replayed if replay else accumulate if record is None else recorded
    with (
        recorded_randomness(f["t"], nhwc(f["e"]), dropped),
        mock.patch.object(gradients_lib, "accumulate", source),
    ):
        train_step = make_step(Setup(config, g, mesh, plan, "plain", ""))
        for i in range(len(f["losses"])):
            batch = {"image": nhwc(f["x_uint8"][i]), "label": np.where(dropped[i], 0, f["y"][i]).astype(np.int32)}
            if replay:
                batch["image"] = {"grads": replay[i][0], "loss": replay[i][1][None]}
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["train/loss"]))
            rates.append(float(metrics["train/learning_rate"]))
    rows = [
        compare(fixture, f"losses of {len(losses)} steps", losses, f["losses"], rtol=2e-5),
        compare(fixture, "learning rates", rates, f["lr"], rtol=1e-6),
    ]
    groups, names = optimizer.decay_mask(state.params), official.official_names(g)
    for part, decay in (("group_no_decay", False), ("group_decay", True)):
        listed = set(json.loads(str(f[part])))
        ours = {key for key, own in names.items() if key != official.POSITIONS and groups[own] == decay}
        rows.append(compare(fixture, f"names in {part}", len(listed ^ ours), 0))
    for part, tree in (
        ("final", state.params),
        ("ema1", state.ema[str(decays[0])]),
        ("ema2", state.ema[str(decays[1])]),
    ):
        ours = official.to_state_dict(tree, g, prefix="")
        wanted = {key.removeprefix(f"{part}/"): value for key, value in f.items() if key.startswith(f"{part}/")}
        if not wanted:
            continue
        rows.append(worst([compare(fixture, k, ours[k], v, atol=3e-4) for k, v in wanted.items()], f"{part} weights"))
        pairs = [(v.of(ours[k]), v.values) if isinstance(v, Sample) else (ours[k], v) for k, v in wanted.items()]
        squares = sum(((got - value).astype(np.float64) ** 2).sum() for got, value in pairs)
        rms = np.sqrt(squares / sum(value.size for _, value in pairs))
        rows.append(compare(fixture, f"{part} weights, rms error", rms, 0, atol=2e-6))
    return rows


def schedules() -> list[Row]:
    """Learning rate over fractional epochs, asked for in steps of an epoch of 1251 (ImageNet at batch 1024)."""
    rows = []
    for case in json.loads(find("lr_schedule.json").read_text()):
        args, per_epoch = case["args"], 1251
        rate = functools.partial(
            optimizer.learning_rate,
            peak=args["lr"],
            min_lr=args["min_lr"],
            warmup=args["warmup_epochs"] * per_epoch,
            total=args["epochs"] * per_epoch,
            schedule=args["lr_schedule"],
        )
        got = [float(rate(epoch * per_epoch)) for epoch in case["epoch"]]
        rows.append(compare("lr_schedule", str(args), got, case["lr"], rtol=1e-6))
    return [worst(rows, "schedules")]


def combinations() -> list[Row]:
    """The nine pairs of prediction and loss: conversions, and losses with the target that is used in training."""
    f, name, rows = load("prediction_loss.npz"), "prediction_loss", []
    words = {"x": "x", "eps": "epsilon", "v": "v"}
    for group in json.loads(str(f["groups"])):
        x, e, o = (jnp.asarray(nhwc(f[f"{group}/{key}"])) for key in ("x", "e", "o"))
        t, conversions, losses = jnp.asarray(f[f"{group}/t"]), [], []
        z = diffusion.noised(x, e, t)
        rows.append(compare(name, f"{group}: z", z, nhwc(f[f"{group}/z"]), of_max=1e-6))
        for a, source in words.items():
            for b, target in words.items():
                got = nchw(diffusion.convert(o, source, target, z, t, float(f["clip"])))
                conversions.append(compare(name, f"{a}{b}", got, f[f"{group}/conv/{a}_to_{b}"], of_max=1e-6))
                each = diffusion.loss_per_image(o, x, e, t, source, target, float(f["clip"]))
                key = f"{a}_pred_{b}_loss"
                losses.append(compare(name, key, each, f[f"{group}/per_image_samepath/{key}"], rtol=1e-5))
                losses.append(compare(name, key, jnp.mean(each), f[f"{group}/loss_samepath/{key}"], rtol=1e-5))
                if group == "mid":  # away from the clips the exact target is the same
                    losses.append(compare(name, key, jnp.mean(each), f[f"{group}/loss/{key}"], rtol=1e-5))
        each = diffusion.loss_per_image(o, x, e, t, "x", "v", float(f["clip"]))
        losses.append(compare(name, "official", jnp.mean(each), f[f"{group}/official_x_pred_v_loss"], rtol=1e-5))
        rows += [worst(conversions, f"{group}: conversions"), worst(losses, f"{group}: losses")]
    return rows


# ---------------------------------------------------------------- sampling, pixels


def sampler_calls() -> list[Row]:
    """Time and guidance of every network call of every setting; exact."""
    f, rows = load("sampler.npz"), []
    for combo in json.loads(str(f["combos"])):
        calls = []

        def velocity(z, t, guided, calls=calls):
            calls.append((float(t), guided))
            return jnp.zeros_like(z)

        with jax.disable_jit():
            sampling.integrate(
                velocity,
                jnp.zeros((1, 1, 1, 1)),
                steps=combo["steps"],
                method=combo["method"],
                interval=tuple(combo["interval"]),
            )
        key, got = combo["key"], np.array(calls, np.float32)
        want = np.stack([f[f"t/{key}"], f[f"guided/{key}"].astype(np.float32)], axis=1)
        rows.append(compare("sampler", key, got, want))
    return [worst(rows, "times and guidance of every call")]


def sampler(which: str = "") -> list[Row]:
    """Images of every setting whose key begins with `which`, and their pixels."""
    f, rows, pixels = load("sampler.npz"), [], []
    model = small_model(f)
    for combo in json.loads(str(f["combos"])):
        key = combo["key"]
        if not key.startswith(which):
            continue
        images = sampling.sample(
            model,
            jnp.asarray(nhwc(f["z0"])) * combo["noise_scale"],
            jnp.asarray(f["labels"], jnp.int32),
            steps=combo["steps"],
            method=combo["method"],
            cfg_scale=combo["cfg"],
            interval=tuple(combo["interval"]),
            t_eps=float(f["t_eps"]),
        )
        rows.append(compare("sampler", key, nchw(images), f[f"out/{key}"], atol=2e-4))
        if f"out/{key}" == str(f["uint8_of"]):
            got = np.asarray(diffusion.to_uint8(images)).astype(int)
            differing = np.mean(got != f["uint8"])
            pixels.append(compare("sampler", "uint8 of our images", got, f["uint8"], atol=1))
            pixels.append(compare("sampler", "share of pixels that differ", differing, 0, atol=1e-3))
    return [worst(rows, f"images {which}".strip()), *pixels]


def uint8() -> list[Row]:
    f = load("sampler.npz")
    got = diffusion.to_uint8(jnp.asarray(nhwc(f[str(f["uint8_of"])])))
    levels = jnp.arange(256, dtype=jnp.uint8)
    there_and_back = diffusion.to_uint8(diffusion.to_float(levels))
    return [
        compare("sampler", "uint8 of the stored images", got, f["uint8"]),
        compare("sampler", "uint8 -> float -> uint8", there_and_back, levels),
    ]


def photographs() -> list[Row]:
    """Pixels of real photographs at three sizes; exact with the Pillow that made them."""
    f, rows = load("preprocess.npz"), []
    folder = find("preprocess")
    info = json.loads(find("preprocess.json").read_text())
    import PIL

    atol = 0.0 if PIL.__version__.split(".")[0] == info["libs"]["pillow"].split(".")[0] else 1.0
    for key, want in f.items():
        file, size = key.rsplit("/", 1)
        with Image.open(folder / file) as picture:
            rows.append(compare("preprocess", key, jitjax.preprocess(picture, int(size)), want, atol=atol))
    return [worst(rows, "photographs x sizes")]


def checkpoint() -> list[Row]:
    """Outputs of the official checkpoint file, loaded by our reader, for each of its three sets of weights. The small file
    has other values than the official code was run with."""
    f, rows = load("tiny_checkpoint_out.npz", full=True), []
    start = geometry_of(f["config"]).context_start
    inputs = jnp.asarray(nhwc(f["x"])), jnp.asarray(f["t"]), jnp.asarray(f["y"], jnp.int32)
    for which in ("model", "model_ema1", "model_ema2"):
        model = jitjax.load_official(find("tiny_checkpoint.pth", full=True), which, context_start=start)
        assert model.geometry == geometry_of(f["config"])
        rows.append(compare("tiny_checkpoint", which, model(*inputs), nhwc(f[f"out/{which}"]), atol=2e-5))
    return [worst(rows, "outputs of model, ema1, ema2")]


CHECKS: dict[str, Callable[[], list[Row]]] = {
    "modules": modules,
    "forward_tiny": forward_tiny,
    "forward_tiny_jit": forward_tiny_jit,
    "forward_B4_64": functools.partial(forward_large, "JiT-B-4_64"),
    "forward_B16_256": functools.partial(forward_large, "JiT-B-16_256"),
    "forward_L16_256": functools.partial(forward_large, "JiT-L-16_256"),
    "parameter_counts": parameter_counts,
    "initial_weights": initial_weights,
    "gradients": gradients,
    "trajectory": functools.partial(trajectory, "tiny_train"),
    "trajectory_wd0": functools.partial(trajectory, "tiny_train_wd0"),
    "trajectory_wd0_full": functools.partial(trajectory, "tiny_train_wd0", full=True),
    "schedules": schedules,
    "combinations": combinations,
    "sampler_calls": sampler_calls,
    "sampler_heun": functools.partial(sampler, "heun"),
    "sampler_euler": functools.partial(sampler, "euler"),
    "uint8": uint8,
    "photographs": photographs,
    "checkpoint": checkpoint,
}
