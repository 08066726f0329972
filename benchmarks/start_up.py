"""From the command to the first step of stage 2b, and what a start costs as the records grow.

`ratio` is the CPU time of `datasets.load_dataset` and `transformers.Trainer` over ours, each a
program of its own that is started again and again: from the start of the interpreter to the line
with the first step's loss, with the same tiny vision tower, images, captions and batch. Both have
read the 100,000 records before: `load_dataset` finds its Arrow file in its cache, stage 2b its
table. The peer trains CLIP (its text tower reads the captions); stage 2b looks up embeddings, and
makes sure at each start that none is missing. `limit_ratio` is our time over that of importing what
both need: torch and the Trainer.

The other figures are of the start alone (sources, data set, cache, `require`, the first batch of
an epoch), on two ranks that map one table: `seconds_first_per_million` where there is no table yet,
`seconds_per_million` and `mib_per_million` where there is: CPU time and growth of the memory that
no other process shares, of the rank that needs more, from the smallest to the largest size (what
does not depend on the size is in the table). `exponent` is the larger one of the two times' fitted
exponents over the sizes.

    python benchmarks/start_up.py [--quick] [--sizes 10000 100000 1000000 10000000]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from arms import finish
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
BATCH = 8
KEYS_A_SHARD = 2**18


def write_data(folder: Path, count: int) -> None:
    """Records with two captions each, 64 images that they share, and a cache of all captions."""
    from llm2clip_vlm.data.cache import shards
    from llm2clip_vlm.data.text.text_keys import DIGEST_BYTES

    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(64):
        pixels = noise.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    header = shards.Header(dim=1, fingerprint={"model": "none"})
    shards.write_header(folder / "cache", header)
    keys = bytearray()

    def write_keys() -> None:
        rows = np.frombuffer(bytes(keys), np.uint8).reshape(-1, DIGEST_BYTES)
        ones = np.ones((len(rows), 1), np.float16)
        shards.write_shard(folder / "cache", header, rows, ones)
        keys.clear()

    with (folder / "pairs.jsonl").open("w") as file:
        for n in range(count):
            short = f"a photo of thing {n} on a table"
            long = f"Picture {n} shows a red star and two blue rings beside a small cross; " * 3
            long = f"{long}and the number {7 * n}."
            image = f"images/{n % 64}.jpg"
            row = {"id": f"id-{n}", "image": image, "captions": {"short": [short], "long": [long]}}
            file.write(json.dumps(row) + "\n")
            for text in (short, long):
                keys += hashlib.sha256(text.encode()).digest()
            if len(keys) >= 32 * KEYS_A_SHARD:
                write_keys()
    if keys:
        write_keys()


def unshared_mib() -> float:
    """Memory that belongs to this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kb = next(line.split()[1] for line in lines if line.startswith("Anonymous:"))
    return int(kb) / 1024


def start(folder: Path) -> None:
    """One rank's start; prints its costs."""
    from transformers import TrainingArguments
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
    from llm2clip_vlm.data.image_text.dataset import ImageTextDataset
    from llm2clip_vlm.data.image_text.index import read_sources
    from llm2clip_vlm.data.reading import table
    from llm2clip_vlm.data.reading.bad_records import BadRecords
    from llm2clip_vlm.recipe.base import ImageTextSource
    from llm2clip_vlm.training.encoder.caption_embeddings import CaptionFeatures

    table.TABLE_FILE_FROM_BYTES = 0  # the small sizes take the way of the large ones
    torch.set_num_threads(1)
    TrainingArguments(output_dir=str(folder / "out"), use_cpu=True)  # starts the process group
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    memory, began = unshared_mib(), time.process_time()
    cache = EmbeddingCache.open(folder / "cache")
    features = CaptionFeatures(cache, {})
    records = read_sources([ImageTextSource(path=str(folder / "pairs.jsonl"))], BadRecords())
    dataset = ImageTextDataset(
        records,
        processor,
        {"short": 1.0, "long": 1.0},
        text_inputs=features,
        preload_limit_bytes=0,
    )
    features.require(dataset, [])
    order = dataset.items(0)
    batch = dataset.__getitems__([next(order) for _ in range(BATCH)])
    assert len(batch["text_features"]) == BATCH
    cost = {"seconds": time.process_time() - began, "mib": unshared_mib() - memory}
    print(json.dumps(cost), flush=True)


def start_of_two(folder: Path) -> dict[str, float]:
    """Starts two ranks; the larger one's costs of each kind."""
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 29_713}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        environment |= {name: str(value) for name, value in place.items()}
        command = [sys.executable, __file__, "--start", str(folder)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    costs = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(cost[name] for cost in costs) for name in costs[0]}


def peer(folder: Path) -> None:
    """The usual script: load_dataset, a transform, the Trainer."""
    import datasets
    from transformers import (
        AutoTokenizer,
        CLIPModel,
        Trainer,
        TrainingArguments,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(1)
    data = datasets.load_dataset(
        "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=folder / "hf"
    )
    print(f"data: {len(data)} pairs", flush=True)
    model = CLIPModel.from_pretrained(folder / "clip")
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
        captions = [row["captions"]["long"][0] for row in rows]
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return {"pixel_values": pixels, "return_loss": True, **tokens}

    arguments = TrainingArguments(
        output_dir=str(folder / "hf-out"),
        per_device_train_batch_size=BATCH,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()


def until_first_step(command: list[str]) -> tuple[float, int]:
    """CPU time of a program until it logs a loss, and how many pairs it said to have."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY
    ) as child:
        assert child.stdout is not None
        pairs = 0
        for line in child.stdout:
            if line.startswith("data: "):
                pairs = int(line.split()[1])
            if "'loss'" in line or line == "ready\n":
                fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
                child.kill()
                return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), pairs
    raise SystemExit(f"{' '.join(command)}: ended before its first step")


def recipe_of(folder: Path) -> Path:
    """Stage 2b on the tiny tower, one step."""
    rates = dict.fromkeys(("vision_tower", "visual_projection", "text_adaptor"), 1e-3)
    recipe = {
        "stage": "stage2b_vision_encoder",
        "output_dir": str(folder / "out"),
        "global_batch_size": BATCH,
        "vision_tower": str(folder / "clip"),
        "embedding_cache": str(folder / "cache"),
        "projection_dim": 32,
        "learning_rates": rates,
        "train": [{"path": str(folder / "pairs.jsonl")}],
        "caption_weights": {"long": 1.0},
        "trainer": {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def first_steps(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """CPU seconds to the first step of both programs and of the imports, in turns."""
    write_data(folder, count)
    subprocess.run(
        [sys.executable, "-m", "tests.tiny", "clip", str(folder / "clip")],
        check=True,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
    )
    stage = ["stages/stage2b_vision_encoder.py", str(recipe_of(folder))]
    imports = "import torch; from transformers import CLIPVisionModel, Trainer; print('ready')"
    arms = {
        "ours": [*stage],
        "peer": [__file__, "--peer", str(folder)],
        "imports": ["-u", "-c", imports],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    pairs: dict[str, int] = {}
    for turn in range(rounds + 1):  # the first reads the data
        for name, words in arms.items():
            subprocess.run(["rm", "-rf", folder / "out", folder / "hf-out"], check=True)
            took, pairs[name] = until_first_step([sys.executable, *words])
            seconds[name] += [took] if turn else []
    return {"seconds": seconds, "equal": pairs["ours"] == pairs["peer"] == count}


def main() -> None:
    """Print the tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sizes 2,000 and 20,000, 3 rounds")
    parser.add_argument("--records", type=int, default=100_000, help="of the first steps")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start or options.peer:
        (start if options.start else peer)(options.start or options.peer)
        return
    sizes, rounds, records = options.sizes, options.rounds, options.records
    if options.quick:
        sizes, rounds = [2_000, 20_000], 3
    os.environ["OMP_NUM_THREADS"] = "1"
    table = []
    print(f"{'records':>10} {'first s':>9} {'warm s':>9} {'warm MiB':>9}   (the costlier rank)")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_data(folder := Path(name) / "data", size)
            first, warm = start_of_two(folder), start_of_two(folder)
        table.append((size, first["seconds"], warm["seconds"], warm["mib"]))
        print("{:10d} {:9.2f} {:9.2f} {:9.1f}".format(*table[-1]), flush=True)
    logs = np.log(np.array(table))
    slopes = [float(np.polyfit(logs[:, 0], logs[:, column], 1)[0]) for column in (1, 2)]
    least, most = np.array(table[0]), np.array(table[-1])
    grown = (most - least) / (most[0] - least[0]) * 1e6
    with tempfile.TemporaryDirectory() as name:
        steps = first_steps(Path(name) / "data", records, rounds)
    medians = {name: statistics.median(values) for name, values in steps["seconds"].items()}
    turns = zip(steps["seconds"]["peer"], steps["seconds"]["ours"], strict=True)
    each = [theirs / mine for theirs, mine in turns]
    print({name: round(value, 2) for name, value in medians.items()})
    finish(
        "start_up",
        ours=round(medians["ours"], 2),
        baseline=round(medians["peer"], 2),
        ratio=round(medians["peer"] / medians["ours"], 2),
        spread=[round(min(each), 2), round(max(each), 2)],
        equal=steps["equal"],
        limit_ratio=round(medians["ours"] / medians["imports"], 2),
        mib_per_million=round(float(grown[3]), 1),
        seconds_per_million=round(float(grown[2]), 2),
        seconds_first_per_million=round(float(grown[1]), 2),
        exponent=round(max(slopes), 3),
        settings={
            "unit": "CPU seconds from the start of the interpreter to the first step's loss",
            "records": records,
            "rounds": rounds,
            "sizes": sizes,
            "ranks": 2,
            "limit": "imports of torch and the Trainer",
        },
    )


if __name__ == "__main__":
    main()
