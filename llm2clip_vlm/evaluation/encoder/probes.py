"""Linear probe: logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from llm2clip_vlm.evaluation.encoder.benchmarks import read_classified
from llm2clip_vlm.evaluation.encoder.encoders import Encoder, keep_apart
from llm2clip_vlm.metrics.statistics import accuracy
from llm2clip_vlm.metrics.zero_shot import label_rows, mean_per_class
from llm2clip_vlm.recipe.evaluation import ClassSource, EncoderEvalRecipe, LinearProbeTask
from llm2clip_vlm.runs.hashes import hash_json

VALIDATION_SHOTS = 4
"""Few-shot: at most so many more images a class choose the regularisation (CoOp, 2109.01134)."""


def fit_logistic(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    l2: float,
    start: Float[Tensor, "c e"] | None = None,
) -> Float[Tensor, "c e"]:
    """Multinomial logistic regression by L-BFGS: summed cross entropy plus `l2 / 2 * |W|^2`.

    Args:
        features: float32, on the device that does the work.
        labels: Below `num_classes`.
        num_classes: Classes.
        l2: Strength; scikit-learn's `1 / C`.
        start: Weights to begin with. None: zeros.

    Returns:
        `[classes, d + 1]`: weights and, last, the biases, which are not regularised.
    """
    from scipy.optimize import minimize

    rows, width = torch.arange(len(labels)), features.shape[1] + 1
    begin = np.zeros((num_classes, width)) if start is None else start.double().cpu().numpy()

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = rearrange(torch.from_numpy(flat).to(features), "(c e) -> c e", e=width)
        decayed = F.pad(l2 / len(features) * weights[:, :-1], (0, 1))
        log_probs = _logits(features, weights).log_softmax(1)
        value = F.nll_loss(log_probs, labels) + (decayed * weights).sum() / 2
        slopes = log_probs.exp_()
        slopes[rows, labels] -= 1
        grad = torch.cat([slopes.T @ features, slopes.sum(0)[:, None]], 1) / len(features) + decayed
        return value.item(), rearrange(grad.double(), "c e -> (c e)").cpu().numpy()

    options = {"maxiter": 1000, "gtol": 1e-4, "ftol": 1e-9}  # scikit-learn stops at such gradients
    found = minimize(loss, begin.ravel(), jac=True, method="L-BFGS-B", options=options)
    return rearrange(torch.from_numpy(found.x).to(features), "(c e) -> c e", e=width)


def choose_l2(accuracy: Callable[[float], float]) -> float:
    """Find the strength of the best accuracy: powers of 100, then smaller steps about the best.

    Paper: CLIP (2103.00020) appendix A.3: from 1e-6 to 1e6, to 8 steps a decade.
    """
    accuracies = {exponent: accuracy(10.0**exponent) for exponent in np.arange(-6.0, 7.0, 2.0)}
    for step in (1.0, 0.5, 0.25, 0.125):
        best = max(accuracies, key=lambda exponent: accuracies[exponent])
        for near in (best - step, best + step):
            accuracies.setdefault(near, accuracy(10.0**near))
    return float(10.0 ** max(accuracies, key=lambda exponent: accuracies[exponent]))


def linear_probe(task: LinearProbeTask, encoder: Encoder, recipe: EncoderEvalRecipe) -> Any:
    """Probe the tower's pooled output, with all images and with few.

    Raises:
        ValueError: An image of train is one of test.
    """
    device = encoder.tower.model.device
    train, names, learnt, train_hash = _features(encoder, task.train)
    test, test_names, records, test_hash = _features(encoder, task.test)
    images = ([(r.root, r.image) for r in rows] for rows in (learnt, records))
    keep_apart("linear_probe", *images)
    classes = {name: name for name in sorted(set(names))}
    y, y_test = (
        torch.tensor(label_rows(labels, classes, "linear_probe: train"), device=device)
        for labels in (names, test_names)
    )
    rng = np.random.default_rng(recipe.seed)

    def probe(fit: Any, choose: Any, final: Any) -> tuple[Tensor, float]:
        """Test the images with the strength that is best on `choose`: right or wrong, and it."""
        weights: list[Tensor] = []

        def accuracy(l2: float) -> float:
            weights.append(fit_logistic(train[fit], y[fit], len(classes), l2, *weights[-1:]))
            return float(_right(train[choose], y[choose], weights[-1]).float().mean())

        l2 = choose_l2(accuracy)
        best = fit_logistic(train[final], y[final], len(classes), l2)
        return _right(test, y_test, best).cpu(), l2

    order = rng.permutation(len(train))
    held_out = max(1, round(task.validation * len(train)))
    right, l2 = probe(order[held_out:], order[:held_out], order)
    few = {}
    for shots in task.shots:
        runs = []
        for _ in range(task.draws):
            chosen = _few(rng, y.cpu().numpy(), shots, list(classes))
            runs.append(float(probe(*chosen, chosen[0])[0].float().mean()) * 100.0)
        few[str(shots)] = {"top1": float(np.mean(runs)), "draws": runs}
    return {
        "protocol": "L-BFGS on the pooled output before projection, at most 1,000 iterations; "
        f"L2 swept on {task.validation:.0%} of train, then fitted on all (CLIP A.3); few-shot: "
        f"swept on at most {VALIDATION_SHOTS} more images a class, fitted without them",
        "data_hash": hash_json([train_hash, test_hash]),
        "top1": accuracy(right.numpy(), range(len(test)), recipe.bootstrap, recipe.seed),
        "mean_per_class": mean_per_class(right.numpy(), y_test.cpu().numpy()),
        "l2": l2,
        "samples": {"": ([record.key for record in records], right.numpy())},
        "shots": few,
        "chance_top1": 100.0 / len(classes),
        "images": {"train": len(train), "test": len(test)},
    }


def _features(encoder: Encoder, source: ClassSource) -> tuple[Tensor, list[str], list[Any], str]:
    records, labels = read_classified(source)
    pooled, image_hash = encoder.pool(records)
    pooled = pooled.to(encoder.tower.model.device)
    return pooled, labels, records, hash_json([[r.key for r in records], labels, image_hash])


def _few(
    rng: np.random.Generator, labels: np.ndarray, shots: int, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows of `shots` images a class, and some more to choose the regularisation by."""
    fit, choose = [], []
    for label, name in enumerate(names):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) <= shots:
            raise ValueError(
                f"shots: {shots} images of each class and one more, but {name!r} has {len(rows)}"
            )
        fit.append(rows[:shots])
        choose.append(rows[shots : shots + min(shots, VALIDATION_SHOTS)])
    return np.concatenate(fit), np.concatenate(choose)


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


def _right(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return _logits(features, weights).argmax(1) == labels
