"""World existence questions in the columns that the scorers of lmms-eval's `pope` and `mme` read.

A result is the *pope scorer on world data*, never a POPE score.
"""

from __future__ import annotations

from typing import Any


def pope_docs(dataset: Any) -> Any:
    """Number the questions."""
    return dataset.add_column("question_id", [str(number) for number in range(len(dataset))])


def mme_docs(dataset: Any) -> Any:
    """Make MME's pairs of the questions with yes and with no, which follow each other."""
    paired = dataset.add_column("question_id", [str(row // 2) for row in range(len(dataset))])
    kinds = ["existence"] * len(dataset)
    return paired.remove_columns("category").add_column("category", kinds)
