"""A vision tower that does not train sees every picture once: its pooled output is kept on disk.

Features are found again by the picture's bytes, in a folder for each tower, image processor and way
of decoding, so that runs (seeds, text encoders, the control) can share them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llm2clip_vlm.data.image_text.dataset import readable_pictures
from llm2clip_vlm.data.image_text.index import ImageTextRecords
from llm2clip_vlm.data.reading import images
from llm2clip_vlm.data.reading.bad_records import BadRecords
from llm2clip_vlm.data.reading.pixels import process_images
from llm2clip_vlm.distributed import is_main, shared_out
from llm2clip_vlm.files import written_whole
from llm2clip_vlm.models.text.text_encoder import hash_state
from llm2clip_vlm.recipe.encoder import EncoderRecipe
from llm2clip_vlm.runs.hashes import HandoffError, hash_json

logger = logging.getLogger(__name__)

FOLDER = "features"
"""Name of the cache below `output_dir`, where the recipe names none."""

_SHARD, _BATCH, _COMPARED = 1024, 64, 4
_BATCH_CPU = 4  # larger activations are cleared page by page each time: half of the time of a CNN
_TOLERANCE = {"cpu": 1e-5}
_TOLERANCE_OF_OTHERS = 1e-2  # convolutions in TF32, whose algorithm depends on the batch


class FrozenTower:
    """Records to pooled features of a tower, each picture encoded at most once.

    Pictures are decoded exactly as the image processor does. `ImageTextDataset` calls it on all
    ranks, which share the work.

    Args:
        tower: The tower on its device, which does not train. Its forward pass takes features for
            pictures from here on (:meth:`attach`).
        image_processor: Image processor of the tower.
        folder: Folder of the cache; other runs may use it at the same time.
    """

    def __init__(self, tower: Any, image_processor: Any, folder: str | Path) -> None:
        self.image_processor = image_processor
        config = tower.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        decoding = [images.DECODING, PIL.__version__]
        made_by = [hash_state(tower.state_dict()), config, image_processor.to_dict(), decoding]
        self.folder = Path(folder) / hash_json(made_by)[:32]
        """Folder of the features of this tower, of pictures that are decoded in this way."""
        self._compared: list[tuple[Any, Tensor]] = []
        self._tower = tower.eval()
        self.attach(tower)

    @staticmethod
    def attach(tower: Any) -> None:
        """Let a tower take its own pooled output `[b, hidden]` in the place of pictures.

        Args:
            tower: Changed in place; `[b, 3, h, w]` goes through it as before.
        """
        run = tower.forward

        def forward(pixel_values: Tensor, **kwargs: Any) -> Any:
            if pixel_values.ndim != 2:
                return run(pixel_values=pixel_values, **kwargs)
            return BaseModelOutputWithPooling(
                last_hidden_state=pixel_values[:, None], pooler_output=pixel_values
            )

        tower.forward = forward

    def __call__(self, records: ImageTextRecords, bad: BadRecords) -> tuple[list[int], Tensor]:
        """Features of all pictures that can be read.

        Args:
            records: Records of the pictures.
            bad: Takes pictures that cannot be used.

        Returns:
            Positions in `records`, and `[n, hidden]` float32 on the CPU.

        Raises:
            HandoffError: A file of the cache is damaged, or is not what the tower gives.
        """
        digests = self._digests(records, bad)
        known = self._read()
        first = {digest: row for row, digest in digests.items()}
        again = [first[digest] for digest in first if digest in known]
        self._compared += [(records[row], known[digests[row]]) for row in _spread(again)]
        self.require(self._tower)
        missing = [row for digest, row in first.items() if digest not in known]
        parts = [missing[at : at + _SHARD] for at in range(0, len(missing), _SHARD)]
        hidden = not is_main() or not parts
        size = _BATCH_CPU if self._tower.device.type == "cpu" else _BATCH
        with tqdm(None, "frozen tower", len(missing), unit="img", disable=hidden) as bar:

            def encode(rows: Sequence[int]) -> dict[bytes, Tensor]:
                encoded: dict[bytes, Tensor] = {}
                for at in range(0, len(rows), size):
                    batch = readable_pictures(records, rows[at : at + size], bad)
                    if batch:
                        features = _pooled(self._tower, self.image_processor, batch.values())
                        encoded |= {digests[r]: f for r, f in zip(batch, features, strict=True)}
                    bar.update(min(size, len(rows) - at))
                self._write(encoded)
                return encoded

            for encoded in shared_out(parts, encode):
                known |= encoded
        new = [row for row in missing if digests[row] in known]
        self._compared += [(records[row], known[digests[row]]) for row in _spread(new)]
        kept = [row for row in sorted(digests) if digests[row] in known]
        if not kept:
            raise HandoffError(f"none of the {len(records)} pictures can be read")
        return kept, torch.stack([known[digests[row]] for row in kept])

    @torch.no_grad()
    def require(self, tower: Any) -> None:
        """Run a few pictures, whose features are used, through a tower again.

        Args:
            tower: The tower of this object, or what was saved of it.

        Raises:
            HandoffError: It gives other features.
        """
        for record, kept in self._compared:
            again = _pooled(tower, self.image_processor, [record.open()])[0]
            off = float((again - kept).norm() / kept.norm().clamp_min(1e-12))
            if not off <= _TOLERANCE.get(tower.device.type, _TOLERANCE_OF_OTHERS):
                raise HandoffError(
                    f"{self.folder}: the features of {record.where} are not what the tower gives "
                    f"(they differ by {off:.1e} of their norm); remove that folder, and they are "
                    "computed again"
                )

    def _digests(self, records: ImageTextRecords, bad: BadRecords) -> dict[int, bytes]:
        """Hashes of the pictures' bytes by row."""

        def digest(row: int) -> bytes | str:
            try:
                return hashlib.sha256(records[row].encoded().data).digest()
            except images.ImageError as error:
                return str(error)

        def digests(rows: range) -> list[bytes | str]:
            with ThreadPoolExecutor() as threads:
                values = list(threads.map(digest, rows))
            for row, value in zip(rows, values, strict=True):
                if isinstance(value, str):
                    bad.add(records[row].where, value)
            return values

        spans = [range(at, min(at + _SHARD, len(records))) for at in range(0, len(records), _SHARD)]
        values = [value for part in shared_out(spans, digests) for value in part]
        return {row: value for row, value in enumerate(values) if isinstance(value, bytes)}

    def _read(self) -> dict[bytes, Tensor]:
        """Read the cache: hash of a picture's bytes to its features."""
        known: dict[bytes, Tensor] = {}
        # Another run may write meanwhile: all ranks take the files that the first one sees.
        listed = shared_out([self.folder], lambda folder: sorted(folder.glob("*.safetensors")))
        for file in listed[0]:
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest()[:32] != file.stem:
                raise HandoffError(f"{file} is damaged; remove it, and it is computed again")
            shard = load(data)
            names = [row.tobytes() for row in shard["pictures"].numpy()]
            known |= dict(zip(names, shard["features"], strict=True))
        return known

    def _write(self, found: dict[bytes, Tensor]) -> None:
        if not found:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1)
        shard = {
            "pictures": torch.from_numpy(pictures.copy()),
            "features": torch.stack(list(found.values())),
        }
        data = save(shard)
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        with written_whole(self.folder / name) as file:
            file.write_bytes(data)


def _spread(rows: Sequence[int]) -> Sequence[int]:
    """A few of the rows, from the first on."""
    return rows[:: -(-len(rows) // _COMPARED) or 1]


@torch.no_grad()
def _pooled(tower: Any, image_processor: Any, pictures: Any) -> Tensor:
    pixels = process_images(image_processor, list(pictures), None)
    pooled: Tensor = tower(pixel_values=pixels.to(tower.device, tower.dtype)).pooler_output
    return pooled.float().cpu()


def frozen_tower(
    recipe: EncoderRecipe, tower: Any, image_processor: Any, device: Any
) -> FrozenTower | None:
    """Open the features that a run trains on.

    Args:
        recipe: Gives `feature_cache`, `output_dir` and `augmentation`.
        tower: Tower with `requires_grad` set.
        image_processor: Image processor of the tower.
        device: Where the tower goes.

    Returns:
        The tower's features. None: the tower trains, or has to run in every step.
    """
    if recipe.feature_cache is False or any(p.requires_grad for p in tower.parameters()):
        return None
    if recipe.augmentation.crop_scale_min < 1:
        if is_main():
            logger.warning(
                "augmentation: a picture changes in each epoch, so the frozen tower runs in "
                "every step; leave it out, and each picture is encoded once"
            )
        return None
    folder = recipe.feature_cache or Path(recipe.output_dir) / FOLDER
    return FrozenTower(tower.to(device), image_processor, folder)
