"""The benchmarks: what they print, that they time what they say, and the table of a profile."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, small_settings

from jitjax import bench, kernels, model, sampling
from jitjax.benchmarks import card, checkpoint, common, profile, sample
from jitjax.benchmarks import input as input_bench
from jitjax.benchmarks import kernels as kernels_bench
from jitjax.benchmarks import step as step_bench
from jitjax.data.shapes import draw_dataset
from jitjax.errors import UserError
from jitjax.flops import train_flops
from jitjax.from_settings import abstract_state, make_loss, make_step
from jitjax.geometry import geometry_of

CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
def get_config():
    from conftest import small_config
    return small_config()
"""


def command(tmp_path, *argv):
    (tmp_path / "small.py").write_text(CONFIG)
    return subprocess.run(
        [sys.executable, "-m", "jitjax.bench", argv[0], f"--config={tmp_path / 'small.py'}", *argv[1:]],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------- kernels


@pytest.mark.slow
def test_kernels_checks_every_operation_against_float32(tmp_path):
    result = command(tmp_path, "kernels", "--config.dtype=bfloat16", "--check_images=2", "--repeats=1")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    operations = {field.name for field in dataclasses.fields(kernels.Ops)} - {"prepare_qkv"}
    assert {record["operation"].split(",")[0] for record in records} == operations | {"model"}
    assert all(record["as_accurate"] and record["repeatable"] and record["fused_error"] < 0.05 for record in records)
    (copied,) = (record for record in records if record["operation"] == "packing")
    assert copied["fused_error"] == copied["plain_error"]  # of a cast
    assert all(record["fused_us"] > 0 and record["plain_us"] > 0 for record in records[:-1])


def test_kernels_notices_an_inaccurate_operation():
    """Values rounded to one digit more than the compute type's own rounding explains."""
    exact = jax.random.normal(jax.random.key(0), (64,))
    plain, coarse = exact.astype(jnp.bfloat16), exact.astype(jnp.float8_e4m3fn)
    assert kernels_bench.judge([exact], [plain], [plain], "bfloat16")["as_accurate"]
    assert not kernels_bench.judge([exact, exact], [plain, plain], [plain, coarse], "bfloat16")["as_accurate"]
    assert not kernels_bench.judge([exact], [0 * exact], [0 * exact], "float16")["as_accurate"]  # both lost, as by underflow


def test_kernels_notices_other_bits_each_time():
    """The smallest difference, and the one that an equality of numbers does not see."""
    values = jnp.linspace(-1, 1, 9).at[4].set(0.0)
    assert kernels_bench.repeatable(lambda: [values, values.astype(jnp.bfloat16)])
    for other in (values.at[3].set(jnp.nextafter(values[3], 1.0)), -values[::-1].at[4].set(0.0)):
        turns = itertools.chain(4 * [[values]], [[other]], itertools.repeat([values]))
        assert not kernels_bench.repeatable(functools.partial(next, turns))


# ---------------------------------------------------------------- step


@pytest.mark.slow
def test_step_prints_one_json_line_a_variant_and_nothing_else(tmp_path):
    flags = ("--steps=2", "--warmup=1", "--repeats=1", "--batch_sizes=1,3", f"--profile={tmp_path / 'profile'}")
    result = command(tmp_path, "step", *flags, "--config.optim.accumulation_steps=2", "--config.total_steps=None")
    assert result.returncode == 0, result.stderr
    small, large = map(json.loads, result.stdout.splitlines())
    for record, batch in ((small, 1), (large, 3)):
        assert (record["batch_size"], record["global_batch"], record["kernels"]) == (batch, 2 * batch, "plain")
        geometry = geometry_of(small_settings().model, 8, 1000)
        assert record["samples_per_second"] == pytest.approx(2 * batch / record["ms"] * 1e3, rel=1e-2)
        assert record["tokens_per_second"] == pytest.approx(4 * record["samples_per_second"], rel=1e-2)
        tflops = record["samples_per_second"] * train_flops(geometry) / 1e12
        assert record["tflops_per_device"] == pytest.approx(tflops, abs=1e-4)
        assert record["mfu"] == pytest.approx(tflops / record["matmul_tflops"], abs=1e-3)
        assert 0 < record["temporary_gib"] < record["program_gib"] and record["compile_seconds"] > 0
        assert record["mfu_datasheet"] is None and record["cards"] is None  # no card here
        folder = tmp_path / "profile" / f"auto_{batch}"
        assert "no GPU kernels" in (folder / "table.txt").read_text()
        assert (folder / "hlo.txt").read_text().startswith("HloModule jit_step")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["step", "--batch_sizes=64,x"], "--batch_sizes=64,x"),
        (["step", "--accumulation_steps=1,0"], "accumulation_steps=0"),
        (["step", "--devices=1,2"], "--devices=1,2: 2 devices of the 1 that there are"),
        (["step", "--forms=zero,zera"], "--forms=zero,zera: zera is not one of data, zero, fsdp"),
        (["step", "--xla_options=xla_gpu_enable_pdl"], "--xla_options=xla_gpu_enable_pdl: xla_gpu_enable_pdl has no value"),
        (["step", "--xla_options=xla_gpu_disable_pld=1"], "--xla_options=xla_gpu_disable_pld=1: INVALID_ARGUMENT: No such"),
        (["sample", "--baseline", "--config.model.class_conditional=False"], "--baseline"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, argv, says):
    result = command(tmp_path, *argv)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and says in result.stderr


@pytest.mark.parametrize(("argv", "says"), [([], "BENCHMARK"), (["stap"], "'step', 'sample', 'checkpoint', 'input'")])
def test_an_unknown_benchmark_names_those_that_exist(argv, says):
    with pytest.raises(UserError, match=says):
        bench.main(argv)


def test_a_mistake_in_a_flag_is_answered_before_jax_starts():
    code = "import sys; from jitjax import bench; bench.main(['step', '--steps=0'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "0 must be 1 or more" in result.stderr and "/jax/" not in result.stderr


def test_a_variant_that_does_not_fit_is_reported_after_the_others_ran(monkeypatch, capsys):
    """Out of memory at one batch size: the larger and the smaller one are still printed."""

    def measure(setup, options):
        if setup.settings.batch_size == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"batch_size": setup.settings.batch_size}

    variants = [(common.prepare(small_settings(batch_size=size)), {}) for size in (2, 4, 8)]
    with pytest.raises(UserError, match="batch_size=4 .*remat"):
        step_bench.measure_all(variants, measure)
    assert [json.loads(line)["batch_size"] for line in capsys.readouterr().out.splitlines()] == [2, 8]


def test_several_devices_say_their_share_of_as_many_times_one(tmp_path, monkeypatch, capsys):
    """Every form, number of devices and of micro-batches in one call, each beside one device with the same batch."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    folders = []

    def measure(setup, *_, folder, **__):
        folders.append(folder.name)
        steps, devices = setup.settings.optim.accumulation_steps, setup.mesh.size
        return {"mesh": dict(setup.mesh.shape), "steps": steps, "tokens_per_second": devices * steps * (100 - devices)}

    monkeypatch.setattr(step_bench, "measure", measure)
    monkeypatch.setattr(card, "matmul_peak", lambda: {"matmul_tflops": 1, "matmul_tflops_sustained": 1})
    flags = ["--devices=4,1", "--forms=zero,fsdp", "--accumulation_steps=1,2", f"--profile={tmp_path}"]
    bench.main(["step", f"--config={config}", *flags])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    meshes = [tuple(record["mesh"].values()) for record in records]
    assert meshes == [(1, 1, 1)] * 2 + [(1, 4, 1), (1, 1, 4)] * 2
    assert [record["steps"] for record in records] == [1, 2, 1, 1, 2, 2]
    assert [record["share_of_one"] for record in records] == [1.0] * 2 + [round(96 / 99, 4)] * 4
    assert len(set(folders)) == len(folders) and folders[-1] == "auto_2_2_fsdp4"


def test_options_of_xla_are_compared_and_taken(tmp_path, monkeypatch, capsys):
    """Each beside none, and one device with the same; the programs are compiled with them."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    folders = []

    def profiled(compiled, state, batch, folder):
        folders.append(folder.name)

    monkeypatch.setattr(step_bench, "profile_steps", profiled)
    monkeypatch.setattr(card, "matmul_peak", lambda: {"matmul_tflops": 1, "matmul_tflops_sustained": 1})
    compiled, compile_one = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *given: compiled.append(given[1:]) or compile_one(*given))
    flags = ["--xla_options=", "--xla_options=xla_cpu_enable_fast_math=True,--xla_backend_optimization_level=1"]
    flags += ["--devices=1,2", "--steps=1", "--warmup=1", "--repeats=1", f"--profile={tmp_path}"]
    bench.main(["step", f"--config={config}", *flags])
    options = {"xla_cpu_enable_fast_math": True, "xla_backend_optimization_level": 1}
    assert compiled[2:] == [(None,), (options,)] * 2  # behind the trial of each
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["compiler_options"] for record in records] == [{}, options] * 2
    one, one_with, two, two_with = (record["tokens_per_second"] for record in records)
    shares = [two / one / 2, two_with / one_with / 2]
    assert [record["share_of_one"] for record in records[2:]] == pytest.approx(shares, abs=1e-3)
    assert folders == ["none", "xla_cpu_enable_fast_math=True_xla_backend_optimization_level=1"] * 2


def test_no_backward_product_multiplies_zeros():
    """A fresh model's gradient is zero but for the last layer; with the benchmark's weights that of every matrix is dense."""
    config = small_settings()
    geometry = geometry_of(config.model, config.data.image_size, 5)
    loss = make_loss(config, geometry, kernels.get_ops("plain"))
    images = jax.random.randint(jax.random.key(0), (2, 8, 8, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(2)

    @jax.jit
    def zero_fractions(params):
        keys = jax.random.split(jax.random.key(1), 2)
        grads = jax.grad(lambda p: jnp.mean(loss(p, images, labels, keys)))(params)
        return {name: jnp.mean(grad == 0) for name, grad in grads.items() if name.endswith("kernel")}

    key = jax.random.key(2)
    fresh = zero_fractions(jax.jit(model.init_fn(geometry))(key))
    assert [name for name, zeros in fresh.items() if zeros < 1] == ["final.linear.kernel"]
    random = zero_fractions(jax.jit(functools.partial(common.random_params, geometry))(key))
    assert max(random.values()) < 0.01


def test_clock_and_power_are_medians_of_each_cards_whole_lines():
    rows = ["1590, 693.10, 700.00, 61", "1980, 300.00, 700.00, 55", "[N/A], [N/A], 700.00, 61", "1575, 695.50, 700.00, 62"]
    lines = [f"2, GPU-a, {row}\n3, GPU-b, 1700, 650, 700, 50" for row in rows]
    text = "\n".join(["", *lines, "2, GPU-a, 15"])
    first = {"sm_clock_mhz": 1590, "power_w": 693.1, "power_limit_w": 700, "temperature_c": 61, "samples": 3}
    second = {"sm_clock_mhz": 1700, "power_w": 650, "power_limit_w": 700, "temperature_c": 50, "samples": 4}
    assert card.card_medians(text, ["2"]) == [first]
    assert card.card_medians(text, ["GPU-b", "2"]) == [second, first]  # in the order of the devices
    assert card.card_medians(text, ["2", "4"]) is None
    assert card.card_medians("NVIDIA-SMI has failed\n", ["0"]) is None


# ---------------------------------------------------------------- sample


def sampled(way, network, *, method="heun", steps=10, interval=(0.1, 0.7)):
    run = sample.published if way == "published" else sampling.sample_fn
    noise, labels = jax.random.normal(jax.random.key(0), (3, 4, 4, 3)), jnp.arange(3)
    settings = dict(null_label=5, steps=steps, method=method, interval=interval, t_eps=0.05, prediction="x", grid="uniform")
    return run(network, noise, labels, cfg_scale=sample.scale_of(small_settings(), way), **settings)


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_the_published_way_gives_the_same_images(method):
    def network(z, t, y):
        return jnp.sin(z * (1 + y[:, None, None, None]) + t[:, None, None, None])

    ours, published, unguided = (sampled(way, network, method=method) for way in ("guided", "published", "unguided"))
    np.testing.assert_allclose(ours, published, atol=5e-5)
    assert jnp.abs(ours - unguided).max() > 0.1


def test_sampler_is_measured_in_every_way(capsys):
    config = small_settings(preview__num_images=9, preview__steps=2, preview__interval=(0.4, 0.9))
    guided, unguided, published = sample.measure(common.prepare(config), ["guided", "unguided", "published"], 1)
    assert guided["num_images"] == 16  # a whole number on each of 8 devices
    assert guided["images_per_second"] == pytest.approx(16 / guided["seconds"], rel=1e-2)
    assert guided["speedup_over_published"] == pytest.approx(published["seconds"] / guided["seconds"], abs=1e-2)
    assert [r["network_passes_per_image"] for r in (guided, unguided, published)] == [5, 3, 6]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", ["heun", "euler"])
@pytest.mark.parametrize("way", ["guided", "unguided", "published"])
def test_network_passes_are_those_that_run(method, way):
    config = small_settings(preview__steps=10, preview__method=method, preview__interval=(0.1, 0.7))
    passes = []

    def network(z, t, y):
        jax.debug.callback(lambda: passes.append(z.shape[0]))
        return z

    sampled(way, network, method=method)
    jax.effects_barrier()
    assert sample.network_passes(config, way) == sum(passes) / 3
    assert sample.network_passes(config, "published") == 2 * (19 if method == "heun" else 10)


# ---------------------------------------------------------------- checkpoint


def test_checkpoint_is_whole_and_not_compressed_away(tmp_path, capsys):
    record = checkpoint.measure(common.prepare(small_settings(model__width=128, model__num_classes=5)), tmp_path, 1)
    assert record["restored_equals_saved"]
    values = record["state_bytes"] / 4 / record["parameters"]
    assert 5 <= values < 5.01  # parameters, two moments, two averages
    assert record["disk_bytes"] > 0.8 * record["state_bytes"]
    assert 0 < record["stopped_seconds"] <= record["durable_seconds"]
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- profile


@pytest.mark.parametrize(
    ("group", "name", "scope"),
    [
        ("matmuls", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_NNT", ""),
        ("matmuls", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_NNT", "swiglu"),
        ("matmuls", "gemm_fusion_dot_12", ""),
        ("matmuls", "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", ""),
        ("matmuls", "mlp_hopper_forward_mosaic_gpu_kernel", ""),
        ("attention", "attention_backward_kv", ""),
        ("attention", "attention_hopper_backward_mosaic_gpu_kernel", ""),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32", ""),
        ("attention", "loop_exponential_fusion_3", "attention"),
        ("norm and modulation", "norm_residual_backward", ""),
        ("norm and modulation", "input_reduce_fusion_4", "norm"),
        ("RoPE and qk-norm", "rope_hopper_backward_mosaic_gpu_kernel", ""),
        ("SwiGLU", "swiglu_backward", ""),
        ("reductions", "input_reduce_fusion_17", ""),
        ("optimizer and EMA", "loop_add_select_fusion_206", "optimizer"),
        ("copies", "MemcpyD2D", ""),
        ("copies", "wrapped_convert_5", ""),
        ("collectives", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", ""),
        ("other", "loop_add_fusion_2", ""),
    ],
)
def test_groups_of_kernels(group, name, scope):
    assert profile.group_of(name, scope) == group
    assert group in profile.GROUPS


def test_every_kernel_of_ours_belongs_to_a_group():
    """Names as they are in a lowered step, whatever they are called: none of them falls to "other"."""
    from test_kernels import lower_for_cuda, parameter, struct

    ops, x, v = kernels.get_ops("fused"), struct(2, 77, 96), struct(2, 96)
    qkv = struct(2, 77, 288), parameter(288), parameter(32), parameter(32)

    def run(x, v, qkv, w12, b12, w3, w):
        o = ops.qkv_attention(*qkv, *jnp.ones((2, 77, 32)), 3)
        x, h = ops.residual_norm_modulate(x, o, w, v, w, v, v)
        return jnp.sum(ops.gated_residual(x, ops.mlp(h, w12, b12, w3), w, v) + ops.norm_modulate(x, w, v, v))

    shapes = x, v, qkv, parameter(96, 512), parameter(512), parameter(256, 96), parameter(96)
    text = lower_for_cuda(jax.grad(lambda *a: run(*a).astype(jnp.float32), argnums=range(7)), *shapes)
    names = set(re.findall(r'\bname = "(\w+)"', text))
    groups = {name: profile.group_of(name) for name in names}
    assert len(names) > 8 and set(groups.values()) == {"attention", "norm and modulation", "RoPE and qk-norm", "SwiGLU"}, groups


def test_scopes_tell_the_fusions_of_a_compiled_step_apart():
    """XLA names a fusion after its arithmetic; the scope says whether it is a norm or attention, forward and backward."""
    setup = common.prepare(small_settings(dtype="bfloat16"))
    state = abstract_state(setup.settings, setup.geometry, setup.mesh)
    count = setup.plan.global_batch
    shapes = {"image": jax.ShapeDtypeStruct((count, 8, 8, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((count,), int)}
    train_step = make_step(setup)
    hlo = train_step.lower(state, shapes).compile().as_text()
    found = profile.scopes(hlo)
    groups = {profile.group_of("loop_fusion", scope) for name, scope in found.items() if "fusion" in name}
    assert {"attention", "norm and modulation", "RoPE and qk-norm", "SwiGLU"} <= groups
    for scope in ("attention", "norm", "rope", "swiglu"):
        assert re.search(rf'op_name="[^"]*transpose\([^"]*\b{scope}\b', hlo), f"no scope in the backward pass of {scope}"


def test_table_adds_up_one_gpus_streams():
    def thread(pid, tid, name):
        return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}

    def event(pid, tid, name, start, duration):
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": duration}

    events = [thread(1, 7, "Stream #7(Compute)"), thread(1, 8, "XLA Ops"), thread(2, 7, "Stream #7(Compute)")]
    events += [event(1, 7, "nvjet_a", 0, 60), event(1, 7, "swiglu_forward", 60, 30), event(1, 7, "loop_add_fusion_3", 100, 10)]
    events += [event(1, 7, "swiglu_forward", 112, 0), event(1, 7, "MemcpyP2P", 90, 0), event(1, 7, "nvjet_a", 109.5, 0)]
    events += [event(1, 8, "fusion", 0, 999), event(2, 7, "nvjet_a", 0, 999)]
    hlo = """HloModule jit_step

ENTRY %main {
  %loop_add_fusion.3 = f32[2]{0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="jit(step)/optimizer/add" stack_frame_id=1}
}
"""
    summary = profile.summarise(profile.gpu_kernels(events), hlo)
    lines = profile.table(summary, steps=2).splitlines()
    rows = {line[:25].strip(): line[25:].split() for line in lines}
    assert summary.other == 0
    assert rows["matmuls"] == ["30", "60.0%"]
    assert rows["SwiGLU"] == ["15", "30.0%"]
    assert rows["optimizer and EMA"] == ["5", "10.0%"]
    assert rows["sum of kernels"] == ["50"] and rows["span"] == ["56"]
    # One starts as its predecessor ends, one 10 us later, one while another runs, one 2 us behind the last to end.
    assert summary.gaps == [0, 10, -0.5, 2]
    assert rows["short gaps"][:3] == ["1", "1.8%", "2"] and rows["gaps above 8 us"] == ["5", "8.9%"]
    assert rows["attention"] == ["0", "0.0%"]


def test_input_measures_both_stages(tmp_path):
    path = draw_dataset(tmp_path / "shapes", image_size=16, per_class=8)
    config = small_settings(data__path=str(path), data__image_size=16)
    result = json.loads(json.dumps(input_bench.measure(config, seconds=0.2)))
    assert (result["kind"], result["images"], result["global_batch"]) == ("folder", 64, 16)
    assert result["host_images_per_second"] > 0 and result["device_images_per_second"] > 0
