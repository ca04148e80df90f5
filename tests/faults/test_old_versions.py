"""Checkpoints that earlier versions wrote are read, with the numbers that they were written with, and their runs go on."""

import logging
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jitjax import checkpoint, ema, from_settings, replay, saving, sharding
from jitjax.geometry import Geometry

FIXTURES = Path(__file__).parent / "fixtures"
# JiT with one block of width 8 after 3 steps on drawn shapes, by jax 0.10.2 and orbax-checkpoint 0.12.8. The sums of absolute
# values were taken by the version that wrote it.
WRITTEN = {
    "0.1.0": {"params": 283.9866306680269, "0.9": 282.83767509337264},
    "checksums": {"params": 283.9866306680269, "0.9": 282.83767509337264, "power:0.1": 283.96704675106344},
}
MU = 0.8705089460271631  # AdamW's first moments


def total(params) -> float:
    return float(sum(np.abs(np.asarray(value, np.float64)).sum() for value in params.values()))


@pytest.mark.parametrize("version", WRITTEN)
def test_what_earlier_versions_wrote(tmp_path, caplog, version):
    with tarfile.open(FIXTURES / f"workdir_{version}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    weights = checkpoint.load_weights(tmp_path)
    assert ("has no checksums (written by jitjax 0.1.0)" in caplog.text) == (version == "0.1.0")
    assert weights.step == 3 and len(weights.params) == 28 and weights.geometry.width == 8
    assert weights.meta["versions"]["orbax-checkpoint"] == "0.12.8"
    found = {"params": total(weights.params)} | {name: total(params) for name, params in weights.ema.items()}
    assert found == pytest.approx(WRITTEN[version], rel=1e-12)

    caplog.set_level(logging.ERROR)
    settings, _ = replay.configuration(tmp_path)  # and a run goes on from there, on more devices than it had
    like = from_settings.abstract_state(settings, Geometry(**weights.meta["geometry"]), sharding.make_mesh(4, 1, 2))
    saved = saving.Checkpoints(tmp_path)
    state, step, meta = saved.resume(like)
    saved.close()
    assert (step, int(state.step), int(state.opt_state[0].count), meta["examples"]) == (3, 3, 3, 12)
    assert total(state.params) == pytest.approx(WRITTEN[version]["params"], rel=1e-12)
    assert total(state.opt_state[0].mu) == pytest.approx(MU, rel=1e-6)
    for step, sigma_rel, read in ema.find_snapshots(tmp_path / "ema"):
        assert (step, sigma_rel) == (3, 0.1) and total(read()) == pytest.approx(WRITTEN[version]["power:0.1"], rel=1e-4)
    assert jax.device_count() == 8
