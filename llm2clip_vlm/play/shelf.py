"""What the page shows: models of finished runs, folders of photographs, and votes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llm2clip_vlm.files import read_text
from llm2clip_vlm.metrics.statistics import binomial_interval
from llm2clip_vlm.play.finished import ENCODER_STAGES, VLM_STAGES, FinishedRun, finished_runs
from llm2clip_vlm.play.photo_index import PhotoIndex, index_photos, load_dual_encoder
from llm2clip_vlm.play.vlm_chat import Chat, model_folder
from llm2clip_vlm.runs.hashes import file_state, hash_json, model_files

DEFAULT_RUN = "runs/demo"


class Shelf:
    """What the page shows, loaded when first asked for.

    Args:
        run: Folder with finished stages.
        vlms: More VLMs than it holds.
        encoders: More encoders.
        photos: Folders to search. None: `image_root` of the data that encoders were evaluated with.
        votes: File of votes. None: `votes.jsonl` in `run`.
        device: Device of all models.

    Raises:
        ValueError: There is nothing to show.
    """

    def __init__(
        self,
        run: str = DEFAULT_RUN,
        vlms: Sequence[str] = (),
        encoders: Sequence[str] = (),
        photos: Sequence[str] = (),
        votes: str | None = None,
        device: str | None = None,
    ) -> None:
        self.run = Path(run)
        self.runs: list[FinishedRun] = finished_runs(run)
        self.vlms = {**{path: path for path in vlms}, **self._of(VLM_STAGES)}
        self.encoders = {**{path: path for path in encoders}, **self._of(ENCODER_STAGES)}
        own = {r.photos for r in self.runs if r.stage in ENCODER_STAGES if r.photos}
        self.photos = [*photos] or sorted(path for path in own if Path(path).is_dir())
        self.votes = Path(votes) if votes else self.run / "votes.jsonl"
        if not (self.vlms or self.encoders):
            made = "; `make demo` makes it in ten minutes" if run == DEFAULT_RUN else ""
            raise ValueError(
                f"{run}: no finished stage with a model{made}; or name some by --vlm and --encoder"
            )
        self._loaded: dict[str, str] = {}
        self.chat = lru_cache(maxsize=4)(partial(self._load_chat, device))
        load = partial(load_dual_encoder, device=device)
        self.encoder = lru_cache(maxsize=4)(lambda name: load(self.encoders[name]))

    def _of(self, stages: Sequence[str]) -> dict[str, str]:
        return {run.name: str(run.folder) for run in self.runs if run.stage in stages}

    def index(self, name: str, folder: str) -> PhotoIndex:
        """Index of a folder by an encoder, with what lies there now."""
        return index_photos(folder, self.encoder(name))

    def _load_chat(self, device: str | None, name: str) -> Chat:
        self._loaded.pop(name, None)
        self._loaded |= self._weights([name])  # what answers, whatever is trained meanwhile
        return Chat.load(self.vlms[name], device=device)

    def _weights(self, names: Sequence[str]) -> dict[str, str]:
        """Hash of each model's files (of large ones, pieces): one trained anew is another model."""
        found = {name: self._loaded[name] for name in names if name in self._loaded}
        for name in set(names) & self.vlms.keys() - found.keys():
            if (folder := Path(model_folder(self.vlms[name]))).is_dir():
                found[name] = hash_json([file_state(f)[2] for f in sorted(model_files(folder))])
        return found

    def vote(self, names: Sequence[str], vote: str, **more: Any) -> None:
        """Keep a vote, `left`, `right` or `tie` of two models, with hashes of their weights."""
        left, right = names
        row = {"time": round(time.time()), "left": left, "right": right, "vote": vote, **more}
        row["weights"] = self._weights(names)
        with self.votes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def tally(self, names: Sequence[str]) -> str:
        """Tell how two models, with the weights that they have now, stand; as Markdown."""
        rows = map(json.loads, read_text(self.votes).splitlines() if self.votes.is_file() else ())
        first, second = sorted(names)
        now = self._weights(names)
        same = (row for row in rows if row.get("weights", now) == now)
        votes = [row.get(row["vote"]) for row in same if {row["left"], row["right"]} == {*names}]
        won, ties = votes.count(first), votes.count(None)
        if not (decided := len(votes) - ties):
            return f"no decided vote yet, {ties} tied"
        low, high = binomial_interval(won, decided)
        return (
            f"**{first}** preferred to **{second}** in {won} of {decided} decided votes: "
            f"{100 * won / decided:.0f} % [{low:.0f}, {high:.0f}] (exact 95 % interval), "
            f"{ties} tied"
        )
