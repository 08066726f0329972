"""`llm2clip-vlm embed`: caches of caption embeddings from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.programs import find_program, load_program

COST_NAME = "encode_cost.jsonl"
"""File beside a cache: texts and seconds of each part that stage 2a has encoded."""


def main(words: Sequence[str]) -> int | None:
    """Run a command on caches.

    Args:
        words: The command and its arguments.

    Returns:
        The exit code; none = 0.

    Raises:
        ValueError: What the user can mend.
    """
    arguments = _parser().parse_args(words)
    result: int | None = arguments.command(arguments)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm2clip-vlm embed", description="Caches of caption embeddings."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
        made = commands.add_parser(run.__name__[1:], help=text.partition(":")[0], description=text)
        made.set_defaults(command=run)
        if run is not _build:
            made.add_argument("cache", metavar="DIR", type=Path)
        return made

    build = command(_build, "encode what a cache lacks: stage 2a; `slice=i/n` writes a part of it")
    build.add_argument("words", metavar="RECIPE [KEY=VALUE]", nargs="+", help="as in `train`")
    command(_verify, "read every byte and compare the checksums")
    text = "join caches of one encoder: slices of a build, other data sets, or (with DIR itself as "
    merge = command(_merge, text + "the only source) what killed runs of stage 2b left in journals")
    merge.add_argument("sources", metavar="SOURCE", type=Path, nargs="+")
    command(_report, "rows, dedup ratio, bytes, cost, encoder")
    text = "take over *_text_embeddings.tar of LLM2CLIP's released code: each is joined to its "
    text += "caption by key; the image shard X.tar lies beside X_text_embeddings.tar"
    official = command(_import, text)
    official.add_argument("tars", metavar="TAR", type=Path, nargs="+")
    official.add_argument(
        "--fingerprint",
        metavar="FIELD=VALUE",
        action="append",
        required=True,
        help="what made them, such as text_weights=Llama-3-8B-Instruct-CC pooling=mean; the files "
        "do not say it. Repeat for each field",
    )
    skipped = "skipped and counted (default 0)"
    official.add_argument("--max-bad-records", metavar="N", type=int, default=0, help=skipped)
    return parser


def _build(arguments: argparse.Namespace) -> int | None:
    stage = load_program(find_program("stage2a_cache_text"))
    result: int | None = stage.main(arguments.words)
    return result


def _verify(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.embedding_cache import EmbeddingCache

    cache = EmbeddingCache.open(arguments.cache)
    cache.verify()
    print(f"{arguments.cache}: {len(cache)} rows in {len(cache.files)} files are as written")


def _merge(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.embedding_merge import merge_caches

    cache = merge_caches(arguments.cache, arguments.sources)
    costs = arguments.cache / COST_NAME
    if not costs.exists():
        logs = [source / COST_NAME for source in arguments.sources]
        costs.write_text("".join(log.read_text() for log in logs if log.is_file()))
    print(f"{arguments.cache}: {len(cache)} rows")


def _report(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.embedding_cache import EmbeddingCache
    from llm2clip_vlm.runs.manifest import read_manifest

    cache = EmbeddingCache.open(arguments.cache)
    journals = sum(path.name.startswith("journal") for path in cache.files)
    print(f"rows           {len(cache)} of {cache.dim} numbers (float16)")
    print(f"files          {len(cache.files) - journals} shards, {journals} journals")
    if size := sum(path.stat().st_size for path in cache.files):
        print(f"bytes          {size} ({size / len(cache):.0f} a row)")
    extra = (read_manifest(arguments.cache) or {"extra": {}})["extra"]
    if different := extra.get("different_texts"):
        texts = extra["texts"]
        print(f"dedup ratio    {texts / different:.3f} ({texts} texts, {different} different)")
    else:
        print("dedup ratio    unknown: no manifest (run stage 2a once more to have it written)")
    costs = arguments.cache / COST_NAME
    if costs.is_file() and (parts := [json.loads(row) for row in costs.read_text().splitlines()]):
        texts, seconds = (sum(part[k] for part in parts) for k in ("texts", "seconds"))
        speed = texts / max(seconds, 1e-9)
        print(
            f"cost           {texts} texts in {seconds:.1f} s of the encoder ({speed:.1f} texts/s)"
        )
    for field, value in sorted(cache.fingerprint.items()):
        print(f"encoder        {field} = {value}")


def _import(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.embedding_import import import_official
    from llm2clip_vlm.data.reading.bad_records import BadRecords

    pairs = [field.partition("=") for field in arguments.fingerprint]
    if wrong := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise ValueError(f"--fingerprint {wrong[0]!r}: expected FIELD=VALUE")
    bad = BadRecords(arguments.max_bad_records)
    fields = {name: value for name, _, value in pairs}
    cache = import_official(arguments.cache, arguments.tars, fields, bad)
    print(f"{arguments.cache}: {len(cache)} rows; {bad.summary()}")
