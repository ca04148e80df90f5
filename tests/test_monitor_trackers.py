"""A run in W&B and in TensorBoard: every step once over resumes, and training that goes on whatever happens to them."""

import os
import sys
import time

import numpy as np
import pytest
from conftest import json_lines, run_python, wandb_records

from jitjax.errors import UserError
from jitjax.monitor import Monitor, save_grid
from jitjax.settings import Wandb

# ---------------------------------------------------------------- W&B

FIVE = ("train/loss", "train/learning_rate", "train/grad_norm", "train/epoch_loss", "train/samples_per_second")
WANDB_RUN = """
    from jitjax.monitor import Monitor
    from jitjax.settings import Wandb
    monitor = Monitor({workdir!r}, total_steps=9, resume_step={first} - 1, run_config={{"seed": 3, "optim": {{"lr": 0.5}}}},
        wandb=Wandb(enabled=True, project="shapes", entity="us", group="ours", tags="a, b", mode="offline"))
    monitor.summary({{"devices": 8}})
    for step in range({first}, {last} + 1):
        if step == {last} - 1:
            monitor.image(step + 1, "samples", {image!r})  # the next step's metrics are one interval late
        monitor.write(step, {{"train/loss": 1 / step}})
        monitor.status(step, {{}})
    monitor.scores({first}, {{"eval/fid": 7.5}})
    monitor.close()
"""


def wandb_history(records):
    """{step: {name: value}}"""
    return {record["history"]["item"]["_step"]: record["history"]["item"] for record in records.get("history", [])}


def test_a_resumed_run_goes_on_in_the_same_wandb_run_with_every_step_image_and_score(tmp_path):
    save_grid(tmp_path / "grid.png", np.zeros((4, 8, 8, 3), np.uint8))
    for first, last in ((1, 5), (4, 9)):
        output = run_python(WANDB_RUN.format(workdir=str(tmp_path), first=first, last=last, image=str(tmp_path / "grid.png")))
        run_id = (tmp_path / "wandb_run_id").read_text().strip()
        assert output.count(f"wandb sync --id {run_id} {tmp_path}/wandb/offline-run-*-{run_id}") == 1
        assert "warning" not in output.lower() and "failed" not in output
    first, second = map(wandb_records, sorted(tmp_path.glob("wandb/offline-*/*.wandb"), key=os.path.getmtime))
    for records, steps in ((first, range(1, 6)), (second, range(4, 10))):
        run = records["run"][0]["run"]
        named = ("run_id", "project", "entity", "display_name", "run_group", "job_type")
        assert [run[name] for name in named] == [run_id, "shapes", "us", tmp_path.name, "ours", "train"]
        assert run["tags"] == ["a", "b"]
        assert {k: v for k, v in run["config"]["update"].items() if k != "_wandb"} == {"seed": 3, "optim": {"lr": 0.5}}
        metrics = [record["metric"] for record in records["metric"]]
        assert {m["name"]: m["step_metric"] for m in metrics if "step_metric" in m and "name" in m} == dict.fromkeys(
            FIVE, "step"
        )
        assert {m["name"] for m in metrics if m.get("options", {}).get("hidden")} == {"step", "eval/step"}
        history = wandb_history(records)
        assert {step: (row["step"], row["train/loss"]) for step, row in history.items()} == {s: (s, 1 / s) for s in steps}
        assert [step for step, row in history.items() if "samples.path" in row] == [max(steps)]
        scored = [(row["eval/step"], row["eval/fid"]) for row in history.values() if "eval/fid" in row]
        assert scored == [(min(steps), 7.5)]
        assert {"devices": 8} in [record["summary"]["update"] for record in records["summary"]]
        assert records["exit"][0]["exit"]["exit_code"] == 0


def test_an_unreachable_wandb_server_leaves_offline_files_and_no_trace_of_the_key(tmp_path):
    key = "0123456789abcdef" * 2 + "01234567"
    output = run_python(
        f"""
        from jitjax.monitor.wandb_run import WandbRun
        from jitjax.settings import Wandb
        run = WandbRun({str(tmp_path)!r}, {{}}, Wandb(enabled=True), init_timeout=1, finish_timeout=20)
        run.log(1, {{"train/loss": 0.5}})
        run.finish()
        """,
        WANDB_API_KEY=key,
        WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens there
    )
    connecting, failed, offline = output.splitlines()
    assert "connecting" in connecting and "going on offline" in failed and "wandb sync" in offline
    (path,) = tmp_path.glob("wandb/offline-*/*.wandb")
    assert wandb_history(wandb_records(path))[1]["train/loss"] == 0.5
    assert key not in output
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("signal", "when"), [("SIGSTOP", "while training"), ("SIGSTOP", "at the end"), ("SIGKILL", "while training")]
)
def test_a_wandb_process_that_hangs_or_dies_costs_a_warning_and_nothing_else(tmp_path, signal, when):
    output = run_python(
        f"""
        import os, psutil, signal
        from jitjax.monitor.wandb_run import WandbRun
        from jitjax.settings import Wandb
        options = Wandb(enabled=True, mode="offline")
        run = WandbRun({str(tmp_path)!r}, {{}}, options, finish_timeout=1, answer_timeout=1)
        (core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        os.kill(core.pid, signal.{signal})
        if {when == "while training"}:
            for step in range(1, 4001):  # far more than the pipe between the two holds
                run.log(step, {{f"train/{{i}}": 0.5 for i in range(20)}})
                if step % 1000 == 0:
                    run.send()
        run.finish()
        print("ended", core.is_running() and core.status() != "zombie")
        """
    )
    assert output.count("W&B failed and is off from here on") == 1 and output.endswith("ended False\n")
    assert output.count("\n") == 3


def test_without_the_package_or_a_folder_wandb_is_off_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monitor = Monitor(tmp_path, total_steps=5, wandb=Wandb(enabled=True, mode="offline"))
    for step in range(1, 6):
        monitor.write(step, {"train/loss": 0.5})
        monitor.status(step, {})
    monitor.image(5, "samples", "none.png")
    assert len(json_lines(tmp_path / "metrics.jsonl")) == 5
    monitor.close()
    assert capsys.readouterr().out.count("W&B is off for this run") == 1


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_files_hold_every_step_once_after_a_resume_and_the_images(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_grid(tmp_path / "grid.png", np.full((4, 8, 8, 3), 7, np.uint8))
    for first, last in ((1, 5), (4, 9)):
        monitor = Monitor(tmp_path, total_steps=9, resume_step=first - 1, tensorboard=True)
        for step in range(first, last + 1):
            monitor.write(step, {"train/loss": 1 / step / first})
        monitor.image(last, "samples", tmp_path / "grid.png")
        monitor.scores(last, {"eval/fid": 7.5})
        monitor.close()
        time.sleep(1.1)  # files are read in the order of the second in which they were opened
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(step, pytest.approx(1 / step / (1 if step < 4 else 4))) for step in range(1, 10)]
    assert [(event.step, event.value) for event in events.Scalars("eval/fid")] == [(9, 7.5)]
    (image,) = events.Images("samples")
    assert image.step == 9 and image.encoded_image_string == (tmp_path / "grid.png").read_bytes()


def test_tensorboard_without_its_package_is_refused_by_name(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"] + ["tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
        Monitor(tmp_path, total_steps=1, tensorboard=True)
