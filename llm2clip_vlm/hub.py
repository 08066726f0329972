"""Access to the Hugging Face hub: is a name one of its models, can it be reached, fetch it."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_PATIENCE_S = 5.0


class ModelError(ValueError):
    """A model that cannot be loaded, joined, converted or used as asked; the message says why."""


def require_place(path: str | Path) -> None:
    """Refuse at once a model that neither lies here nor can be fetched.

    Args:
        path: A file, a folder, or a hub id.

    Raises:
        ModelError: There is no such file or folder, and no hub id looks like it; or
            the hub cannot be reached, and the model is not in its cache.
    """
    if Path(path).exists():
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    name = str(path)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(
            f"{name}: no such file or folder. What a stage writes is there once that stage has run"
        ) from None
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if not (folder / "snapshots").is_dir() and is_offline():
        raise ModelError(
            f"{name}: no such folder here, and the hub cannot be reached; a directory that a stage "
            "writes is there once that stage has run, and a hub model once it was fetched where "
            f"there is a network: `hf download {name} --local-dir DIR`, then name DIR"
        )


@cache
def is_offline() -> bool:
    """Check whether the hub cannot be reached; if so, set its libraries to offline mode.

    They would retry for a minute for each file. Behind a proxy nothing is tried.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (80 if place.scheme == "http" else 443)
    if not getproxies():
        try:
            socket.create_connection((place.hostname or "", port), _PATIENCE_S).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, and for processes below this one
    return constants.HF_HUB_OFFLINE


def fetched(name: str, *, code: bool = False) -> Path:
    """Fetch a checkpoint of the hub into its cache; what is there already is not fetched again.

    Args:
        name: `ORG/NAME`, or `ORG/NAME/FILE` for one file of weights and the configs beside it.
        code: Fetch Python files, too. None of them is run here.

    Returns:
        The folder, or the file in it. Pickled weights are fetched where there are no others.

    Raises:
        ModelError: There is no such file, folder or model, or it cannot be fetched.
    """
    org, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    if not rest or name.startswith((".", "/", "~")) or Path(org, repo).exists():
        raise ModelError(f"{name}: no such file or folder, and no hub id (ORG/NAME)")
    require_place(f"{org}/{repo}")
    from huggingface_hub import HfApi, snapshot_download

    beside = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
    try:
        wanted = [file]
        if not file and not is_offline():
            names = HfApi().list_repo_files(f"{org}/{repo}")
            safe = any(n.endswith(".safetensors") for n in names)
            wanted = ["*.safetensors"] if safe else ["*.bin", "*.pt", "*.pth"]
        patterns = None if is_offline() else [*wanted, *beside]
        folder = Path(snapshot_download(f"{org}/{repo}", allow_patterns=patterns))
    except Exception as failure:  # the boundary around a library that raises many kinds
        raise ModelError(
            f"{name}: cannot be fetched ({type(failure).__name__}: {failure}). Where it can be: "
            f"`hf download {org}/{repo} --local-dir DIR`, then name DIR"
        ) from failure
    if not (folder / file).exists():
        raise ModelError(f"{name}: {org}/{repo} has no file {file}")
    return folder / file if file else folder
