"""Input: image folders and prepared sets, in an order that depends on (seed, example index) alone. Imports no jax."""

from jitjax.data.dataset import DataSet, check_fingerprint, open_dataset
from jitjax.data.device import to_device
from jitjax.data.image import preprocess
from jitjax.data.pipeline import make_iterator

__all__ = ["DataSet", "check_fingerprint", "make_iterator", "open_dataset", "preprocess", "to_device"]
