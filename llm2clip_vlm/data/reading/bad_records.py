"""Counting records that cannot be used: each named, listed in a file, and too many of them refused.

A loader's workers, the processes of a run and a run that resumes all meet the same bad image; the
file beside the run (`dropped.jsonl`) is what they share, so that each record counts once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, Self

from llm2clip_vlm.distributed import barrier, is_main

logger = logging.getLogger(__name__)

_EXAMPLES_KEPT = 5
_SHOWN_CHARS = 400  # of a place or a reason: a data file may hold megabytes where a name belongs
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+|\(.*\)| below \S+")


class RecordError(ValueError):
    """A data file or one of its rows cannot be used."""


class Refusals(Protocol):
    """Takes what cannot be used."""

    def add(self, where: str, why: str, absent: Path | None = None) -> None:
        """Names one record and the reason; `absent` is a file that was not there."""


@dataclass
class Refused:
    """Collects bad records; whether there are too many is decided when all are known."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """`(where, why)`."""
    absent: list[str] = field(default_factory=list)
    """Files that were not there; with one of them a record may be a good one."""

    @property
    def first(self) -> str:
        """The first, for a message."""
        return ": ".join(self.rows[0]) if self.rows else "missing: the file is empty"

    def add(self, where: str, why: str, absent: Path | None = None) -> None:
        """Keeps one."""
        self.rows.append((where, why))
        self.absent += [str(absent)] * (absent is not None)


@dataclass
class BadRecords:
    """Counts records that are skipped, names each, and stops when there are too many.

    A record that was counted, by this process or another that has the same ledger, does not count
    again.

    Example:
        >>> bad = BadRecords(limit=1)
        >>> bad.add("pairs.jsonl:3", "empty caption")
        >>> bad.count
        1
    """

    limit: int = 0
    """Bad records allowed; one more raises. A recipe's `max_bad_records`."""
    fraction: float = 0.0
    """Share of :attr:`total` that is allowed too, where that is more (`max_bad_fraction`)."""
    ledger: Path | None = None
    """File that lists them (`dropped.jsonl`), appended to under a lock. None: in memory alone."""
    total: int = 0
    """Records met so far, good and bad; see :meth:`take`."""
    _reasons: dict[str, str] = field(default_factory=dict, repr=False)
    _read_to: int = field(default=0, repr=False)

    @classmethod
    def beside(cls, directory: str | Path, limit: int, fraction: float, *, resumes: bool) -> Self:
        """Count for a run, in `dropped.jsonl` of its directory. Call it on all ranks.

        Args:
            directory: The run's output.
            limit: See the field.
            fraction: See the field.
            resumes: Keep what the interrupted run listed; otherwise the list begins anew.
        """
        ledger = Path(directory) / "dropped.jsonl"
        if is_main() and not resumes:
            ledger.unlink(missing_ok=True)
        barrier()
        return cls(limit, fraction, ledger)

    @property
    def allowed(self) -> int:
        """Number of bad records allowed among the records met so far."""
        return max(self.limit, int(self.fraction * self.total))

    @property
    def count(self) -> int:
        """Bad records so far, those of other processes too."""
        if self.ledger is not None and self.ledger.is_file():
            with self.ledger.open("rb") as handle:
                self._refresh(handle)
        return len(self._reasons)

    @property
    def examples(self) -> list[str]:
        """The first few, as `where: why`."""
        return [f"{where}: {why}" for where, why in list(self._reasons.items())[:_EXAMPLES_KEPT]]

    def take(self, records: int, refused: Sequence[tuple[str, str]]) -> None:
        """Counts what the reading of a source found, all of it before anything is said.

        Args:
            records: Good and bad ones.
            refused: `(where, why)` of the bad ones.

        Raises:
            RecordError: See :meth:`add`.
        """
        self.total += records
        with self._shared() as handle:
            clean = {printable(where): printable(why) for where, why in refused}
            new = {where: why for where, why in clean.items() if where not in self._reasons}
            for where, why in new.items():
                self._reasons[where] = why
                if handle is None or len(self._reasons) <= _EXAMPLES_KEPT:
                    logger.warning("bad record %s: %s", where, why)
            too_many = bool(new) and len(self._reasons) > self.allowed
            rows: list[dict[str, Any]] = [{"where": at, "why": why} for at, why in new.items()]
            if too_many:
                rows[-1]["stopped_the_run"] = True
            if handle is not None:
                handle.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        if too_many:
            of = f" of {self.total} records" if self.total else ""
            raise RecordError(
                f"{len(self._reasons)} bad record(s), {self.allowed} allowed{of}; the last is "
                f"{where}: {why}. {self._by_reason()}Repair the file, filter the row out (`where`, "
                "`drop_where`) or raise `max_bad_records`"
            )

    def add(self, where: str, why: str, absent: Path | None = None) -> None:
        """Counts one bad record.

        Args:
            where: The file and row, such as `pairs.jsonl:12`; unique to the record.
            why: What is wrong with it.
            absent: Not used; see :class:`Refused`.

        Raises:
            RecordError: More records are bad than `limit` and `fraction` allow.
        """
        self.take(0, [(where, why)])

    def summary(self) -> str:
        """One line for a stage to print: how many were skipped, and the first few of them."""
        if not self.count:
            return "no bad records"
        hidden = len(self._reasons) - len(self.examples)
        more = f"; and {hidden} more. {self._by_reason()}" if hidden else ""
        return f"{len(self._reasons)} bad record(s) skipped: {'; '.join(self.examples)}{more}"

    @contextmanager
    def _shared(self) -> Iterator[IO[bytes] | None]:
        """Lock the ledger, and take in what other processes have written."""
        if self.ledger is None:
            yield None
            return
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.ledger.open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._refresh(handle)
            handle.truncate(self._read_to)  # half a line that a killed process left
            yield handle
            handle.flush()
            self._read_to = handle.tell()

    def _refresh(self, handle: IO[bytes]) -> None:
        handle.seek(max(self._read_to - 1, 0))
        if handle.read(1) != b"\n":  # another slice of stage 2a has begun it anew
            self._read_to = 0
        handle.seek(self._read_to)
        lines = handle.read()
        lines = lines[: lines.rfind(b"\n") + 1]  # another process may be at the last one
        self._read_to += len(lines)
        for row in map(json.loads, lines.splitlines()):
            # a run that is started again stops at the same record, unless more are allowed now
            if not row.get("stopped_the_run"):
                self._reasons[row["where"]] = row["why"]

    def _by_reason(self) -> str:
        if len(self._reasons) <= _EXAMPLES_KEPT:
            return ""
        kinds = Counter(_PARTICULARS.sub("*", why) for why in self._reasons.values())
        listed = "; ".join(f"{n} x {why}" for why, n in kinds.most_common(4))
        return f"By reason: {listed}. "


def printable(text: str) -> str:
    """A text of a data file as a log may show it: on one line, nothing hidden, and not too long.

    Half characters would stop whoever prints them, escape sequences would act on a terminal, and a
    line break would begin a line of the log.
    """
    if len(text) > _SHOWN_CHARS:  # the digest keeps different ones apart
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
        text = f"{text[:_SHOWN_CHARS]}... ({len(text)} characters, {digest})"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
