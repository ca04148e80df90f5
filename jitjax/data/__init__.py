"""Input: image folders and prepared sets, in an order that depends on (seed, example index) alone. Imports no jax."""

from jitjax.data.dataset import DataSet, Source, check_fingerprint, of_arrays, of_source, open_dataset
from jitjax.data.device import to_device
from jitjax.data.image import preprocess
from jitjax.data.pipeline import HostIterator, make_iterator, names

__all__ = [
    "DataSet",
    "HostIterator",
    "Source",
    "check_fingerprint",
    "make_iterator",
    "names",
    "of_arrays",
    "of_source",
    "open_dataset",
    "preprocess",
    "to_device",
]
