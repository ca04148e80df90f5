"""What a run tells: one status line, `metrics.jsonl`, Weights & Biases, sample grids. Imports neither jax nor wandb."""

from jitjax.monitor.images import save_grid
from jitjax.monitor.late import LateLog
from jitjax.monitor.monitor import Monitor
from jitjax.monitor.throughput import Throughput

__all__ = ["LateLog", "Monitor", "Throughput", "save_grid"]
