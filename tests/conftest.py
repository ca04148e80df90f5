"""Eight emulated CPU devices for every test, set up before JAX is imported; helpers that several test files share."""

import importlib.metadata
import os
import shutil
import subprocess
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Nearly all of the tests' time is compilation. Small programs compile four times faster without LLVM's expensive passes, and in
# a third of that with XLA's older code generator for fusions, which later releases lack; sharding and fusion are decided before
# them. Ours are added below, so that programs started by a test find what the test itself compiled.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Compiled programs are shared by the test processes of one session and by the programs that they start, and removed after it.
COMPILED = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="jitjax-tests-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # programs that a test starts find the package compiled, too

import json  # noqa: E402
import sys  # noqa: E402
import textwrap  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from jitjax import runtime  # noqa: E402

os.environ["XLA_FLAGS"] += "".join(f" {name}={value}" for name, value in runtime.xla_flags().items())
ROOT = Path(__file__).resolve().parent.parent


def pytest_unconfigure():
    if COMPILED:  # the process that started the others, which are done
        shutil.rmtree(COMPILED, ignore_errors=True)


def shared(path: str) -> Path:
    """A reference file beside the project; the test is skipped, saying so, where it is not there."""
    file = ROOT.parent / "shared" / path
    if not file.exists():
        pytest.skip(f"needs {file}, which is not on this machine")
    return file


def json_lines(path):
    """What stands in a file of JSON lines, e.g. metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_python(script, **env):
    """Runs a script in a process of its own: W&B keeps state in the process, and a resumed run is a new one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=clean | {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def wandb_records(path):
    """The records of a W&B run by type, read by W&B's own command."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    records = {}
    for line in result.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record)
    return records


DEEPER = dict(model__depth=2, model__context_start=1)  # for `small_config`, where blocks differ or follow each other


def small_config(**overrides):
    """A run that takes a second a step or less: JiT with a block of width 32 on 8-pixel shapes. Overrides: model__depth=2."""
    from jitjax.config import default_config

    config = default_config()
    config.data.synthetic = "shapes"
    config.data.image_size = 8
    config.data.num_workers = 0
    config.model.name = "JiT-nano/4"
    for name, value in dict(depth=1, width=32, heads=2, bottleneck=8, context_length=2, context_start=0).items():
        config.model[name] = value
    config.model.class_conditional = True
    config.batch_size = 2
    config.total_steps = 4
    config.dtype = "float32"
    config.optim.lr = 1e-3
    config.optim.warmup_epochs = 0.0
    config.optim.ema_decays = (0.9, 0.5)
    config.preview.num_images = 8
    config.preview.steps = 2
    config.log.every_steps = 2
    for name, value in overrides.items():
        *parents, leaf = name.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        with target.ignore_type():
            target[leaf] = value
    return config


def small_settings(**overrides):
    """`small_config` as the program's functions take it."""
    from jitjax import settings

    return settings.from_mapping(small_config(**overrides))


class SmallDisk:
    """32 MB of memory as a file system."""

    def __init__(self, folder: Path):
        self.folder, self._taken = folder, folder / "taken"

    def fill(self, leave: int = 0) -> None:
        """Somebody else takes all but `leave` bytes."""
        with open(self._taken, "wb", buffering=0) as file:
            for size in (2**20, 2**12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
            file.truncate(file.tell() - leave)

    def free(self) -> None:
        self._taken.unlink()

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "jitjax-tests", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        pytest.skip(f"a file system cannot be mounted here ({problem})")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
