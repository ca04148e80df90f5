"""Which image is seen when: a pure function of (seed, global example index), computed without tables or state.

Example `i` of a run (counted from 0 over all steps, processes and restarts) belongs to epoch `i // per_epoch`. Each
epoch visits the data set in a fresh pseudo-random permutation: a Feistel network over the next power of two, walked
until it falls inside the data set (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). The hash is
splitmix64, so the order does not depend on the version of any library. Everything is vectorised: an array of example
indices goes in, an array of image indices comes out.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_ROUNDS = 8
_MASK64 = (1 << 64) - 1
_PERMUTATION, _FLIP = 1, 2  # independent streams drawn from one seed


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a good 64-bit hash of uint64 values. Array arithmetic wraps, as wanted."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, stream: int) -> np.ndarray:
    """A uint64 key (shape (1,)) for one stream of one seed; any Python integer is a valid seed."""
    folded = np.array([((seed & _MASK64) * 0x9E3779B97F4A7C15 + (seed >> 64) + stream) & _MASK64], np.uint64)
    return _mix(_mix(folded) + np.uint64(stream))


def permute(values: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Sends each of `values` (int64, in [0, count)) through the permutation of [0, count) that its key names.

    Args:
      values: (n,) int64. count: size of the domain. keys: (n,) uint64, one key per value; equal keys, same permutation.
    """
    bits = max(4, (count - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    shift = np.uint64(low_bits)
    result = np.empty(len(values), np.int64)
    todo = np.arange(len(values))
    x = values.astype(np.uint64)
    while len(todo):
        high, low = x >> shift, x & low_mask
        for r in range(_ROUNDS):
            round_key = keys + np.uint64((r + 1) * 0xD1342543DE82EF95 & _MASK64)
            if r % 2 == 0:
                high = high ^ (_mix(low + round_key) & high_mask)
            else:
                low = low ^ (_mix(high + round_key) & low_mask)
        x = (high << shift) | low
        inside = x < np.uint64(count)
        result[todo[inside]] = x[inside].astype(np.int64)
        outside = ~inside
        todo, x, keys = todo[outside], x[outside], keys[outside]
    return result


@dataclasses.dataclass(frozen=True)
class ExampleOrder:
    """The order of a run over a data set of `count` images in global batches of `global_batch`.

    An epoch is as many whole batches as the data set holds: every image at most once, the remainder left out, a
    different remainder each epoch. Depends on nothing else: not on workers, processes, devices or where the run was
    resumed.
    """

    seed: int
    count: int
    global_batch: int
    shift: int = 0  # a run that continues with another global batch has seen more or fewer examples than steps x batch

    def __post_init__(self) -> None:
        if not 0 < self.global_batch <= self.count:
            raise ValueError(f"a global batch of {self.global_batch} does not fit into {self.count} images")

    @property
    def examples_per_epoch(self) -> int:
        return self.count // self.global_batch * self.global_batch

    def images(self, examples: np.ndarray) -> np.ndarray:
        """(n,) global example indices -> (n,) int64 indices into the data set."""
        examples = np.asarray(examples, np.int64)
        epochs, positions = np.divmod(examples, self.examples_per_epoch)
        keys = _mix(epochs.astype(np.uint64) + _key(self.seed, _PERMUTATION))
        return permute(positions, self.count, keys)

    def seen(self, step: int) -> int:
        """Examples behind optimizer step `step`, over all starts."""
        return step * self.global_batch + self.shift

    def batch(self, step: int) -> np.ndarray:
        """(global_batch,) int64 indices into the data set: the images of optimizer step `step`, from 1, in their order."""
        return self.images(np.arange(self.seen(step - 1), self.seen(step)))

    def flips(self, examples: np.ndarray) -> np.ndarray:
        """(n,) global example indices -> (n,) bool, True (half of the time) where the image is mirrored left-right."""
        hashed = _mix(np.asarray(examples, np.int64).astype(np.uint64) + _key(self.seed, _FLIP))
        return (hashed >> np.uint64(63)).astype(bool)
