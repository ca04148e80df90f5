"""A checkpoint written by each released version is read, with the numbers that it was written with."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from jitjax import checkpoint, saving

FIXTURES = Path(__file__).parent / "fixtures"


def total(params) -> float:
    return float(sum(np.abs(np.asarray(value, np.float64)).sum() for value in params.values()))


def test_a_checkpoint_that_0_1_0_wrote(tmp_path, caplog):
    """JiT with one block of width 8 after 3 steps on drawn shapes (jitjax 0.1.0, orbax-checkpoint 0.12.8); the sums were taken
    by that version."""
    with tarfile.open(FIXTURES / "workdir_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    weights = checkpoint.load_weights(tmp_path)
    assert "has no checksums (written by jitjax 0.1.0)" in caplog.text
    assert weights.step == 3 and len(weights.params) == 28 and weights.geometry.width == 8
    assert total(weights.params) == pytest.approx(283.9866306680269, rel=1e-12)
    assert total(weights.ema["0.9"]) == pytest.approx(282.83767509337264, rel=1e-12)
    saved = saving.Checkpoints(tmp_path)  # and a run goes on from there
    assert saved.latest() == 3
    saved.close()
