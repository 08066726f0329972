"""Zero-shot tasks of an encoder: retrieval, hard negatives, classification by names.

Every result states its protocol, a hash of the data, its rate of ties and 95 % intervals. Ties
count against the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip_vlm.data.image_text.dataset import caption_galleries
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.text.captions import CaptionRecord, read_captions
from llm2clip_vlm.evaluation.encoder import benchmarks as published
from llm2clip_vlm.evaluation.encoder.encoders import Encoder
from llm2clip_vlm.metrics.retrieval import TIE_TOLERANCE, recall_at_k, retrieval_report
from llm2clip_vlm.metrics.separability import PROTOCOL, caption_separability
from llm2clip_vlm.metrics.statistics import accuracy
from llm2clip_vlm.metrics.zero_shot import class_embeds, label_rows, mean_per_class
from llm2clip_vlm.recipe.base import CaptionSource
from llm2clip_vlm.recipe.evaluation import CompositionalTask, CraTask, RetrievalTask, ZeroShotTask
from llm2clip_vlm.recipe.evaluation import EncoderEvalRecipe as Recipe
from llm2clip_vlm.runs.hashes import hash_json

Result = dict[str, Any]


def retrieval(task: RetrievalTask, encoder: Encoder, recipe: Recipe) -> Result:
    """Image to text and text to image, each kind of caption (or language) apart."""
    every, protocol, standard = published.read_retrieval(task)
    pictures, galleries = caption_galleries(every)
    records = [every[position] for position in pictures]
    images, image_hash = encoder.embed_images(records)
    texts = {kind: encoder.embed_texts(items) for kind, (items, _) in galleries.items()}
    owners = {kind: rows for kind, (_, rows) in galleries.items()}
    hits: dict[str, Any] = {}
    report = retrieval_report(images, texts, owners, recipe.bootstrap, recipe.seed, hits)
    return {
        "protocol": protocol,
        "standard_set": standard,
        "data_hash": hash_json([[[r.key, r.captions] for r in every], image_hash]),
        "mean": {
            way: {k: float(np.mean([kind[way][k] for kind in report.values()])) for k in _KS}
            for way in ("i2t", "t2i")
        },
        "kinds": report,
        "samples": {k: ([records[row].key for row in rows], v) for k, (rows, v) in hits.items()},
    }


_KS = ("r1", "r5", "r10", "tie_rate")


def caption_accuracy(task: CraTask, encoder: Encoder, recipe: Recipe) -> Result:
    """Caption retrieval accuracy of the text encoder alone; no image is opened."""
    if task.benchmark == "records":  # needs no images
        source = CaptionSource(path=task.data, fields=task.fields, where=task.where)
        several = [*read_captions(source, BadRecords(), keep=False)]
        protocol, standard = Path(task.data).name, False
    else:
        records, protocol, standard = published.read_retrieval(task)
        several = [CaptionRecord(r.key, r.captions) for r in records]
    several = [record for record in several if len(record.texts) > 1]
    if not several:
        raise ValueError(f"{task.data}: CRA needs images with at least two different captions")
    result = caption_separability(
        [record.texts for record in several],
        encoder.captions or encoder.embed_texts,
        bootstrap=recipe.bootstrap,
        seed=recipe.seed,
    )
    return {
        "protocol": f"{PROTOCOL}; {protocol}",
        "standard_set": standard,
        "data_hash": hash_json([[[r.key, r.captions] for r in several]]),
        "cra": result.recall[1],
        "samples": {"": ([record.key for record in several], result.hits[1])},
        "ci": result.ci.get(1),
        "tie_rate": result.tie_rate,
        "queries": len(several),
        "gallery": result.gallery,
    }


def compositional(task: CompositionalTask, encoder: Encoder, recipe: Recipe) -> Result:
    """Compare the right caption, or the right pairing of two, with hard negatives."""
    if not (items := published.read_compositional(task)):
        raise ValueError(f"{task.data}: holds no item of {task.benchmark}")
    names = {name: row for row, name in enumerate(dict.fromkeys(n for i in items for n in i[1]))}
    pictures = [
        published.plain_image(Path(task.images), name, follow_links=task.follow_links)
        for name in names
    ]
    image_embeds, image_hash = encoder.embed_images(pictures)
    text_embeds = encoder.embed_texts([text for item in items for text in item[2]])
    right: dict[str, list[bool]] = {}
    tied = []
    said = text_embeds.split([len(texts) for _, _, texts in items])
    for (_, shown, _), captions in zip(items, said, strict=True):
        own = image_embeds[[names[name] for name in shown]]
        scores = own @ captions.T
        gaps = {"text": scores.diagonal()[:, None] - scores}
        if len(shown) > 1:
            gaps["image"] = scores.diagonal()[None] - scores
        good = {}
        for way, gap in gaps.items():
            wrong = gap[torch.eye(*gap.shape) == 0]
            good[way] = bool((wrong > TIE_TOLERANCE).all())
            tied.append(bool((wrong.abs() <= TIE_TOLERANCE).any()))
        if len(good) > 1:
            good["group"] = all(good.values())
        for way, value in good.items():
            right.setdefault(way, []).append(value)
    kinds = np.array([kind for kind, _, _ in items])
    groups = [shown[0] for _, shown, _ in items]
    chance = {"text": 50.0} if len(right) == 1 else {"text": 25.0, "image": 25.0, "group": 100 / 6}
    by_kind = {
        kind: {way: 100.0 * float(np.mean(np.array(v)[kinds == kind])) for way, v in right.items()}
        for kind in sorted(set(kinds))
    }
    return {
        "protocol": f"{task.benchmark}: right above wrong, a tie is wrong; mean over categories",
        "data_hash": hash_json([items, image_hash]),
        "all": {
            way: accuracy(values, groups, recipe.bootstrap, recipe.seed)
            for way, values in right.items()
        },
        "mean": {way: float(np.mean([k[way] for k in by_kind.values()])) for way in right},
        "categories": by_kind,
        "samples": {f".{way}": (groups, values) for way, values in right.items()},
        "chance": chance,
        "tie_rate": float(np.mean(tied)),
        "items": len(items),
    }


def classification(task: ZeroShotTask, encoder: Encoder, recipe: Recipe) -> Result:
    """Classify images by the texts of the classes' names."""
    classes = published.read_classes(task.classes)
    records, labels = published.read_classified(task)
    wanted = label_rows(labels, classes, task.classes)
    weights = class_embeds(encoder.embed_texts, list(classes.values()), task.templates)
    images, image_hash = encoder.embed_images(records)
    ks = [k for k in (1, 5) if k <= len(classes)]
    result = recall_at_k(images, weights, wanted, ks, bootstrap=recipe.bootstrap, seed=recipe.seed)
    return {
        "protocol": f"{len(classes)} names in {len(task.templates)} template(s), each of unit norm,"
        " their mean of unit norm",
        "list_hash": hash_json([list(classes.values()), task.templates]),
        "data_hash": hash_json([[r.key for r in records], labels, image_hash]),
        **{f"top{k}": result.recall[k] for k in ks},
        **{f"ci_top{k}": result.ci.get(k) for k in ks},
        "mean_per_class": mean_per_class(result.hits[1], np.array(wanted)),
        "samples": {"": ([record.key for record in records], result.hits[1])},
        "chance_top1": result.chance[1],
        "tie_rate": result.tie_rate,
        "images": len(records),
    }
