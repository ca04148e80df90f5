"""Operation counts and the table of times."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import small_settings

from jitjax import cli, speeds, timing
from jitjax import estimate as estimate_lib
from jitjax.cards import CARDS, datasheet_flops
from jitjax.data.shapes import CLASSES
from jitjax.errors import UserError
from jitjax.flops import forward_macs, parameters, train_flops
from jitjax.geometry import geometry_of, make_geometry
from jitjax.model import JiT, graphdef_of, init_fn, merge
from jitjax.plan import make_plan
from jitjax.settings import Model, Settings, to_dict
from jitjax.train import train

ROOT = Path(__file__).parents[1]
CONFIG = "from jitjax.config import default_config\ndef get_config():\n  return default_config()\n"  # JiT-B/4, 64 px
SMALL = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
def get_config():
    from conftest import small_config
    return small_config()
"""


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


@pytest.mark.parametrize(
    "name, classes, overrides", [("JiT-nano/4", 10, {}), ("JiT-S/2", 0, {"context_length": 0, "mlp_ratio": 3})]
)
def test_number_of_parameters_equals_the_model(name, classes, overrides):
    geometry = make_geometry(name, 16, classes, **overrides)
    shapes = jax.eval_shape(init_fn(geometry), jax.random.key(0))
    assert parameters(geometry) == sum(math.prod(leaf.shape) for leaf in shapes.values())


def test_only_cards_with_the_sxm_datasheet_get_its_number():
    kinds = dict.fromkeys(("NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H200 MIG 1g.18gb"))
    kinds |= {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 SXM": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": None,
        "NVIDIA H200 NVL": None,
    }
    assert {kind: datasheet_flops(kind) for kind in kinds} == kinds
    assert datasheet_flops("cpu") is None


# ---------------------------------------------------------------- the guide's table


@pytest.mark.parametrize("context_length", [None, 0], ids=["with labels", "without context tokens"])
def test_rows_of_the_guide(context_length):
    geometry = make_geometry("JiT-B/4", 64, 1000, context_length=context_length)
    utilisations = speeds.guide_utilisations(geometry)
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
    assert a.tokens_per_second == pytest.approx(0.4 * 4 * CARDS["h200"].flops / (train_flops(small) / 256))


# ---------------------------------------------------------------- the command


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "b4.py"
    path.write_text(CONFIG)
    return path


def tables(text):
    """What the command prints, as {"from" | "the" | "what": rows}; a row is {column: cell}."""
    found = {}
    for part in text.split("\n\n")[1:]:
        title, *lines = part.splitlines()
        rule = next(i for i, line in enumerate(lines) if set(line) == {"-"})
        header = [(m[0], m.end()) for m in re.finditer(r"\S+(?: \S+)*", lines[rule - 1])]
        starts = [0, *(end for _, end in header[:-1])]
        found[title.split()[0]] = [
            {name: line[start:end].strip() for start, (name, end) in zip(starts, header, strict=True)}
            for line in lines[rule + 1 :]
        ]
    return found


def run_command(capsys, *argv):
    estimate_lib.main(["estimate", *map(str, argv)])
    return tables(capsys.readouterr().out)


def rates_of(rows):
    return [float(row["tokens/s"].replace(",", "")) for row in rows]


def test_the_command_prints_the_guides_table_and_starts_no_backend(config_file):
    result = subprocess.run(
        [sys.executable, "-m", "jitjax.estimate", "--config", config_file, "--tokens", "10e9,1e12", "--devices", "8"],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},  # starting one would fail
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    ours, guide = (tables(result.stdout)[name] for name in ("from", "the"))
    assert [row["estimate"] for row in guide] == ["conservative", "middle", "optimistic"] * 2
    first = "1e10 39,062,500 30.5 conservative 1.77% 240,000 11.6_hours 92.6".split()
    assert list(guide[0].values())[:-1] == [cell.replace("_", " ") for cell in first]
    assert (guide[5]["time"], guide[5]["GPU-hours"]) == ("18.1 days", "3,472")
    # One card's 720 thousand tokens/s at batch 64, times eight, less exchange and pauses.
    assert rates_of(ours[:3]) == pytest.approx(
        [8 * 720e3 * x * y for x, y in ((0.88, 0.9), (0.93, 0.97), (0.97, 0.99))], rel=1e-3
    )
    assert "assumed: 88%, 93%, 97%" in result.stdout and "assumed: 90%, 97%, 99%" in result.stdout


def test_overrides_price_and_data_set_size_count(config_file, capsys):
    overrides = ("--config.data.image_size=32", "--tokens=64e6", "--images_per_epoch=500000", "--price_per_gpu_hour=10")
    (row, *_) = run_command(capsys, f"--config={config_file}", *overrides)["the"]
    assert (row["tokens"], row["images"], row["epochs"]) == ("6.4e7", "1,000,000", "2")
    assert float(row["cost"]) == pytest.approx(10 * float(row["GPU-hours"]), rel=5e-3)


@pytest.mark.parametrize(
    ("overrides", "card", "speed"),
    [
        ((), "h200", 720e3),
        (("--config.batch_size=255",), "h200", 720e3),
        (("--config.batch_size=256",), "h200", 810e3),
        (("--config.batch_size=8",), "h200", 720e3),
        ((), "h100", 675e3),
        (("--config.model.name=JiT-L/4",), "h200", 242e3),
        (("--config.model.name=JiT-H/16", "--config.data.image_size=256"), "h200", 116e3),
        (("--config.model.name=JiT-H/16", "--config.data.image_size=256"), "h100", None),
        (("--config.model.name=JiT-S/4",), "h200", None),
        (("--config.data.image_size=128",), "h200", None),  # 1024 tokens have other attention kernels
        (("--config.remat=full",), "h200", None),
        (("--config.dtype=float32",), "h200", None),
        (("--config.optim.name=muon",), "h200", 667e3),
        (("--config.optim.name=muon", "--config.batch_size=256"), "h200", 792e3),
        (("--config.optim.name=muon",), "h100", None),
    ],
)
def test_measured_speeds_are_those_of_the_same_shapes_on_the_same_card(overrides, card, speed, config_file, capsys):
    estimate_lib.main(["estimate", f"--config={config_file}", *overrides, f"--card={card}", "--devices=1", "--tokens=1e9"])
    printed = capsys.readouterr().out
    assert ("was not measured" in printed) == (speed is None) == ("from" not in tables(printed))
    if speed:
        middle = rates_of(tables(printed)["from"])[1]
        assert middle == pytest.approx(0.97 * speed, rel=2e-2)  # per token another patch has other operations


def test_what_changes_what(config_file, capsys):
    """Tokens, operations and parameters of each variant, and the recipe's learning rate for its batch."""
    rows = {row["change"]: row for row in run_command(capsys, f"--config={config_file}", "--devices=4")["what"]}
    here, wide, fine = rows["this run"], rows["batch_size 256"], rows["patch 2"]
    assert here["learning rate"] == "5e-05" and wide["learning rate"] == "0.0002"
    ratio = float(wide["images/s"].replace(",", "")) / float(here["images/s"].replace(",", ""))
    assert ratio == pytest.approx(810 / 720, rel=2e-3)
    assert (here["tokens/image"], fine["tokens/image"], rows["image_size 128"]["tokens/image"]) == ("256", "1,024", "1,024")
    assert rows["JiT-L"]["GFLOP/image"] == f"{train_flops(make_geometry('JiT-L/4', 64, 1000)) / 1e9:,.0f}"
    assert (
        "JiT-B" not in rows and rows["JiT-H"]["parameters"] == f"{parameters(make_geometry('JiT-H/4', 64, 1000)) / 1e6:,.0f} M"
    )


def make_run(folder, *, devices=None, device_kind="NVIDIA H200", speeds=(100.0, 630e3, 626e3, 610e3), seconds=None):
    config = Settings(model=Model(class_conditional=True))
    facts = {"devices": devices, "device_kind": device_kind}
    saved = to_dict(config) | {name: value for name, value in facts.items() if value}
    (folder / "config.json").write_text(json.dumps(saved))
    with open(folder / "metrics.jsonl", "w") as file:
        for step, speed in enumerate(speeds, 1):
            file.write(json.dumps({"step": step, "train/loss": 0.5}) + "\n")
            file.write(json.dumps({"step": step * 100, "train/tokens_per_second": speed}) + "\n")
        file.write('{"step": 401, "train/tokens_per_sec')  # a live run
    if seconds:
        (folder / "time.json").write_text(json.dumps({"seconds": dict.fromkeys(timing.KINDS, 0.0) | seconds}))


def test_a_run_gives_deciles_of_its_speed_and_its_goodput(tmp_path, config_file, capsys):
    values = [600e3 + 1e3 * i for i in range(21)]
    make_run(tmp_path, devices=1, speeds=values, seconds=dict(startup=50, compile=50, step=900, input_wait=20, save=80))
    rows = run_command(capsys, "--from", tmp_path, "--tokens=1e12", "--devices=1")["from"]
    goodput = 920 / 1000  # of what repeats
    assert rates_of(rows) == pytest.approx([602e3 * 0.9, 610e3 * goodput, 618e3 * 0.99], rel=1e-6)
    # On more cards the exchange is new; on as many as the run had it is in the measurement.
    rows = run_command(capsys, "--from", tmp_path, "--tokens=1e12", "--devices=4")["from"]
    assert rates_of(rows)[1] == pytest.approx(4 * 0.93 * 610e3 * goodput, rel=1e-6)
    make_run(tmp_path, devices=4, speeds=values)
    same = rates_of(run_command(capsys, "--from", tmp_path, "--tokens=1e12", "--devices=4")["from"])
    assert same[1] == pytest.approx(610e3 * goodput, rel=1e-6)
    # The same run says something about a larger model: the same share of the card.
    config = (f"--config={config_file}", "--config.model.name=JiT-L/4")
    larger = rates_of(run_command(capsys, *config, "--from", tmp_path, "--tokens=1e12", "--devices=4")["from"])
    ratio = forward_macs(make_geometry("JiT-B/4", 64, 1000)) / forward_macs(make_geometry("JiT-L/4", 64, 1000))
    assert larger[1] == pytest.approx(same[1] * ratio, rel=1e-5)


def test_a_run_that_does_not_say_its_devices_asks_for_them(tmp_path, capsys):
    make_run(tmp_path)
    with pytest.raises(UserError, match="--run_devices"):
        run_command(capsys, "--from", tmp_path)
    rows = run_command(capsys, "--from", tmp_path, "--run_devices=2", "--devices=2", "--tokens=1e9")["from"]
    assert rates_of(rows)[1] == pytest.approx(618e3 * 0.97, rel=1e-5)  # the median of 100, 610e3, 626e3, 630e3


def test_a_run_that_went_on_with_other_devices_is_measured_since_then(tmp_path, capsys):
    """Its lines have the number of the start, and its log the devices of each."""
    make_run(tmp_path, devices=1)
    (tmp_path / "log.txt").write_text(
        "".join(f"JiT-B/4, 9 parameters, {n}, kernels fused\n" for n in ("8 devices", "1 device"))
    )
    lines = [(start, speed) for start, speed in ((1.0, 5.2e6),) * 100 + ((2.0, 0.7e6),) * 3]
    text = "".join(json.dumps({"step": 1, "train/tokens_per_second": v, "time/starts": start}) + "\n" for start, v in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "time.json").write_text(json.dumps({"starts": 2}))
    argv = ("--from", tmp_path, "--devices=1", "--tokens=1e9")
    assert rates_of(run_command(capsys, *argv)["from"])[1] == pytest.approx(0.97 * 0.7e6, rel=1e-5)
    # Files of an earlier version do not tell.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/tokens_per_second": 700000.0}\n')
    estimate_lib.main(["estimate", *map(str, argv)])
    assert "log.txt has starts on 8 devices, 1 device; the files do not tell" in capsys.readouterr().out
    make_run(tmp_path, devices=1, speeds=(5.2e6,))
    with pytest.raises(UserError, match=r"would be 3..% of the operations in the datasheet.*--run_devices"):
        run_command(capsys, *argv)
    assert rates_of(run_command(capsys, *argv, "--run_devices=8")["from"])


@pytest.mark.slow
def test_measured_on_the_spot(tmp_path, capsys, monkeypatch):
    """On this machine's CPU devices, which have no datasheet: no utilisation and no guide."""
    monkeypatch.setattr(speeds, "STRETCH_SECONDS", 0.2)
    (tmp_path / "small.py").write_text(SMALL)
    found = run_command(capsys, f"--config={tmp_path / 'small.py'}", "--measure", "--tokens=1e6")
    assert [row["utilisation"] for row in found["from"]] == ["-"] * 3 and "the" not in found
    low, middle, high = rates_of(found["from"])
    assert 0 < low < middle < high


@pytest.mark.slow
def test_storage_is_what_a_run_leaves_on_disk(tmp_path):
    config = small_settings(total_steps=6, checkpoint__every_steps=2, checkpoint__keep_last=2, model__width=128)
    assert train(config, tmp_path) == 0
    geometry = geometry_of(config.model, 8, len(CLASSES))
    plan = make_plan(config, images=512, tokens_per_image=geometry.tokens, devices=jax.device_count())
    left = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    predicted = estimate_lib.storage(config, geometry, plan)
    assert left == pytest.approx(predicted * 2 / 3, rel=0.1)  # the prediction has room for one more checkpoint


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
        run_command(capsys, "--from", tmp_path, *argv)


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
        (["--config=CONFIG", "--run_card=h100"], "use --card"),
        (["--config=CONFIG", "--run_devices=3"], "use --devices"),
        (["--config=CONFIG", "--config.total_steps=10"], "--tokens=N,M"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, tmp_path, config_file, capsys):
    argv = [arg.replace("CONFIG", str(config_file)).replace("EMPTY", str(tmp_path)) for arg in argv]
    assert cli.guarded(lambda: estimate_lib.main(["estimate", *argv])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and says in captured.err
