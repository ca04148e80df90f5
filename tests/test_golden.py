"""30 losses and gradient norms of a tiny run as they were when golden.json was written: no change of code, of library or of the
number of devices moves them by more than rounding.

`python tests/test_golden.py` writes the file anew, after a change that is meant to move them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_settings
from test_train import CONFIG_FILE, metrics

GOLDEN = Path(__file__).with_name("golden.json")
NAMES = ("train/loss", "train/grad_norm", "train/learning_rate")
# 16 images a step, and all that decides a number: flips, dropped labels, both dropouts, warm-up, decay, clipping, averages.
RUN = dict(
    total_steps=30,
    model__depth=4,
    model__context_start=1,
    model__attn_dropout=0.1,
    model__proj_dropout=0.1,
    optim__warmup_steps=5,
    optim__schedule="cosine",
    optim__weight_decay=0.1,
    optim__clip_norm=1.0,
)
ON_8 = RUN | dict(batch_size=1, optim__accumulation_steps=2)
ON_1 = RUN | dict(batch_size=16)
TOLERANCE = 5e-6  # relative; jax 0.10.2 and 0.12, LLVM with and without its passes, differ by up to 8e-7


def columns(workdir):
    return {name: [line[name] for line in metrics(workdir)] for name in NAMES}


def assert_golden(found):
    golden = json.loads(GOLDEN.read_text())
    for name in NAMES:
        assert len(found[name]) == 30
        np.testing.assert_allclose(found[name], golden[name], rtol=TOLERANCE, err_msg=name)


def test_on_8_devices(tmp_path):
    from jitjax.train import train

    train(small_settings(**ON_8), tmp_path)
    assert_golden(columns(tmp_path))


@pytest.mark.slow
def test_on_1_device(tmp_path):
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests"), overrides=ON_1))
    command = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "config.json").read_text())["devices"] == 1
    assert_golden(columns(workdir))


if __name__ == "__main__":
    import tempfile

    import jax

    from jitjax.train import train

    with tempfile.TemporaryDirectory() as folder:
        train(small_settings(**ON_8), folder)
        GOLDEN.write_text(json.dumps({"jax": jax.__version__, **columns(Path(folder))}, indent=1) + "\n")
