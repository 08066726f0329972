"""Data sets of the Hugging Face hub by name, prepared by `datasets` and read as Arrow files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from llm2clip_vlm.data.reading.bad_records import RecordError
from llm2clip_vlm.hub import is_offline
from llm2clip_vlm.recipe.base import DataSource


def dataset_files(source: DataSource) -> list[Path]:
    """The Arrow files of a source's data set, downloaded and prepared where they are not there yet.

    `datasets` has run no code of a data set since its version 4, and images stay encoded: the files
    are read by :func:`~llm2clip_vlm.data.reading.shards.table_rows`.

    Args:
        source: Gives `dataset`, `name`, `split` and `revision`.

    Raises:
        RecordError: There is no such data set, configuration or split, or it cannot be got (without
            a network, or with `HF_HUB_OFFLINE`, what was not prepared before).
    """
    return list(_files(source.dataset, source.name, source.split, source.revision))


@lru_cache
def _files(dataset: str, name: str | None, split: str, revision: str | None) -> tuple[Path, ...]:
    folder = Path(dataset)
    if not folder.exists():
        is_offline()  # then `datasets` looks into its cache alone
    import datasets  # 2.5 s: only where a data set is read by name

    try:
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(dataset, keep_in_memory=False)  # of `save_to_disk`
            if name is not None or revision is not None:
                raise ValueError("a folder of `save_to_disk` has no name and no revision")
            if isinstance(found, datasets.DatasetDict):
                found = datasets.concatenate_datasets([found[part] for part in split.split("+")])
            elif split not in ("train", str(found.split)):
                raise ValueError("it was saved as one data set, without splits")
        else:
            found = datasets.load_dataset(
                dataset, name, split=split, revision=revision, keep_in_memory=False
            )
    except Exception as error:  # the boundary around a foreign loader, of many errors
        raise RecordError(
            f"dataset {dataset!r} (name {name}, split {split!r}) cannot be loaded: "
            f"{type(error).__name__}: {error}. Check these keys; with HF_HUB_OFFLINE only what was "
            "loaded before is there"
        ) from error
    return tuple(dict.fromkeys(Path(file["filename"]) for file in found.cache_files))
