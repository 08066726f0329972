"""`llm2clip-vlm push`: a model to the Hugging Face Hub, and proof that it arrived whole."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from llm2clip_vlm.hub import ModelError
from llm2clip_vlm.interop.weights import verify_hashes
from llm2clip_vlm.options import Parser
from llm2clip_vlm.runs.card import CARD_NAME, kind_of

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md")
"""What a model directory is made of; anything else in it is refused by name."""

_SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,})")


def push(
    directory: str | Path, repo_id: str, *, public: bool = False, revision: str = "main"
) -> str:
    """Upload a model directory and compare what the hub then holds with what lies here.

    The token is the one that `hf auth login` has stored, or HF_TOKEN; there is no other way in.

    Args:
        directory: Folder with a model card: a stage's `model/`, `vision_tower/` or
            `text_encoder/`, or what `export` or `convert` wrote.
        repo_id: `ORG/NAME`; made, private, if it does not exist.
        public: Whether a repository that is made here is public.
        revision: The branch.

    Returns:
        The address of the commit.

    Raises:
        ModelError: The directory is no model, was changed after it was written, has no card or
            holds files that no model needs; there is no token; or the hub has something else.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(directory)
    files = _files(folder)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        raise ModelError("HF_HUB_OFFLINE is set, and nothing can be uploaded offline; unset it")
    if get_token() is None:
        raise ModelError("the hub's own store has no token: run `hf auth login` first")
    api = HfApi(library_name="llm2clip-vlm")
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[file.relative_to(folder).as_posix() for file in files],
            commit_message="llm2clip-vlm push",
            revision=revision,
        )
        found = api.verify_repo_checksums(repo_id, local_dir=folder, revision=revision)
    except HfHubHTTPError as error:
        raise ModelError(f"{repo_id}: the hub says: {error}") from error
    if changed := [*found.extra_paths, *(file["path"] for file in found.mismatches)]:
        raise ModelError(f"{repo_id}: {changed[0]} arrived changed or not at all; push again")
    return str(done.commit_url)


def _files(folder: Path) -> list[Path]:
    """What is uploaded; raises where the directory is not fit for it."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    models = [part.name for part in sorted(folder.iterdir()) if part.is_dir() and kind_of(part)]
    if not (folder / CARD_NAME).is_file():
        hint = f"name one of its models: {', '.join(models)}" if models else "export it first"
        raise ModelError(f"{folder}: no model card ({CARD_NAME}) there; {hint}")
    verify_hashes(folder)
    files = [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    for file in files:
        if file.is_symlink() or not any(file.match(pattern) for pattern in _PATTERNS):
            raise ModelError(
                f"{file}: a model holds {', '.join(_PATTERNS)} and no links; move it away (weights "
                "that are no safetensors are never uploaded)"
            )
        if file.suffix != ".safetensors" and (found := _SECRET.search(file.read_bytes())):
            raise ModelError(f"{file}: looks as if it held a token ({found[0][:6]!r}...)")
    return files


def parser(command: str = "push") -> argparse.ArgumentParser:
    """The options of `push`."""
    made = Parser(
        prog=f"llm2clip-vlm {command}",
        description="Upload a model directory with its card to the Hugging Face Hub.",
        epilog="Log in before: hf auth login",
    )
    made.add_argument("directory", metavar="DIR", help="with config, weights and README.md")
    made.add_argument("repository", metavar="ORG/NAME", help="made, private, if not there")
    made.add_argument("--public", action="store_true", help="make a new repository public")
    made.add_argument("--revision", default="main", help="branch (default: main)")
    return made


def main(command: str, words: Sequence[str]) -> int:
    """Run `push`, and print where the model is."""
    given = parser().parse_args(words)
    address = push(given.directory, given.repository, public=given.public, revision=given.revision)
    print(f"{given.directory} is at {address}; every file there has this one's hash")
    return 0
