"""The same image-text set in every format that is read. Importable as `tests.image_text_files`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.recipe.base import ImageTextSource

Samples = Sequence[tuple[str, bytes, Any]]
"""Key, encoded image, caption or mapping of captions."""


def add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def write_tar(path: Path, samples: Samples) -> ImageTextSource:
    """A shard as img2dataset writes it; a mapping of captions goes into the JSON's columns."""
    fields = ["txt"]
    with tarfile.open(path, "w") as shard:
        for key, image, captions in samples:
            columns = dict(captions) if isinstance(captions, Mapping) else {}
            if columns:
                fields = list(columns)
            else:
                add(shard, f"{key}.txt", captions.encode())
            add(shard, f"{key}.jpg", image)
            add(shard, f"{key}.json", json.dumps({"key": key, "status": "ok", **columns}).encode())
    return ImageTextSource(path=str(path), fields=fields)


def write_folder(path: Path, samples: Samples) -> ImageTextSource:
    """JSONL beside a folder of images."""
    (path.parent / "images").mkdir(exist_ok=True)
    with path.open("w") as handle:
        for key, image, captions in samples:
            (path.parent / "images" / f"{key}.jpg").write_bytes(image)
            row = {"id": key, "image": f"images/{key}.jpg", "captions": captions}
            handle.write(json.dumps(row) + "\n")
    return ImageTextSource(path=str(path))


def table(samples: Samples) -> Any:
    """A table with Hugging Face's image feature."""
    import pyarrow as pa

    rows = [
        {"id": key, "image": {"bytes": image, "path": None}, "caption": captions}
        for key, image, captions in samples
    ]
    return pa.Table.from_pylist(rows)


def write_parquet(path: Path, samples: Samples, row_group_size: int = 3) -> ImageTextSource:
    """A Parquet file with several row groups."""
    from pyarrow import parquet

    parquet.write_table(table(samples), path, row_group_size=row_group_size)
    return ImageTextSource(path=str(path), fields=["caption"])


def write_arrow(path: Path, samples: Samples) -> ImageTextSource:
    """A file as `datasets` caches and saves it."""
    import pyarrow as pa

    data = table(samples)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=3)
    return ImageTextSource(path=str(path), fields=["caption"])


def write_karpathy(path: Path, samples: Samples) -> ImageTextSource:
    """Karpathy's split file."""
    write_folder(path.with_suffix(".jsonl"), samples)
    rows = [
        {
            "filepath": "images",
            "filename": f"{key}.jpg",
            "cocoid": key,
            "split": "test",
            "sentences": [{"raw": captions, "tokens": []}],
        }
        for key, _, captions in samples
    ]
    path.write_text(json.dumps({"images": rows, "dataset": "coco"}))
    return ImageTextSource(path=str(path), where={"split": "test"})


def write_coco(path: Path, samples: Samples) -> ImageTextSource:
    """COCO's captions file."""
    write_folder(path.with_suffix(".jsonl"), samples)
    images = [{"id": i, "file_name": f"{key}.jpg"} for i, (key, _, _) in enumerate(samples)]
    notes = [{"image_id": i, "id": 99 + i, "caption": row[2]} for i, row in enumerate(samples)]
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    return ImageTextSource(path=str(path), image_root=str(path.parent / "images"))


FORMATS = {
    "shard.tar": write_tar,
    "pairs.jsonl": write_folder,
    "rows.parquet": write_parquet,
    "data.arrow": write_arrow,
    "dataset_coco.json": write_karpathy,
    "captions_val.json": write_coco,
}
