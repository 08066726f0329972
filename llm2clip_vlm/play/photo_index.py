"""A folder of photographs, indexed once for an encoder and found again by words.

An index lies in the user's cache folder, one file for each pair of encoder and folder. A photograph
of the same name, size and date is believed.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llm2clip_vlm.data.reading import images
from llm2clip_vlm.distributed import find_device
from llm2clip_vlm.evaluation.encoder.encoders import Encoder, load_encoder
from llm2clip_vlm.files import written_whole
from llm2clip_vlm.models.equal import difference
from llm2clip_vlm.play.finished import from_run
from llm2clip_vlm.play.vlm_chat import model_folder
from llm2clip_vlm.recipe.base import TextEncoderSection
from llm2clip_vlm.runs.hashes import hash_json
from llm2clip_vlm.runs.manifest import read_manifest

logger = logging.getLogger(__name__)

_VERSION = 1
_TOLERANCE = 1e-2
"""Largest change of a vector made again, perhaps in another batch or on another device."""
_SAVED_EVERY_S = 60
_BAD_SHOWN = 10

_DAMAGED = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError)
"""What reading an index raises that was cut off, or written by something else."""

_Photo = tuple[int, int, Tensor | str]
"""Size and date of a file, and its vector or why it is bad."""


def cache_folder() -> Path:
    """Where indexes are kept: `llm2clip_vlm/photos` in `XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "llm2clip_vlm", "photos")


def load_dual_encoder(
    path: str, text_encoder: str | None = None, device: str | None = None
) -> Encoder:
    """Load an encoder with both sides.

    Args:
        path: Model directory, output of stage 2b or `clip_baseline`, or hub id.
        text_encoder: Text encoder of a model of stage 2b. None: the one that its manifest names.
        device: None: `cuda` if there is one, else `cpu`.

    Raises:
        ValueError: It cannot be loaded, or has no text side.
    """
    folder = model_folder(path)
    found = text_encoder or _text_encoder_of(folder)
    encoder = load_encoder(folder, found, device=find_device(device), batch_size=32)
    if encoder.texts is None:
        raise ValueError(
            f"{path}: a vision tower without text side; expected a CLIP, a SigLIP, or a model of "
            "stage 2b whose text encoder its manifest names or you give (--text-encoder DIR)"
        )
    return encoder


def _text_encoder_of(model: str) -> str | TextEncoderSection | None:
    """Find what a model of stage 2b was trained against by its manifests. None: they do not say."""
    stage = Path(model).parent
    manifest = read_manifest(stage)
    if manifest is None or manifest["stage"] != "stage2b_vision_encoder":
        return None
    recipe = manifest["recipe"]
    if recipe.get("text_in_loop"):
        return str(stage / "text_encoder")
    given: Any = recipe.get("write_through")
    if given is None:
        where = from_run(stage, manifest, recipe["embedding_cache"])
        cache = read_manifest(where)
        if cache is None and not Path(where).exists():
            raise _not_there(model, where, "embedding cache, which names its text encoder,")
        if cache is None or "text_encoder" not in cache["recipe"]:
            return None
        given = cache["recipe"]["text_encoder"]
    place = given if isinstance(given, str) else given["language_model"]
    there = from_run(stage, manifest, place)
    if not Path(there).exists() and place.count("/") != 1:
        raise _not_there(model, place, "text encoder")
    if isinstance(given, str):
        return there
    return TextEncoderSection.model_validate({**given, "language_model": there})


def _not_there(model: str, place: str, what: str) -> ValueError:
    return ValueError(
        f"{model}: its {what} was {place}, which is not there from here; run the command "
        "from the folder in which the model was trained, or give --text-encoder DIR"
    )


@dataclass
class PhotoIndex:
    """The pictures below a folder and their vectors."""

    folder: Path
    """Resolved."""
    names: list[str]
    """Paths below it."""
    vectors: Float[Tensor, "n d"]
    """Unit norm, in the order of `names`."""
    bad: dict[str, str]
    """Pictures that cannot be used, and why."""
    num_new: int
    """Pictures that had to be read now."""

    def summary(self) -> str:
        """How many there are, and which ones cannot be used."""
        lines = [f"{len(self.names)} photographs, {self.num_new} pictures new"]
        if self.bad:
            lines[0] += f"; {len(self.bad)} cannot be used:"
            lines += [f"  {why}" for why in list(self.bad.values())[:_BAD_SHOWN]]
            lines += ["  ..."] if len(self.bad) > _BAD_SHOWN else []
        return "\n".join(lines)

    def best(self, text_embed: Float[Tensor, " d"], count: int) -> list[tuple[float, Path]]:
        """The pictures nearest to a text: cosine and path, best first."""
        scores = self.vectors @ text_embed
        order = scores.argsort(descending=True, stable=True)[:count].tolist()
        return [(float(scores[row]), self.folder / self.names[row]) for row in order]


def find_photos(folder: Path) -> Iterator[str]:
    """Pictures below a folder by their names, in order; nothing hidden, no linked folder."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in images.picture_suffixes():
                yield Path(place, name).relative_to(folder).as_posix()


def index_photos(folder: str | Path, encoder: Encoder) -> PhotoIndex:
    """Index a folder of photographs; only what is new or changed is embedded.

    One photograph of an earlier call is embedded again: if its vector is another one now, nothing
    of that call is believed. Ctrl-C keeps what was done.

    Args:
        folder: Photos' folder, with all below it.
        encoder: Result of :func:`load_dual_encoder`.

    Raises:
        ValueError: No picture in it that can be used.
    """
    root = Path(folder).expanduser().resolve()
    states = {name: _state(root / name) for name in find_photos(root)}
    key = hash_json([_VERSION, encoder.fingerprints["model"], str(root)])[:32]
    file = cache_folder() / f"{key}.safetensors"
    photos = {name: p for name, p in _load(file).items() if states.get(name) == p[:2]}
    if not _still_the_same(root, encoder, photos):
        logger.warning("%s: the encoder makes other vectors now; indexed again", folder)
        photos = {}
    todo, saved = [name for name in states if name not in photos], time.monotonic()

    def pixels(name: str) -> Tensor | str:
        return _pixels(root, name, encoder)

    try:
        with ThreadPoolExecutor() as threads, tqdm(
            total=len(todo), disable=not todo, unit="photo", desc="indexing"
        ) as bar:  # fmt: skip
            for start in range(0, len(todo), encoder.batch_size):
                part = todo[start : start + encoder.batch_size]
                found = dict(zip(part, threads.map(pixels, part), strict=True))
                read = {name: seen for name, seen in found.items() if isinstance(seen, Tensor)}
                if read:
                    embeds = encoder.embed_pixels(torch.cat([*read.values()]))
                    found |= zip(read, embeds, strict=True)
                photos |= {name: (*states[name], seen) for name, seen in found.items()}
                bar.update(len(part))
                if time.monotonic() - saved > _SAVED_EVERY_S:
                    _save(file, photos)
                    saved = time.monotonic()
    finally:
        if todo:
            _save(file, photos)
    found = {name: photos[name][2] for name in states}
    good = {name: seen for name, seen in found.items() if isinstance(seen, Tensor)}
    bad = {name: seen for name, seen in found.items() if isinstance(seen, str)}
    if not good:
        kinds = "one of .jpg, .png, .webp, ..."
        raise ValueError(
            f"{folder}: no picture that can be used: expected {kinds}; {len(bad)} are bad"
            + "".join(f"; {why}" for why in list(bad.values())[:1])
        )
    return PhotoIndex(root, [*good], torch.stack([*good.values()]), bad, len(todo))


def _state(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError:  # a link to nowhere, which is told of when it is read
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _load(file: Path) -> dict[str, _Photo]:
    try:
        with safe_open(file, "pt") as opened:
            vectors = opened.get_tensor("vectors")
            listed = json.loads(opened.metadata()["photos"]).items()
        return {
            name: (size, date, vectors[row] if isinstance(row, int) else row)
            for name, (size, date, row) in listed
        }
    except FileNotFoundError:
        return {}
    except _DAMAGED as error:  # the boundary around a file
        logger.warning("%s: damaged, made again (%s)", file, error)
        return {}


def _save(file: Path, photos: dict[str, _Photo]) -> None:
    vectors = [seen for *_, seen in photos.values() if isinstance(seen, Tensor)]
    rows = itertools.count()
    listed = {
        name: (size, date, seen if isinstance(seen, str) else next(rows))
        for name, (size, date, seen) in photos.items()
    }
    with written_whole(file) as partial:
        tensors = {"vectors": torch.stack(vectors) if vectors else torch.empty(0, 0)}
        save_file(tensors, partial, metadata={"photos": json.dumps(listed)})


def _still_the_same(root: Path, encoder: Encoder, photos: dict[str, _Photo]) -> bool:
    good = [(name, seen) for name, (*_, seen) in photos.items() if isinstance(seen, Tensor)]
    if not good:
        return True
    name, vector = random.choice(good)
    pixels = _pixels(root, name, encoder)
    if isinstance(pixels, str):
        return False
    return difference(vector[None], encoder.embed_pixels(pixels), _TOLERANCE) is None


def _pixels(root: Path, name: str, encoder: Encoder) -> Tensor | str:
    """What the tower sees of a picture, or why nothing."""
    try:
        encoded = images.EncodedImage(images.read_image(root, name), images.shown(name))
        encoded.require_picture()
        return encoder.pixels(encoded.rgb(strict=True))
    except images.ImageError as error:  # the boundary around a picture
        return str(error)
