"""Zero-shot classification: a class is the mean of its prompts, and a tie is a miss.

The accuracy itself is :func:`~llm2clip_vlm.metrics.retrieval.recall_at_k` of images among classes:
embeddings that collapsed to one point score 0 %, not the share of the first class.

Paper: CLIP (2103.00020) section 3.1.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes, those of a class one after the other.

    Raises:
        ValueError: A template without `{}`.
    """
    if bad := [template for template in templates if "{}" not in template]:
        raise ValueError(f"templates: {bad[0]!r}: expected one `{{}}` where the name goes")
    return [template.replace("{}", name) for name in names for template in templates]


def class_embeds(
    embed: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "classes d"]:
    """One unit vector a class: the mean over the templates.

    Args:
        embed: Prompts to unit vectors.
        names: Names of the classes.
        templates: Texts with `{}` where the name goes.
    """
    embeds = embed(class_prompts(names, templates))
    means = reduce(embeds, "(classes t) d -> classes d", "mean", t=len(templates))
    return F.normalize(means, dim=-1)


def one_label(captions: Mapping[str, Sequence[str]], where: str) -> str:
    """The label of an image, which stands in the place of its captions.

    Raises:
        ValueError: It has several.
    """
    labels = [text for texts in captions.values() for text in texts]
    if len(labels) != 1:
        raise ValueError(f"{where}: expected one label an image, got {len(labels)}: {labels}")
    return labels[0]


def label_rows(labels: Sequence[str], classes: Mapping[str, str], where: str) -> list[int]:
    """Position of each label's class.

    Raises:
        ValueError: A label that is no class.
    """
    rows = {name: row for row, name in enumerate(classes)}
    if unknown := sorted(set(labels) - set(rows)):
        raise ValueError(f"{where}: has no class {unknown[0]!r}, which images are labelled with")
    return [rows[label] for label in labels]


def mean_per_class(right: np.ndarray, labels: np.ndarray) -> float:
    """Per cent right, each class of equal weight."""
    return 100.0 * float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
