"""Operation counts and the table of times."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jitjax import cli
from jitjax import estimate as estimate_lib
from jitjax.errors import UserError
from jitjax.flops import CARDS, datasheet_flops, forward_macs, train_flops
from jitjax.model import JiT, graphdef_of, init_fn, make_geometry, merge
from jitjax.settings import Model, Settings, to_dict

ROOT = Path(__file__).parents[1]
CONFIG = "from jitjax.config import default_config\ndef get_config():\n  return default_config()\n"  # JiT-B/4, 64 px


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize(
    ("name", "image_size", "published_gmacs"),
    [
        ("JiT-B/16", 256, 25.22),
        ("JiT-B/32", 512, 25.75),
        ("JiT-L/16", 256, 87.94),
        ("JiT-L/32", 512, 88.62),
        ("JiT-H/16", 256, 181.95),
        ("JiT-H/32", 512, 182.85),
        ("JiT-B/4", 64, 25.06),
    ],
)
def test_multiply_adds_are_those_counted_in_the_published_model(name, image_size, published_gmacs):
    g = make_geometry(name, image_size, 1000)
    # The published model takes its context tokens to the end of the last block, where nobody uses them any more.
    seen = g.tokens + g.context_length
    unused = g.context_length * (2 * seen * g.width + g.width**2 + 3 * g.width * g.mlp_hidden)
    assert round((forward_macs(g) + unused) / 1e9, 2) == published_gmacs


def count_macs(jaxpr):
    """Multiply-adds of every matmul in a traced function, calls inside calls included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count_macs(inner)
    return total


@pytest.mark.parametrize("context_length", [0, 4])
def test_formula_equals_the_matmuls_that_our_model_traces(context_length):
    geometry = make_geometry("JiT-nano/4", 32, 10, context_length=context_length)
    params = jax.eval_shape(init_fn(geometry), jax.random.key(0))
    graphdef = graphdef_of(geometry)

    def forward(params, z, t, y):
        model: JiT = merge(graphdef, params)
        return model(z, t, y)

    jaxpr = jax.make_jaxpr(forward)(params, jnp.zeros((2, 32, 32, 3)), jnp.zeros(2), jnp.zeros(2, int))
    assert count_macs(jaxpr.jaxpr) == 2 * forward_macs(geometry)
    assert train_flops(geometry) == 6 * forward_macs(geometry)


def test_only_cards_with_the_sxm_datasheet_get_its_number():
    kinds = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": None, "NVIDIA H200 NVL": None}
    assert {kind: datasheet_flops(kind) for kind in kinds} == kinds
    assert datasheet_flops("cpu") is None


# ---------------------------------------------------------------- the guide's table


@pytest.mark.parametrize("context_length", [None, 0], ids=["with labels", "without context tokens"])
def test_rows_of_the_guide(context_length):
    geometry = make_geometry("JiT-B/4", 64, 1000, context_length=context_length)
    utilisations = estimate_lib.guide_utilisations(geometry)
    rows = estimate_lib.estimate(geometry, utilisations, [1e10, 1e12], devices=8)
    assert [row.name for row in rows] == ["conservative", "middle", "optimistic"] * 2
    assert [row.tokens_per_second for row in rows[:3]] == pytest.approx([240e3, 400e3, 640e3])
    assert [round(row.seconds / 3600, 1) for row in rows[:3]] == [11.6, 6.9, 4.3]
    assert [round(row.seconds / 86400) for row in rows[3:]] == [48, 29, 18]
    assert rows[3].images == 1e12 / 256 and round(rows[3].epochs) == 3049
    assert rows[3].gpu_hours == pytest.approx(8 * 1e12 / 240e3 / 3600)


def test_a_larger_model_at_the_same_utilisation_takes_longer_by_its_operations():
    small, large = (make_geometry(name, 64, 1000) for name in ("JiT-B/4", "JiT-L/4"))
    used = {"a": 0.4}
    (a,) = estimate_lib.estimate(small, used, [1e9], devices=4)
    (b,) = estimate_lib.estimate(large, used, [1e9], devices=8)
    assert b.seconds / a.seconds == pytest.approx(forward_macs(large) / forward_macs(small) / 2)
    assert a.tokens_per_second == pytest.approx(0.4 * 4 * CARDS["h200"] / (train_flops(small) / 256))


# ---------------------------------------------------------------- the command


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "b4.py"
    path.write_text(CONFIG)
    return path


def table(capsys, *argv):
    """The rows that the command prints, as lists of words."""
    estimate_lib.main(["estimate", *map(str, argv)])
    printed = capsys.readouterr().out
    return [line.split() for line in printed.split("-\n", 1)[1].splitlines()]


def test_the_command_prints_the_guides_table_and_starts_no_backend(config_file):
    result = subprocess.run(
        [sys.executable, "-m", "jitjax.estimate", "--config", config_file, "--tokens", "10e9,1e12", "--devices", "8"],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},  # starting one would fail
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines()[-10:]]
    assert rows[0] == "1e10 39,062,500 30.5 JiT-B/4, batch 64 42.44% 5,760,000 28.9 minutes 3.86".split()
    assert rows[2] == "conservative 1.77% 240,000 11.6 hours 92.6".split()
    assert rows[5][-5:] == "42.44% 5,760,000 2.0 days 386".split()
    assert rows[9] == "optimistic 4.72% 640,000 18.1 days 3,472".split()


def test_overrides_and_data_set_size_count(config_file, capsys):
    config = f"--config={config_file}"
    (row, *_) = table(capsys, config, "--config.data.image_size=32", "--tokens=64e6", "--images_per_epoch=500000")
    assert row[:3] == ["6.4e7", "1,000,000", "2"]


@pytest.mark.parametrize(
    ("overrides", "card", "speeds"),
    [
        ((), "h200", [720_000, 810_000]),
        ((), "h100", [675_000]),
        (("--config.model.name=JiT-L/4",), "h200", [242_000]),
        (("--config.model.name=JiT-L/16", "--config.data.image_size=256"), "h200", [242_000]),
        (("--config.model.name=JiT-H/16", "--config.data.image_size=256"), "h200", [116_000]),
        (("--config.model.name=JiT-H/16", "--config.data.image_size=256"), "h100", []),
        (("--config.model.name=JiT-S/4",), "h200", []),
        (("--config.data.image_size=128",), "h200", []),  # 1024 tokens have other attention kernels
        (("--config.remat=full",), "h200", []),
        (("--config.dtype=float32",), "h200", []),
    ],
)
def test_rows_of_measured_speeds_are_those_of_the_same_shapes_on_the_same_card(overrides, card, speeds, config_file, capsys):
    argv = (f"--config={config_file}", *overrides, f"--card={card}", "--devices=1", "--tokens=1e9")
    estimate_lib.main(["estimate", *argv])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.split("-\n", 1)[1].splitlines()]
    ours = [int(row[row.index("batch") + 3].replace(",", "")) for row in rows if "batch" in row]
    assert ours == pytest.approx(speeds, rel=2e-2)  # per token another patch has other operations
    assert len(rows) == 3 + len(speeds) and ("was not measured" in printed) == (not speeds)


def make_run(folder, *, devices=None, device_kind="NVIDIA H200", speeds=(100.0, 630e3, 626e3, 610e3)):
    config = Settings(model=Model(class_conditional=True))
    facts = {"devices": devices, "device_kind": device_kind}
    saved = to_dict(config) | {name: value for name, value in facts.items() if value}
    (folder / "config.json").write_text(json.dumps(saved))
    with open(folder / "metrics.jsonl", "w") as file:
        for step, speed in enumerate(speeds, 1):
            file.write(json.dumps({"step": step, "train/loss": 0.5}) + "\n")
            file.write(json.dumps({"step": step * 100, "train/tokens_per_second": speed}) + "\n")
        file.write('{"step": 401, "train/tokens_per_sec')  # a live run


def test_a_run_adds_its_own_median_speed_scaled_to_the_devices(tmp_path, config_file, capsys):
    make_run(tmp_path, devices=1)
    row = table(capsys, "--from", tmp_path, "--tokens=1e12", "--devices=4")[-1]
    median = 618e3  # of 100, 610e3, 626e3, 630e3
    assert row[:2] == ["this", "run"] and row[3] == f"{4 * median:,.0f}"
    assert row[4:6] == [f"{1e12 / (4 * median) / 86400:.1f}", "days"]
    # The same run says something about a larger model: the same share of the card.
    config = (f"--config={config_file}", "--config.model.name=JiT-L/4")
    larger = table(capsys, *config, "--from", tmp_path, "--tokens=1e12", "--devices=4")[-1]
    ratio = forward_macs(make_geometry("JiT-B/4", 64, 1000)) / forward_macs(make_geometry("JiT-L/4", 64, 1000))
    assert float(larger[3].replace(",", "")) == pytest.approx(4 * median * ratio, rel=1e-5)
    assert larger[2] == row[2]


def test_a_run_that_does_not_say_its_devices_asks_for_them(tmp_path, capsys):
    make_run(tmp_path)
    with pytest.raises(UserError, match="--run_devices"):
        table(capsys, "--from", tmp_path)
    assert table(capsys, "--from", tmp_path, "--run_devices=2", "--devices=2", "--tokens=1e9")[-1][3] == "618,000"


@pytest.mark.parametrize(
    ("device_kind", "argv", "says"),
    [
        ("NVIDIA H100 80GB HBM3", ["--card=h200"], "use --card=h100"),
        ("cpu", [], "the run was on cpu"),
        ("cpu", ["--run_card=h200"], "the run was on cpu"),  # what the run recorded is what counts
        ("NVIDIA A100-SXM4-80GB", [], "A100"),
        (None, [], "--run_card=h200"),
        (None, ["--run_card=h100", "--card=h200"], "use --card=h100"),
    ],
)
def test_a_run_on_another_kind_of_device_is_refused(device_kind, argv, says, tmp_path, capsys):
    make_run(tmp_path, devices=1, device_kind=device_kind)
    with pytest.raises(UserError, match=says):
        table(capsys, "--from", tmp_path, *argv)


def test_the_card_of_the_run_is_that_of_the_estimate(tmp_path, capsys):
    for device_kind, argv in (("NVIDIA H100 80GB HBM3", []), (None, ["--run_card=h100"])):
        make_run(tmp_path, devices=1, device_kind=device_kind)
        estimate_lib.main(["estimate", f"--from={tmp_path}", *argv])
        assert "8 x H100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--config"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config=CONFIG", "--tokens=many"], "--tokens=many"),
        (["--config=CONFIG", "--tokens=1e9,-1"], "--tokens"),
        (["--config=CONFIG", "--devices=0"], "devices"),
        (["--config=CONFIG", "--card=tpu"], "card"),
        (["--config=CONFIG", "--token=1e9"], "token"),
        (["--config=CONFIG", "--config.modl.name=x"], "modl"),
        (["--config=CONFIG", "--config.model.name=JiT-Q/4"], "JiT-Q/4"),
        (["--config=CONFIG:arg"], "get_config"),
        (["--config=CONFIG", "stray"], "stray"),
        (["--from=EMPTY"], "config.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, tmp_path, config_file, capsys):
    argv = [arg.replace("CONFIG", str(config_file)).replace("EMPTY", str(tmp_path)) for arg in argv]
    assert cli.guarded(lambda: estimate_lib.main(["estimate", *argv])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and says in captured.err
