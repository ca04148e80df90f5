"""How a run reports: console and `log.txt`, `metrics.jsonl`, W&B, TensorBoard, grids. Imports neither jax nor wandb."""

from jitjax.monitor.images import draw_grid, drawn_here, save_animation, save_grid, save_strip
from jitjax.monitor.late import LateLog
from jitjax.monitor.monitor import Monitor
from jitjax.monitor.status import print_status
from jitjax.monitor.throughput import Throughput

__all__ = [
    "LateLog",
    "Monitor",
    "Throughput",
    "draw_grid",
    "drawn_here",
    "print_status",
    "save_animation",
    "save_grid",
    "save_strip",
]
