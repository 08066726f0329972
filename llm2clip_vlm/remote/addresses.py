"""Addresses in recipes: object stores, the hub and https, asked for what is there.

Credentials come from where each service's own library looks for them (environment, its own files);
they stand in no recipe. What fails is tried again with growing waits, and in the end named.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llm2clip_vlm.hub import is_offline

logger = logging.getLogger(__name__)

ATTEMPTS = 8
"""Tries for one range or look-up; the waits between them grow to a minute in all."""

AT_ONCE = 16
"""Requests beside each other."""

CHANGED = "it has changed since it was looked up; start again, and it is read anew"

_LONGEST_WAIT_S = 30.0
_SILENCE_S = 30.0  # without a byte, after which a connection counts as lost

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ADDRESS = re.compile(r"(s3|gs|hf)://[^/]+/.*[^/]|https?://[^/@?#]+/[^?#]*[^/?#]")
_SERIES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAGS = ("ETag", "etag", "blob_id", "generation", "LastModified", "Last-Modified", "mtime")
_HOPELESS = (PermissionError, FileNotFoundError, ImportError, NotImplementedError, ValueError)
_HOPELESS_NAMES = ("NoCredentialsError", "OfflineModeIsEnabled", "FileExpired")
_ASK_AGAIN = (408, 425, 429)

R = TypeVar("R")


class RemoteError(Exception):
    """A file that is not on this machine cannot be found or read.

    It is no `ValueError` and no `OSError`: what is raised by a bad record is counted and skipped,
    this ends the run.
    """


class FileState(NamedTuple):
    """What a remote file is recognised by."""

    address: str
    st_size: int
    tag: str
    """Its entity tag, or whatever else its service changes with the contents."""


def is_remote(path: str | Path) -> bool:
    """Whether a recipe's path is an address."""
    return _SCHEME.match(str(path)) is not None


@cache
def look_up(path: str) -> tuple[FileState, ...]:
    """Find files without fetching any of them, once in each process.

    Args:
        path: An address; `*`, `?` and `[...]` are matched where the service can list, and
            `{000..123}` stands for a series anywhere.

    Returns:
        The files: those of a series in its order, those of a pattern sorted.

    Raises:
        RemoteError: There is no such file, or the service does not say.
    """
    scheme = path.partition("://")[0]
    if not _ADDRESS.fullmatch(path):
        raise RemoteError(
            f"{path}: expected s3://BUCKET/KEY, gs://BUCKET/KEY, hf://datasets/ORG/NAME/FILE or "
            "https://HOST/FILE, without user, password or query: credentials come from the "
            "environment"
        )

    def found(name: str) -> Iterator[FileState]:
        if glob.has_magic(name) and scheme.startswith("http"):
            raise RemoteError(f"{name}: {scheme} lists no files; name each, or a series {{00..99}}")
        infos = tried(name, lambda: _infos(name))
        for at, info in sorted(infos.items()):
            if not isinstance(info.get("size"), int):
                raise RemoteError(f"{at}: the server does not say how long it is")
            if not (tag := tag_of(info)):  # what is kept of it would be used for ever
                why = "neither entity tag nor date, by which a change would show"
                raise RemoteError(f"{at}: the server gives {why}; serve it otherwise, or copy it")
            yield FileState(at, info["size"], tag)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = [file for files in pool.map(lambda n: [*found(n)], _series(path)) for file in files]
    if not files:
        raise RemoteError(f"{path}: no file matches")
    return tuple(files)


def missing_remote(path: str) -> str | None:
    """Say why an address cannot be read from here. None: its files are there."""
    try:
        look_up(path)
    except RemoteError as error:
        return str(error)
    return None


def _series(path: str) -> list[str]:
    """`a-{08..10}` is `a-08`, `a-09` and `a-10`."""
    if (found := _SERIES.search(path)) is None:
        return [path]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    before, after = path[: found.start()], path[found.end() :]
    return [before + number + rest for number in numbers for rest in _series(after)]


def _infos(path: str) -> dict[str, Any]:
    """Each file of a pattern, or the one, with what its service says of it."""
    system = file_system(path)
    if not glob.has_magic(path):
        return {path: system.info(path)}
    found = system.glob(path, detail=True)
    scheme = path.partition("://")[0]
    return {f"{scheme}://{name}": i for name, i in found.items() if i["type"] == "file"}


def tag_of(info: Mapping[str, Any]) -> str:
    """What a service changes with a file's contents; empty where it says nothing.

    Args:
        info: What fsspec says of the file.
    """
    return str(next((info[name] for name in _TAGS if info.get(name)), ""))


def file_system(path: str) -> Any:
    """The file system of an address, by fsspec; a process has one for all its threads.

    Raises:
        RemoteError: It is the hub's, which cannot be reached or may not be (`HF_HUB_OFFLINE`).
    """
    scheme = path.partition("://")[0]
    if scheme == "hf" and is_offline():
        raise RemoteError(f"{path}: HF_HUB_OFFLINE is set, or the hub cannot be reached")
    return _file_system(os.getpid(), scheme)


@cache
def _file_system(_process: int, scheme: str) -> Any:
    import fsspec  # which imports s3fs, gcsfs or huggingface_hub by the scheme

    # A listing that is some minutes old would hide that a file has changed.
    options: dict[str, Any] = {} if scheme == "hf" else {"use_listings_cache": False}
    if scheme.startswith("http"):
        from aiohttp import ClientTimeout

        silence = ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        options["client_kwargs"] = {"timeout": silence, "trust_env": True}
    return fsspec.filesystem(scheme, **options)


def tried(where: str, call: Callable[[], R]) -> R:
    """Call until it succeeds, or cannot.

    Args:
        where: Address, and bytes if any, for the message.
        call: Asks a service.

    Raises:
        RemoteError: All attempts failed, or another would fail as well.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except RemoteError:
            raise
        except Exception as error:  # the boundary around libraries that raise many kinds
            status = _status(error)
            if attempt == ATTEMPTS or _is_hopeless(where, error, status):
                raise RemoteError(f"{where}: {_told(error, status, attempt)}") from error
            wait = min(2.0**attempt / 4, _LONGEST_WAIT_S) * random.uniform(0.5, 1.5)
            logger.warning("%s: %s; again in %.1f s", where, type(error).__name__, wait)
            time.sleep(wait)
    raise AssertionError(where)


def _status(error: BaseException) -> int | None:
    """The server's answer, where there was one."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        status = getattr(one, "status", getattr(response, "status_code", None))
        if isinstance(status, int):
            return status
    return None


def _is_hopeless(where: str, error: Exception, status: int | None) -> bool:
    if status is not None:
        return 400 <= status < 500 and status not in _ASK_AGAIN
    if isinstance(error, FileNotFoundError) and where.startswith("http"):
        return False  # fsspec says so of any server that does not answer
    return isinstance(error, _HOPELESS) or type(error).__name__ in _HOPELESS_NAMES


def _told(error: Exception, status: int | None, attempts: int) -> str:
    if status == 412 or type(error).__name__ == "FileExpired":
        return CHANGED
    if isinstance(error, ImportError):
        return f"{error}; pip install 'llm2clip-vlm[remote]'"
    refused = isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
    hint = ""
    if refused or status in (401, 403):
        hint = "; set the credentials in the environment (docs/data-formats.md)"
    elif isinstance(error, FileNotFoundError) and status in (None, 404, 410):
        hint = "; no such file: correct the path"
    answer = f" (status {status})" if status else ""
    tries = f" after {attempts} tries" if attempts > 1 else ""
    return f"{type(error).__name__}{answer}: {error}{tries}{hint}"
