"""Scores of generated images: extractors, statistics, and the protocol that joins them. `jitjax.metrics` has the formulas.

Nothing is imported here, so that reading statistics does not start JAX:

    statistics   FeatureStatistics, Statistics, read_statistics, write_statistics, npz_images
    extractor    Extractor, open_extractor: pictures to features on all devices
    score        open_reference, open_images, class_balanced_labels, score
    seams        seam_index
"""


def higher_is_better(score: str) -> bool:
    """Of a score by its name, with or without "eval/"; distances and losses are better when lower."""
    name = score.removeprefix("eval/")
    return name in ("inception_score", "precision", "recall") or name.startswith("is_")  # "is_efficientnet_lite0"
