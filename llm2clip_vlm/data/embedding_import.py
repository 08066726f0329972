"""Embeddings that LLM2CLIP's released code has stored, joined to their captions by key.

That code (`extract_embedding.py:35-48`) writes beside each image shard `X.tar` a file
`X_text_embeddings.tar`: a member `<key>.<column>` (`000000012.longSV_captions`) holds the bytes of
one little-endian float32 vector, not normalised, without width, type or model. Its reader joins
the two files by position. Here the key finds the sample in `X.tar` and the column the caption in
its JSON member, and from then on the caption itself is the key.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm2clip_vlm.data.embedding_cache import EmbeddingCache
from llm2clip_vlm.data.embedding_shards import CacheError, read_header
from llm2clip_vlm.data.reading.bad_records import BadRecords, RecordError
from llm2clip_vlm.data.reading.shards import missing_end, tar_rows

SUFFIX = "_text_embeddings.tar"
"""Ending of the released code's files."""

_TARS_AT_ONCE = 4  # the cache is opened anew for each group, and a group is in memory
_MAX_BYTES = 2**20


def import_official(
    directory: str | Path,
    tars: Sequence[str | Path],
    fingerprint: Mapping[str, str],
    bad: BadRecords,
) -> EmbeddingCache:
    """Adds the embeddings of `*_text_embeddings.tar` files to a cache.

    Args:
        directory: Where the cache lies or will lie.
        tars: The files; each has its image shard with the captions beside it. A caption that the
            cache holds already keeps its row.
        fingerprint: What made the embeddings, as far as it is known: the files do not say it.
        bad: Takes members without a caption, and embeddings that are broken.

    Raises:
        CacheError: The directory holds embeddings of something else, or nothing can be imported.
        RecordError: A file or its image shard is missing or no tar, or too many members are bad.
    """
    directory = Path(directory)
    imported = None
    for start in range(0, len(tars), _TARS_AT_ONCE):
        header = read_header(directory)
        vectors: dict[str, Tensor] = {}
        for tar in tars[start : start + _TARS_AT_ONCE]:
            for where, text, vector in _captioned(Path(tar), bad):
                dim = header.dim if header else len(next(iter(vectors.values()), vector))
                norm = float(vector.norm())
                if len(vector) != dim:
                    bad.add(where, f"an embedding of width {len(vector)}, expected {dim}")
                elif not 0 < norm < float("inf"):
                    bad.add(where, f"an embedding of norm {norm}")
                else:
                    vectors.setdefault(text, vector)
        if not vectors:
            raise CacheError(f"{tars[start]}: no embedding to import; {bad.summary()}")

        def stored(texts: list[str], found: Mapping[str, Tensor] = vectors) -> Tensor:
            return torch.stack([found[text] for text in texts])

        imported = EmbeddingCache.build(directory, vectors, stored, fingerprint)
    if imported is None:
        raise CacheError(f"{directory}: no file to import; name some *{SUFFIX}")
    return imported


def _captioned(path: Path, bad: BadRecords) -> Iterator[tuple[str, str, Tensor]]:
    """Place, caption and vector of each embedding in a file."""
    shard = path.with_name(path.name.removesuffix(SUFFIX) + ".tar")
    for name, file in (("embeddings", path), ("image shard with the captions", shard)):
        if not file.is_file() or not path.name.endswith(SUFFIX):
            raise RecordError(
                f"{path}: no {name} at {file}; expected X{SUFFIX} and X.tar in one folder"
            )
    captions = dict(tar_rows(shard, bad))
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            for member in tar:
                where = f"{path.name}:{member.name}"
                key, _, column = member.name.rpartition(".")
                text = captions.get(key, {}).get(column)
                if not isinstance(text, str) or not text.strip():
                    bad.add(where, f"{shard.name} has no caption {column!r} for the key {key!r}")
                elif member.name in seen:
                    bad.add(where, "the member occurs twice")
                elif not member.isreg() or member.size % 4 or not 0 < member.size <= _MAX_BYTES:
                    bad.add(where, f"{member.size} bytes, expected float32 numbers")
                else:
                    seen.add(member.name)
                    handle = tar.extractfile(member)
                    assert handle is not None
                    vector = torch.frombuffer(bytearray(handle.read()), dtype=torch.float32)
                    yield where, text.strip(), vector
            if end := missing_end(raw, tar.offset):
                raise tarfile.ReadError(end)
    except tarfile.ReadError as error:
        bad.add(path.name, f"the file is damaged from here on ({error})")
