"""The order of examples: a permutation each epoch, the same for ever, and random enough."""

import numpy as np
import pytest

from jitjax.data.order import ExampleOrder, permute

FROZEN_IMAGES = [1168285, 370866, 469535, 775330, 47462, 574591]
FROZEN_FLIPS = [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 4097])
def test_each_key_is_a_permutation(count):
    for key in range(20):
        keys = np.full(count, key * 7919, np.uint64)
        assert np.array_equal(np.sort(permute(np.arange(count), count, keys)), np.arange(count))


def test_an_epoch_shows_every_image_at_most_once_and_leaves_out_only_the_remainder():
    order = ExampleOrder(seed=3, count=103, global_batch=10)
    epochs = [order.images(np.arange(100) + 100 * epoch) for epoch in range(50)]
    assert all(len(set(epoch.tolist())) == 100 for epoch in epochs)
    assert not any(np.array_equal(a, b) for a, b in zip(epochs, epochs[1:], strict=False))
    left_out = {image for epoch in epochs for image in set(range(103)) - set(epoch.tolist())}
    assert len(left_out) > 60  # another remainder each epoch: 50 epochs leave out 150 times


def test_the_order_does_not_depend_on_how_it_is_asked_for():
    order = ExampleOrder(seed=11, count=1000, global_batch=64)
    examples = np.arange(700, 2900)  # three epochs
    together = order.images(examples)
    shuffled = np.random.default_rng(0).permutation(len(examples))
    assert np.array_equal(order.images(examples[shuffled]), together[shuffled])
    assert np.array_equal(np.concatenate([order.images([i]) for i in examples[:50]]), together[:50])


def test_the_order_is_the_one_that_older_versions_had():
    """A run resumed by a later version of this program (or of Grain, numpy, Python) must go on in the same order."""
    order = ExampleOrder(seed=42, count=1_281_167, global_batch=1024)
    examples = np.array([0, 1, 2, 1_281_023, 1_281_024, 123_456_789])
    assert order.images(examples).tolist() == FROZEN_IMAGES
    assert order.flips(np.arange(16)).astype(int).tolist() == FROZEN_FLIPS


def test_places_pairs_and_flips_are_uniform():
    """Chi-squared over 4000 epochs of 12 images: each image at each place, and each ordered pair side by side."""
    order = ExampleOrder(seed=5, count=12, global_batch=12)
    epochs = order.images(np.arange(12 * 4000)).reshape(4000, 12)
    places = np.zeros((12, 12))
    np.add.at(places, (np.tile(np.arange(12), 4000), epochs.ravel()), 1)
    pairs = np.zeros((12, 12))
    np.add.at(pairs, (epochs[:, :-1].ravel(), epochs[:, 1:].ravel()), 1)
    pairs = pairs[~np.eye(12, dtype=bool)]
    for counts, freedom in ((places, 121), (pairs, 131)):
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom), chi2
    flips = order.flips(np.arange(100_000))
    assert abs(flips.mean() - 0.5) < 0.008
    assert abs(np.corrcoef(flips[1:], flips[:-1])[0, 1]) < 0.015


def test_seeds_give_unrelated_orders():
    examples = np.arange(5000)
    first, second = (ExampleOrder(seed, 5000, 100).images(examples) for seed in (0, 1))
    assert (first == second).mean() < 0.002
    assert np.array_equal(first, ExampleOrder(0, 5000, 100).images(examples))
    for seed in (-1, 2**63, 2**70):  # any Python integer is a seed
        ExampleOrder(seed, 5000, 100).images(examples)
