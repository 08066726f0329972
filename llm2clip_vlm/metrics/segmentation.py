"""Intersection over union of classes: pixels are counted image by image, then summed."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm2clip_vlm.metrics.statistics import bootstrap_of_sums

UNJUDGED = 255
"""Mask value of pixels without a class."""


def overlaps(found: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of each class that are right, found and there: `int[3, classes]`.

    Raises:
        ValueError: A mask value that is no class.
    """
    judged = labels != UNJUDGED
    there, found = labels[judged], found[judged]
    if len(there) and there.max() >= num_classes:
        raise ValueError(f"a mask has class {there.max()}, but there are {num_classes} names")
    parts = (there[found == there], found, there)
    return np.stack([np.bincount(part, minlength=num_classes) for part in parts])


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union in per cent of `[..., 3, classes]`; NaN where a class is nowhere."""
    right, found, there = np.moveaxis(counts.astype(np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100.0 * right / (found + there - right)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Mean of :func:`class_iou` over the classes that are somewhere."""
    return np.asarray(np.nanmean(class_iou(counts), axis=-1))


def paired_iou(a: np.ndarray, b: np.ndarray, n: int = 10_000) -> dict[str, Any]:
    """Difference of two mean IoU on the same images, with a 95 % interval (bootstrap by image).

    Args:
        a: `int[images, 3, classes]`, :func:`overlaps` of each image.
        b: The same images in the same order.
        n: Resamples.

    Returns:
        `{"delta": a - b, "ci": [low, high], "n": images, "images": images}`, in percentage points.

    Raises:
        ValueError: The masks have other numbers of pixels.
    """
    if a.shape != b.shape or (a[:, 2] != b[:, 2]).any():
        raise ValueError(
            f"counts: expected the same masks, got {a.shape} and {b.shape} (images, counts, "
            "classes) or other pixels of a class: they were made on different data"
        )

    def differences(sums: np.ndarray) -> np.ndarray:
        return mean_iou(sums[:, 0]) - mean_iou(sums[:, 1])

    both = np.stack([a, b], axis=1)
    delta, ends = differences(both.sum(0)[None])[0], bootstrap_of_sums(both, differences, n, 0)
    ci = np.clip(ends, -100.0, 100.0).tolist()
    return {"delta": float(delta), "ci": ci, "n": len(a), "images": len(a)}
