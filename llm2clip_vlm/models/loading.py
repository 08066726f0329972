"""Loading weights completely, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging


def load_complete(
    model_class: Any,
    path: str | Path,
    *,
    optional: str | None = None,
    error: type[ValueError] = ValueError,
    **arguments: Any,
) -> Any:
    """`from_pretrained` that refuses missing weights, where transformers only warns.

    Args:
        model_class: A transformers class.
        path: Directory or hub id. Where `state_dict` is among the arguments nothing is read from
            it: it is for messages only.
        optional: Weights below this prefix may be missing.
        error: What is raised.
        **arguments: Of `from_pretrained`.

    Returns:
        The model. Weights that it has no use for are not mentioned.

    Raises:
        ValueError: (or `error`) The weights cannot be read, are missing, or have another shape.
    """
    source = None if "state_dict" in arguments else path
    try:
        with _no_load_report():
            model, found = model_class.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
    except (OSError, RuntimeError, ValueError) as failure:
        raise error(f"{path}: cannot be loaded as {model_class.__name__} ({failure})") from failure
    wrong = [*map(str, found["missing_keys"]), *map(str, found.get("mismatched_keys", ()))]
    wrong = sorted(name for name in wrong if not (optional and name.startswith(optional)))
    if wrong:
        raise error(
            f"{path}: {len(wrong)} weights of {type(model).__name__} are missing or of another "
            f"shape (first: {wrong[:3]}); they would have stayed random. Is the checkpoint "
            "complete, and of this architecture?"
        )
    return model


@contextmanager
def _no_load_report() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
