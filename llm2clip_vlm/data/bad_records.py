"""Counting records that cannot be used: each named, listed in a file, and too many of them refused.

A loader's workers, the processes of a run and a run that resumes all meet the same bad image; the
file beside the run (`dropped.jsonl`) is what they share, so that each record counts once.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from llm2clip_vlm.distributed import barrier, is_main

logger = logging.getLogger(__name__)

_EXAMPLES_KEPT = 5
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+|\(.*\)| below \S+")


class RecordError(ValueError):
    """A data file or one of its rows cannot be used."""


class Refusals(Protocol):
    """Takes what cannot be used."""

    def add(self, where: str, why: str) -> None:
        """Names one record and the reason."""


@dataclass
class BadRecords:
    """Counts records that are skipped, names each, and stops when there are too many.

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
    """File that lists them (`dropped.jsonl`), appended to under a lock; a record that is in it
    already, by this process or another, does not count again. None = this object counts alone."""
    total: int = 0
    """Records met so far, good and bad; see :meth:`take`."""
    count: int = 0
    """Bad records so far."""
    examples: list[str] = field(default_factory=list)
    """The first few, as `where: why`."""
    _known: set[str] = field(default_factory=set, repr=False)
    _reasons: Counter[str] = field(default_factory=Counter, repr=False)
    _read_to: int = field(default=0, repr=False)

    @classmethod
    def beside(cls, directory: str | Path, limit: int, fraction: float, *, resumes: bool) -> Self:
        """For a run, with `dropped.jsonl` in its directory. Call it on all ranks.

        Args:
            directory: The run's output.
            limit: As the field.
            fraction: As the field.
            resumes: Keep what the interrupted run listed; otherwise the list begins anew.
        """
        ledger = Path(directory) / "dropped.jsonl"
        if is_main() and not resumes:
            ledger.unlink(missing_ok=True)
        barrier()
        return cls(limit, fraction, ledger)

    @property
    def allowed(self) -> int:
        """Bad records that the run bears, of the records met so far."""
        return max(self.limit, int(self.fraction * self.total))

    def take(self, records: int, refused: Sequence[tuple[str, str]]) -> None:
        """Counts what the reading of a source found, all of it before anything is said.

        Args:
            records: Good and bad ones.
            refused: `(where, why)` of the bad ones.

        Raises:
            RecordError: As :meth:`add`.
        """
        self.total += records
        self._count(refused)

    def add(self, where: str, why: str) -> None:
        """Counts one bad record.

        Args:
            where: The file and row, such as `pairs.jsonl:12`.
            why: What is wrong with it.

        Raises:
            RecordError: More records are bad than `limit` and `fraction` allow.
        """
        self._count([(where, why)])

    def _count(self, refused: Sequence[tuple[str, str]]) -> None:
        new = 0
        for pair in refused:
            # half characters would stop whoever prints or writes them
            where, why = (text.encode(errors="backslashreplace").decode() for text in pair)
            if self.ledger is None:
                self._note(where, why)
            elif not self._write(where, why):
                continue
            new += 1
            if self.count <= _EXAMPLES_KEPT or self.ledger is None:
                logger.warning("bad record %s: %s", where, why)
        if new and self.count > self.allowed:
            of = f" of {self.total} records" if self.total else ""
            raise RecordError(
                f"{self.count} bad record(s), {self.allowed} allowed{of}; the last is {where}: "
                f"{why}. {self._by_reason()}Repair the file, filter the row out (`where`, "
                "`drop_where`) or raise `max_bad_records`"
            )

    def refresh(self) -> None:
        """Takes in what other processes have written to the ledger."""
        if self.ledger is None or not self.ledger.is_file():
            return
        with self.ledger.open("rb") as handle:
            handle.seek(self._read_to)
            lines = handle.read()
        self._read_to += len(lines)
        for line in lines.splitlines():
            row = json.loads(line)
            if row["where"] not in self._known:
                self._known.add(row["where"])
                self._note(row["where"], row["why"])

    def summary(self) -> str:
        """One line for a stage to print: how many were skipped, and the first few of them."""
        self.refresh()
        if not self.count:
            return "no bad records"
        hidden = self.count - len(self.examples)
        more = f"; and {hidden} more. {self._by_reason()}" if hidden else ""
        return f"{self.count} bad record(s) skipped: " + "; ".join(self.examples) + more

    def _note(self, where: str, why: str) -> None:
        self.count += 1
        self._reasons[_PARTICULARS.sub("*", why)] += 1
        if len(self.examples) < _EXAMPLES_KEPT:
            self.examples.append(f"{where}: {why}")

    def _write(self, where: str, why: str) -> bool:
        """Append to the ledger; false where the record is in it."""
        assert self.ledger is not None
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.ledger.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.refresh()
            if where in self._known:
                return False
            handle.write(json.dumps({"where": where, "why": why}).encode() + b"\n")
            handle.flush()
            self.refresh()
        return True

    def _by_reason(self) -> str:
        if self.count <= _EXAMPLES_KEPT:
            return ""
        listed = "; ".join(f"{n} x {why}" for why, n in self._reasons.most_common(4))
        return f"By reason: {listed}. "
