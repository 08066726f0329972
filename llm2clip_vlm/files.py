"""Files and folders that are there whole or not at all; recipes and programs that are shipped."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

_PACKAGE = Path(__file__).resolve().parent
_LONGEST_NAME = 255
_PACKED = {"recipes": "recipes", "eval": "eval_assets", "stages": "stages", "demo": "demo"}
"""Folders of a checkout, and what they are called in the installed package."""


def _places(folder: str) -> tuple[Path, Path]:
    return _PACKAGE.parent / folder, _PACKAGE / _PACKED[folder]


def find_shipped(name: str, *, here: bool = True) -> str:
    """The path itself, or what lies under that name in the checkout or the installed package.

    Args:
        name: Path in a checkout, such as `recipes/accelerate/zero2.yaml`; what exists
            from the working directory comes first.
        here: Whether it does.

    Returns:
        The path, unchanged where nothing of that name is shipped.
    """
    folder, _, rest = name.partition("/")
    known = folder in ("recipes", "eval", "demo") and rest
    if not known or len(name) > _LONGEST_NAME or not name.isprintable():
        return name
    if (here and Path(name).exists()) or ".." in Path(name).parts:
        return name
    places = (place / rest for place in _places(folder))
    return next((str(place) for place in places if place.exists()), name)


def find_recipe(given: str, *, folder: str = "recipes/", here: bool = True) -> str:
    """A YAML file by its path, or a shipped one also without folder and ending.

    Args:
        given: Such as `recipes/llava15/stage3.yaml`, `llava15/stage3`, or the suite `llava15`.
        folder: Where shipped files of this kind are.
        here: Whether a file of the working directory counts.

    Returns:
        The path, unchanged where there is no such file.
    """
    folders = ("", folder, "eval/", "eval/suites/")
    names = [f"{above}{given}{end}" for end in ("", ".yaml") for above in folders]
    found = {name: find_shipped(name, here=here) for name in names if given[:1] not in ("/", "~")}
    known = (path for name, path in found.items() if here or path != name)
    return next(filter(os.path.isfile, known), given)


def parent_of(recipe: Path, base: str) -> Path:
    """The recipe that another one's `base:` names: beside it, or a shipped one."""
    beside = recipe.parent / base
    found = base if os.path.lexists(beside) else find_recipe(base, here=False)
    return recipe.parent / found  # of a shipped one the path is whole


def recipe_names(beside: Path) -> list[str]:
    """The YAML files of a folder, and the shipped ones by the names that `find_shipped` takes."""
    names = [str(path) for path in beside.glob("*.yaml")]
    for folder in ("recipes", "eval"):
        for root in _places(folder):
            names += [f"{folder}/{path.relative_to(root)}" for path in root.rglob("*.yaml")]
    return names + [re.sub(r"^(recipes|eval/suites|eval)/|\.yaml$", "", name) for name in names]


def find_program(name: str, root: Path | None = None) -> Path:
    """File of a program of `stages/`, `eval/` or `demo/`, in a checkout or a wheel.

    Args:
        name: Name without its ending, such as `stage1_text_encoder` or `run_lmms`.
        root: A folder with `stages/`, `eval/` and `demo/` that is asked first.

    Raises:
        FileNotFoundError: There is none of this name; the message lists those there are.
    """
    kinds = ("stages", "eval", "demo")
    folders = [root / kind for kind in kinds] if root else []
    folders += [place for kind in kinds for place in _places(kind)]
    programs = {file.stem: file for f in reversed(folders) for file in f.glob("[a-z]*.py")}
    if name not in programs:
        raise FileNotFoundError(f"no program `{name}`; there are: {', '.join(sorted(programs))}")
    return programs[name]


def load_program(path: Path) -> ModuleType:
    """Import a program from its file (these folders are no packages in a checkout)."""
    name = f"llm2clip_vlm_program_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; at the end it becomes `path`.

    An error leaves only `path` as it was; so does a kill, but for a hidden folder, which the next
    process that writes `path` on this machine removes. A file replaces an earlier one and is on
    disk when it appears; a folder replaces nothing.

    Args:
        path: Where it goes; the folders above are made.

    Yields:
        A path of which nothing exists yet.

    Raises:
        OSError: `path` is a folder with something in it.
    """
    target = Path(path)
    with _hidden_folder(target) as folder:
        partial = folder / target.name
        yield partial
        if partial.is_file():
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            let_read(partial)
        partial.replace(target)


HASH_BYTES = 32
"""Bytes of the SHA-256 at the end of a hashed file."""
_AS_WRITTEN: set[tuple[str, int, int, int]] = set()  # as this process has found


@contextmanager
def written_hashed(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears whole, as :func:`written_whole` says, with its hash.

    Args:
        path: Where it goes; read it by :func:`map_hashed`.
    """
    with written_whole(path) as partial:
        with partial.open("wb") as handle:
            yield handle
        with partial.open("rb") as handle:
            end = hashlib.file_digest(handle, "sha256").digest()
        with partial.open("ab") as handle:
            handle.write(end)


def map_hashed(path: Path) -> memoryview:
    """What :func:`written_hashed` wrote, without the hash, mapped into memory.

    It is compared with the hash once in each process.

    Args:
        path: The file.

    Raises:
        ValueError: It is damaged, or has changed since it was written.
    """
    import numpy as np

    stat = path.stat()
    content = np.memmap(path, np.uint8, "r") if stat.st_size else np.empty(0, np.uint8)
    body, end = content[:-HASH_BYTES].data, content[-HASH_BYTES:].data
    found = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if found not in _AS_WRITTEN and hashlib.sha256(body).digest() != end:
        raise ValueError(f"{path} has changed since it was written; delete it: it is made again")
    _AS_WRITTEN.add(found)
    return body


def let_read(folder: Path) -> None:
    """Give weights the rights of their folder: safetensors 0.8 lets nobody but the owner read.

    Args:
        folder: Folder of the weights, with all below it; another user's files stay as they are.

    See https://github.com/safetensors/safetensors/issues/782.
    """
    for file in folder.rglob("*.safetensors"):
        with suppress(OSError):
            file.chmod(folder.stat().st_mode & 0o666)


@contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, locked while this process lives; those of killed ones go."""
    # Locks may not reach other machines, so each looks after its own leftovers.
    ours = f".{target.name}.{os.uname().nodename}."
    for leftover in target.parent.glob(f"{glob.escape(ours)}*"):
        with suppress(OSError), opened(leftover) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            shutil.rmtree(leftover)
    with told_where(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        unlocked = Path(tempfile.mkdtemp(prefix=".new.", dir=target.parent))
    folder = target.with_name(f"{ours}{unlocked.name.removeprefix('.new.')}")
    with opened(unlocked) as handle:
        with suppress(OSError):  # no locks on this file system: nobody removes anything
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield unlocked.rename(folder)
        finally:
            shutil.rmtree(folder)


@contextmanager
def told_where(target: Path) -> Iterator[None]:
    """Tell what was to be written where a folder for it cannot be made, and what to do."""
    try:
        yield
    except OSError as error:
        told = f"cannot be written ({error.filename}: {error.strerror}); choose another place"
        raise OSError(error.errno, told, str(target)) from error


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A folder's descriptor, to be locked by."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that nobody ever sees half of it.

    Args:
        path: The file; an earlier one is replaced.
        text: All of it.
    """
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def require_regular(path: str | Path, error: type[ValueError] = ValueError) -> Path:
    """The path itself, if a plain file (or a link to one) lies there.

    Args:
        path: A FIFO would wait for ever, a device has no end.
        error: What is raised.

    Raises:
        ValueError: (or `error`) It is something else, or nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as failure:
        why = getattr(failure, "strerror", None) or failure
        raise error(f"{path}: cannot read this file: {why}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise error(f"{path}: cannot read this file: expected a plain file, got {kind}")
    return Path(path)


def read_text(
    path: str | Path, error: type[ValueError] = ValueError, *, limit_bytes: int = 1 << 26
) -> str:
    """A text file that a person or a program wrote, and no more than that.

    Args:
        path: The file.
        error: What is raised.
        limit_bytes: Largest size.

    Raises:
        ValueError: (or `error`) No plain file, too large, not readable, or not UTF-8 text.
    """
    file = require_regular(path, error)
    try:
        with file.open("rb") as handle:
            content = handle.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise error(f"{path}: expected at most {limit_bytes:,} bytes, got more")
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise error(f"{path}: cannot read this file: {failure}") from None
    if "\0" in text:
        raise error(f"{path}: cannot read this file: it holds NUL bytes; was it cut off?")
    return text


def listed(names: Iterable[str]) -> str:
    """Write names for a message: the first few, and how many more there are."""
    whole = list(names)
    return ", ".join(whole[:8]) + (f" and {len(whole) - 8} more" if len(whole) > 8 else "")


_JSON_NAMES = {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null"}


def read_json(path: str | Path, kind: type = dict, error: type[ValueError] = ValueError) -> Any:
    """A JSON file of a known form.

    Args:
        path: The file.
        kind: What it must hold; `object` = anything.
        error: What is raised.

    Raises:
        ValueError: (or `error`) As :func:`read_text`; it is no JSON, holds something else, or
            gives one key two values.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            for key, value in items:
                if repr(found[key]) != repr(value):
                    raise ValueError(f"key {key!r} is given twice")
        return found

    text = read_text(path, error)
    try:
        found = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: no JSON that can be read ({failure}); write it again") from None
    if not isinstance(found, kind):
        wanted, got = (_JSON_NAMES.get(t.__name__, t.__name__) for t in (kind, type(found)))
        raise error(f"{path}: expected {wanted} in this JSON file, got {got}")
    return found
