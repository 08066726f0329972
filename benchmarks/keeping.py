"""What stage 2b costs of CLIP's zero-shot classification, with and without what keeps it.

Zero-shot: which colour and shape the salient object of a test picture of the demo world has, by the
best of all pairs of them, each the mean of five short prompts. Gain: R@1 of long captions (mean of
both directions) above the base CLIP's. `ours` and `baseline` are the accuracies of the kept model
and of the base; `ratio` is the share of the plain run's gain that the kept run has.

    python stages/clip_baseline.py recipes/demo/base_tower.yaml
    python stages/stage2b_vision_encoder.py recipes/demo/stage2b.yaml        # after stages 1 and 2a
    python stages/stage2b_vision_encoder.py recipes/demo/stage2b_keep.yaml
    python benchmarks/keeping.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from llm2clip_vlm.models.clip import ClipTokens, clip_encoders, load_clip
from llm2clip_vlm.models.llm2clip import LLM2CLIPModel
from llm2clip_vlm.models.text.text_encoder import TextEncoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from world.files import WorldConfig, file_scenes, world_dir
from world.scenes import COLOURS, SHAPES, SHORT_FORMS

CLASSES = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def read_test(world: WorldConfig) -> tuple[Tensor, list[tuple[str, str]]]:
    """Processed test pictures, and colour and shape of each one's salient object."""
    root = world_dir(world)
    rows = [json.loads(line) for line in (root / "pairs_test.jsonl").read_text().splitlines()]
    images = [Image.open(root / row["image"]).convert("RGB") for row in rows]
    processor = AutoImageProcessor.from_pretrained("recipes/demo/base/models/clip")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    salient = [scene.things[0] for scene in file_scenes(world, "pairs_test")]
    return pixels, [(thing.colour, thing.shape) for thing in salient]


def accuracy(
    pixels: Tensor,
    labels: list[tuple[str, str]],
    encode_images: Callable[[Tensor], Tensor],
    encode_texts: Callable[[list[str]], Tensor],
) -> Tensor:
    """Whether each picture's best class is its own."""
    with torch.no_grad():
        images = torch.cat([encode_images(part) for part in pixels.split(250)])
        prompts = [[form.format(c=c, s=s) for form in SHORT_FORMS] for c, s in CLASSES]
        weights = torch.stack([encode_texts(texts).mean(0) for texts in prompts])
    best = (images @ F.normalize(weights, dim=-1).T).argmax(-1).tolist()
    return torch.tensor([CLASSES[i] == label for i, label in zip(best, labels, strict=True)])


def long_recall(run: Path) -> float:
    """Mean of both directions' R@1 for long captions, in points."""
    found = json.loads((run / "results.json").read_text())["retrieval"]["long"]
    return float(found["i2t"]["r1"] + found["t2i"]["r1"]) / 2


def main() -> None:
    """Print a table and, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="output of the demo")
    parser.add_argument("--worlds", default="runs/world", help="where the demo's world lies")
    parser.add_argument("--kept", nargs="+", default=["llm2clip_keep"], help="runs to compare")
    arguments = parser.parse_args()
    towers = arguments.runs / "towers"
    pixels, labels = read_test(WorldConfig(dir=arguments.worlds))
    clip, tokenizer, _ = load_clip("recipes/demo/base/models/clip")
    encoders = {"base": clip_encoders(clip.eval(), ClipTokens(tokenizer))}
    text_encoder = TextEncoder.from_pretrained(arguments.runs / "stage1" / "text_encoder")
    for name in ("llm2clip", *arguments.kept):
        model = LLM2CLIPModel.from_pretrained(towers / name / "model").eval()
        encoders[name] = model.encoders(text_encoder.encode)
    hits = {name: accuracy(pixels, labels, *pair).float() for name, pair in encoders.items()}
    recall = {name: long_recall(towers / name) for name in hits}
    print(f"{'run':<24}{'zero-shot':>10}{'long R@1':>10}{'gain kept':>10}")
    gain = recall["llm2clip"] - recall["base"]
    for name, values in hits.items():
        share = (recall[name] - recall["base"]) / gain
        print(f"{name:<24}{100 * values.mean():>10.1f}{recall[name]:>10.1f}{share:>10.2f}")
    kept = arguments.kept[-1]
    error = 100 * (hits[kept] - hits["base"]).std().item() / len(labels) ** 0.5
    ours, base, plain = (100 * hits[n].mean().item() for n in (kept, "base", "llm2clip"))
    result = {
        "name": "keeping",
        "ours": round(ours, 2),
        "baseline": round(base, 2),
        "ratio": round((recall[kept] - recall["base"]) / gain, 3),
        "spread": round(1.96 * error, 2),  # of ours - baseline, points, over pictures
        "equal": ours >= base - 1.0,
        "settings": {
            "classes": len(CLASSES),
            "pictures": len(labels),
            "chance": round(100 / len(CLASSES), 2),
            "plain_zero_shot": round(plain, 2),
            "long_recall": {name: round(value, 2) for name, value in recall.items()},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
