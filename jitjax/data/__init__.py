"""Input: image folders and prepared sets, in an order that depends on (seed, example index) alone. Imports no jax."""

from jitjax.data.dataset import DataSet, check_fingerprint, open_dataset
from jitjax.data.device import to_device
from jitjax.data.image import preprocess
from jitjax.data.pipeline import HostIterator, make_iterator, names

__all__ = ["DataSet", "HostIterator", "check_fingerprint", "make_iterator", "names", "open_dataset", "preprocess", "to_device"]
