"""`llm2clip-vlm embed`: caches of caption embeddings from the command line."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm2clip_vlm.files import find_program, load_program, write_atomically
from llm2clip_vlm.options import Parser

COST_NAME = "encode_cost.jsonl"
"""File beside a cache: texts and seconds of each part that stage 2a has encoded."""


def main(command: str, words: Sequence[str]) -> int | None:
    """Run a command on caches.

    Args:
        command: `embed`.
        words: The command on caches, and its arguments.

    Returns:
        The exit code. None: 0.

    Raises:
        ValueError: What the user can mend.
    """
    arguments = parser(command).parse_args(words)
    return arguments.command(arguments)


def parser(command: str) -> argparse.ArgumentParser:
    """The options of `embed`."""
    options = Parser(prog=f"llm2clip-vlm {command}", description="Caches of caption embeddings.")
    commands = options.add_subparsers(metavar="COMMAND", required=True)

    def add(run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
        made = commands.add_parser(run.__name__[1:], help=text.partition(":")[0], description=text)
        made.set_defaults(command=run)
        if run is not _build:
            made.add_argument("cache", metavar="DIR", type=Path)
        return made

    build = add(_build, "encode what a cache lacks: stage 2a; `slice=i/n` writes a part of it")
    build.add_argument("words", metavar="RECIPE [KEY=VALUE]", nargs="+", help="as in `train`")
    add(_verify, "read every byte and compare the checksums")
    text = "join caches of one encoder: copies the shards of a build's slices or of other data "
    text += "sets; parts that a killed run of stage 2b has left in DIR itself become shards"
    merge = add(_merge, text)
    merge.add_argument("sources", metavar="SOURCE", type=Path, nargs="+")
    add(_report, "rows, dedup ratio, bytes, cost, encoder")
    return options


def _build(arguments: argparse.Namespace) -> int | None:
    return load_program(find_program("stage2a_cache_text")).main(arguments.words)


def _verify(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
    from llm2clip_vlm.data.cache.shards import CacheError
    from llm2clip_vlm.runs.hashes import changed_outputs
    from llm2clip_vlm.runs.manifest import read_manifest

    cache = EmbeddingCache.open(arguments.cache)
    cache.verify()
    if lost := changed_outputs(arguments.cache, read_manifest(arguments.cache) or {}):
        raise CacheError(
            f"{arguments.cache}: {lost[0]} is not what stage 2a left ({len(lost)} such files); "
            "copy the cache again, or run stage 2a once more (it encodes only what is lacking)"
        )
    print(f"{arguments.cache}: {len(cache)} rows in {len(cache.shards)} files are as written")


def _merge(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache

    cache = EmbeddingCache.join(arguments.cache, arguments.sources)
    logs = [folder / COST_NAME for folder in (arguments.cache, *arguments.sources)]
    rows = itertools.chain(*(log.read_text().splitlines() for log in logs if log.is_file()))
    write_atomically(logs[0], "".join(f"{row}\n" for row in dict.fromkeys(rows)))
    print(f"{arguments.cache}: {len(cache)} rows")


def _report(arguments: argparse.Namespace) -> None:
    from llm2clip_vlm.data.cache.embeddings import EmbeddingCache
    from llm2clip_vlm.runs.manifest import read_manifest

    cache = EmbeddingCache.open(arguments.cache)
    added = sum(shard.path.name.startswith("part") for shard in cache.shards)
    print(f"rows           {len(cache)} of {cache.dim} numbers (float16)")
    print(f"files          {len(cache.shards) - added} shards, {added} parts of unfinished runs")
    if size := sum(shard.path.stat().st_size for shard in cache.shards):
        print(f"bytes          {size} ({size / len(cache):.0f} a row)")
    extra = (read_manifest(arguments.cache) or {"extra": {}})["extra"]
    if different := extra.get("different_texts"):
        texts = extra["texts"]
        print(f"dedup ratio    {texts / different:.3f} ({texts} texts, {different} different)")
    else:
        print("dedup ratio    unknown: no manifest (run stage 2a once more to have it written)")
    costs, parts = arguments.cache / COST_NAME, list[dict[str, Any]]()
    for number, row in enumerate(costs.read_text().splitlines() if costs.is_file() else (), 1):
        try:
            parts.append(dict(json.loads(row)))
        except (TypeError, ValueError):  # a killed process wrote half of it
            print(f"not counted    {costs}:{number}: {row[:60]!r}")
    if parts:
        texts, seconds, cut = (sum(p.get(k, 0) for p in parts) for k in ("texts", "seconds", "cut"))
        speed = texts / max(seconds, 1e-9)
        print(
            f"cost           {texts} texts in {seconds:.1f} s of the encoder ({speed:.1f} texts/s)"
            f", {cut} of them cut"
        )
    for field, value in sorted(cache.fingerprint.items()):
        print(f"encoder        {field} = {value}")
