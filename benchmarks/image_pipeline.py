"""A shard of photographs to a tower's batches: our loader against webdataset and open_clip's.

Every arm reads the same webdataset shard in one process, decodes, resizes the shortest edge to
224 px (bicubic), crops the centre and normalises to fp32 batches of 64 on the CPU:

- ours: `ImageTextDataset(fast=True)` through torch's loader, with the normalising that a GPU would
  do, and all checks of a record (names, header, missing scans, damage);
- `processor`: webdataset 0.2.86 and transformers' `CLIPImageProcessor` with torchvision behind it,
  a picture or a batch at a time, whichever is faster here;
- `open_clip`: `open_clip_train.data.get_wds_dataset` with `image_transform`, its own preprocessing;
- the limit: decoding the same JPEGs to pixels, by simplejpeg or Pillow, whichever is faster.

Photographs are Flickr8k's (long side 224 px), and for 512 px four of them side by side, so that a
pixel has a photograph's detail; both from the folder LLM2CLIP_SHARED_DATA, or ../shared/data. Where
it is absent, they are drawn, with edges, texture and grain, and `settings` says so. Checked in the
same run: our evaluation path equals transformers' Pillow processor to the bit, and the training
path and the processor stay above 40 dB of it; open_clip rounds the crop's place otherwise, so that
every other picture is a pixel beside it (above 25 dB).

    python benchmarks/image_pipeline.py [--quick]

`ratio_small` and `ratio_512` (also `ratio`) are the processor's CPU time over ours,
`ratio_open_clip` that of open_clip at 512 px, `limit_ratio` our time over that of decoding, at
512 px; the last two have a `_small` twin.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from arms import finish, ratio, take_turns, use_peers
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip_vlm.data.image_text.dataset import ImageTextDataset, collate
from llm2clip_vlm.data.image_text.index import read_image_text
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.recipe.base import ImageTextSource

SIZE_PX, BATCH, QUALITY = 224, 64, 88
DECIBELS = {"ours": 40.0, "processor_picture": 40.0, "processor_batch": 40.0, "open_clip": 25.0}
GOALS = {"ratio_small": 1.5, "ratio_512": 1.5, "ratio_open_clip": 2.0}

Batches = Iterator[Tensor]


def drawn(width: int, height: int, seed: int) -> Image.Image:
    """A picture with edges, texture of all scales and grain."""
    rng = np.random.default_rng(seed)
    scene = np.zeros((height, width, 3), np.float32)
    for step in (2, 4, 8, 16, 32, 64):
        coarse = rng.normal(0, 9 * step**0.5, (height // step + 2, width // step + 2, 3))
        layer = [
            Image.fromarray(coarse[..., c].astype(np.float32), "F").resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        scene += np.stack([np.asarray(channel) for channel in layer], -1) * (
            0.25 if step < 8 else 1
        )
    return Image.fromarray((128 + scene).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    """A JPEG."""
    handle = io.BytesIO()
    image.save(handle, "JPEG", quality=QUALITY)
    return handle.getvalue()


def photographs(count: int) -> tuple[list[bytes], list[bytes], str]:
    """Small JPEGs, those of 512 px, and where they are from."""
    here = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LLM2CLIP_SHARED_DATA", here)) / "flickr8k" / "images"
    if not folder.is_dir():
        small = [encoded(drawn(224, 168, seed)) for seed in range(count)]
        return small, [encoded(drawn(512, 384, seed)) for seed in range(count)], "drawn"
    small = [path.read_bytes() for path in islice(sorted(folder.glob("*.jpg")), count)]
    large = []
    for first in range(count):
        sheet = Image.new("RGB", (512, 384))
        for place in range(4):
            with Image.open(io.BytesIO(small[(first + place) % count])) as photo:
                cell = photo.convert("RGB").resize((256, 192), Image.Resampling.BICUBIC)
            sheet.paste(cell, (256 * (place % 2), 192 * (place // 2)))
        large.append(encoded(sheet))
    return small, large, "Flickr8k; 512 px: four side by side"


def write_shard(path: Path, pictures: list[bytes]) -> None:
    """A shard as img2dataset writes it."""
    with tarfile.open(path, "w") as shard:
        for number, data in enumerate(pictures):
            for suffix, content in (("jpg", data), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def make_arms(shard: Path, pictures: list[bytes]) -> dict[str, Callable[[], Batches]]:
    """What gives the batches of an epoch, by arm."""
    import open_clip
    import simplejpeg
    import webdataset
    from open_clip_train.data import get_wds_dataset
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    edge = {"shortest_edge": SIZE_PX}
    square = {"height": SIZE_PX, "width": SIZE_PX}
    processor: Any = CLIPImageProcessor(size=edge, crop_size=square)
    assert processor.backend == "torchvision", processor.backend
    exact: Any = CLIPImageProcessorPil(size=edge, crop_size=square)
    records = read_image_text(ImageTextSource(path=str(shard), fields=["txt"]), BadRecords())
    data = ImageTextDataset(records, exact, fast=True, preload_limit_bytes=0)
    whole: Any = collate  # of batches, not of samples
    loader = DataLoader(data, batch_size=BATCH, collate_fn=whole)

    def ours() -> Batches:
        for batch in loader:
            yield data.to_float(batch["pixel_values"])

    def evaluation() -> Batches:
        for at in range(0, len(data), BATCH):
            yield data.readable(range(len(data))[at : at + BATCH], BadRecords())[1]

    def reference() -> Batches:
        for data in pictures:
            with Image.open(io.BytesIO(data)) as image:
                yield exact(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]

    def samples() -> Any:
        return webdataset.WebDataset(str(shard), shardshuffle=False).decode("pilrgb")

    def one(image: Image.Image) -> Tensor:
        found: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return found

    def processor_picture() -> Batches:
        mapped = samples().to_tuple("jpg", "txt").map_tuple(one, str)
        for batch, _ in webdataset.WebLoader(mapped.batched(BATCH), batch_size=None):
            yield batch

    def processor_batch() -> Batches:
        batched = samples().to_tuple("jpg", "txt").batched(BATCH, collation_fn=list)
        for rows in webdataset.WebLoader(batched, batch_size=None):
            yield processor(images=[image for image, _ in rows], return_tensors="pt")[
                "pixel_values"
            ]

    args = SimpleNamespace(val_data=str(shard), val_num_samples=len(data), train_data=None)
    args.batch_size, args.workers, args.world_size = BATCH, 0, 1
    no_text = torch.zeros(1, 77, dtype=torch.int64)
    transform = open_clip.image_transform(SIZE_PX, is_train=False)
    info = get_wds_dataset(args, transform, is_train=False, tokenizer=lambda text: no_text)

    def of_open_clip() -> Batches:
        for batch, _ in info.dataloader:
            yield batch

    def decode_simplejpeg() -> Batches:
        for data in pictures:
            yield torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB"))

    def decode_pillow() -> Batches:
        for data in pictures:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            yield torch.empty(0)

    return {
        "ours": ours,
        "processor_picture": processor_picture,
        "processor_batch": processor_batch,
        "open_clip": of_open_clip,
        "decode_simplejpeg": decode_simplejpeg,
        "decode_pillow": decode_pillow,
        "evaluation": evaluation,
        "reference": reference,
    }


def exhaust(batches: Callable[[], Batches]) -> None:
    """Run through an epoch."""
    for _ in batches():
        pass


def compare(arms: dict[str, Callable[[], Batches]]) -> dict[str, float]:
    """Decibels of each arm from the reference, in 8-bit steps; the evaluation path: no difference.

    Raises:
        AssertionError: An arm does something else.
    """
    from transformers.image_utils import OPENAI_CLIP_STD

    want = torch.cat(list(arms["reference"]()))
    assert torch.equal(torch.cat(list(arms["evaluation"]())), want), "evaluation is not bit-equal"
    levels = 1 / (torch.tensor(OPENAI_CLIP_STD) * 255)[:, None, None]
    found = {}
    for name, least in DECIBELS.items():
        error = ((torch.cat(list(arms[name]())) - want) / levels).square().mean().sqrt()
        found[name] = round(float(20 * torch.log10(255 / error.clamp(min=1e-6))), 1)
        assert found[name] > least, f"{name} is at {found[name]} dB of the Pillow processor"
    return found


def measure(folder: Path, name: str, pictures: list[bytes], repeats: int) -> dict[str, Any]:
    """Figures of one size of pictures."""
    shard = folder / f"{name}.tar"
    write_shard(shard, pictures)
    every = make_arms(shard, pictures)
    decibels = compare(every)
    timed = {arm: partial(exhaust, every[arm]) for arm in list(every)[:6]}
    chosen, seconds = {"ours": timed["ours"], "open_clip": timed["open_clip"]}, {}
    for kind in ("processor", "decode"):  # the peer and the limit at their best
        forms = {arm: run for arm, run in timed.items() if arm.startswith(kind)}
        trial = take_turns(forms, 3)
        best = min(forms, key=lambda arm: min(trial[arm]["cpu"]))
        chosen[kind] = forms[best]
        decibels[f"{kind}_arm"] = best  # type: ignore[assignment]
    seconds = take_turns(chosen, repeats)
    per_image = {arm: statistics.median(v["cpu"]) / len(pictures) for arm, v in seconds.items()}
    kib = sum(map(len, pictures)) / len(pictures) / 1024
    print(
        f"{name}, {kib:.0f} KiB an image: "
        + ", ".join(f"{arm} {1000 * value:.2f} ms" for arm, value in per_image.items())
    )
    return {
        "ratio": ratio(seconds, "processor", "ours"),
        "ratio_open_clip": ratio(seconds, "open_clip", "ours"),
        "limit_ratio": ratio(seconds, "ours", "decode"),
        "ms": {arm: round(1000 * value, 3) for arm, value in per_image.items()},
        "kib": round(kib, 1),
        "decibels": decibels,
    }


def main() -> None:
    """Print a line a size and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 pictures, 3 rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_peers("torchvision", "webdataset", "open_clip", "open_clip_train.data")
    count, repeats = (64, 3) if options.quick else (256, 11)
    small, large, origin = photographs(count)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: measure(Path(folder), name, pictures, repeats)
            for name, pictures in (("small", small), ("512", large))
        }
    of_small, of_large = found["small"], found["512"]
    finish(
        "image_pipeline",
        ours=of_large["ms"]["ours"],
        baseline=of_large["ms"]["processor"],
        ratio=of_large["ratio"][0],
        spread=of_large["ratio"][1],
        ratio_512=of_large["ratio"][0],
        ratio_small=of_small["ratio"][0],
        spread_small=of_small["ratio"][1],
        ratio_open_clip=of_large["ratio_open_clip"][0],
        spread_open_clip=of_large["ratio_open_clip"][1],
        ratio_open_clip_small=of_small["ratio_open_clip"][0],
        spread_open_clip_small=of_small["ratio_open_clip"][1],
        limit_ratio=of_large["limit_ratio"][0],
        spread_limit=of_large["limit_ratio"][1],
        limit_ratio_small=of_small["limit_ratio"][0],
        equal=True,
        decibels={name: figures["decibels"] for name, figures in found.items()},
        ms={name: figures["ms"] for name, figures in found.items()},
        goals=GOALS,
        settings={
            "pictures": origin,
            "kib_an_image": {name: figures["kib"] for name, figures in found.items()},
            "images": count,
            "batch": BATCH,
            "size_px": SIZE_PX,
            "repeats": repeats,
            "unit": "CPU milliseconds an image",
            "limit": "our time over that of decoding the JPEGs alone",
            "equal": "our evaluation path to the bit; decibels of the others stand beside",
        },
    )


if __name__ == "__main__":
    main()
