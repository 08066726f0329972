"""Chat templates are foreign code: rendered in transformers' sandbox, within a budget.

The sandbox knows no time and no size: two nested loops, or a text doubled forty times, would hold
or kill a run. So loops, assignments and calls pass by a clock, and products are measured before
they are made. No signal is needed: loader workers and threads have the budget, too.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

RENDER_LIMIT_S = 2.0
"""CPU seconds of one rendering."""
RENDER_LIMIT_CHARS = 16 * 2**20
"""Characters of a rendered text, and of each text or list on the way."""
_LOOK_S = 0.1
_LARGEST = 2**30
"""Largest number, and largest product of the lengths that one call is given."""
_LONG_NUMBER = re.compile(r"\d{9,}")

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_thread = threading.local()


class RenderError(ValueError):
    """A template that raises, or that takes longer or writes more than its budget."""


def has_generation(template: str) -> bool:
    """Whether a template marks its answers."""
    return _GENERATION.search(template) is not None


def render_within_budget(
    template: str, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation, and the spans of its `{% generation %}` blocks.

    Args:
        template: Jinja source.
        messages: The conversation.
        arguments: What else the template may read.

    Raises:
        RenderError: The template raises whatever error, or goes beyond the budget.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    _thread.started, _thread.look_at = None, time.monotonic() + _LOOK_S
    try:
        compiled: Any = _compiled(template, threading.get_ident())
        names: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None}
        names |= {"add_generation_prompt": False, **arguments}
        length = 0
        with compiled.environment.activate_tracker(pieces, spans):
            for piece in compiled.generate(**names):
                pieces.append(piece)
                length += len(piece)
                _tick(range(length))
    except RenderError:
        raise
    except Exception as error:  # foreign code: the boundary around one record
        why = str(error)[:500].encode(errors="backslashreplace").decode()
        raise RenderError(f"{type(error).__name__}: {why}") from error
    return "".join(pieces), spans


@lru_cache(maxsize=16)
def _compiled(template: str, thread: int) -> Template:
    """Compile for one thread: the environment holds the tracker of generation blocks."""
    environment: Any = _cached_compile_jinja_template("").environment
    environment.__class__ = _Budgeted
    environment.globals["_tick"] = _tick
    del environment.globals["lipsum"]
    environment.filters |= {name: _measured(f) for name, f in environment.filters.items()}
    return environment.from_string(template)


def _tick(value: Any = None) -> Any:
    """Ends a rendering that takes too long, or whose values grow too large."""
    if (now := time.monotonic()) > _thread.look_at:  # thread_time() is a slow call
        _thread.look_at, spent = now + _LOOK_S, time.thread_time()
        _thread.started = spent if _thread.started is None else _thread.started
        if spent - _thread.started > RENDER_LIMIT_S:
            raise RenderError(f"it takes more than {RENDER_LIMIT_S:g} s of CPU time")
    if isinstance(value, str | list | tuple | range) and len(value) > RENDER_LIMIT_CHARS:
        raise RenderError(f"it writes more than {RENDER_LIMIT_CHARS} characters")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise RenderError(f"it computes a number above {_LARGEST}")
    return value


class _Budgeted(ImmutableSandboxedEnvironment):
    """Transformers' environment with a clock in loops, assignments, calls and operations."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for const in template.find_all(nodes.Const):
            if isinstance(const.value, str) and _LONG_NUMBER.search(const.value):
                raise RenderError(f"a text in it has a number of nine digits: {const.value[:80]!r}")
            _tick(const.value)
        for loop in template.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_ticking(nodes.Const(None))))
        for assign in template.find_all(nodes.Assign):
            assign.node = _ticking(assign.node)
        template.set_environment(self)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Measures products and powers before they are made."""
        if operator == "*":
            _measure((left, right))
        if operator == "**" and (abs(left) > 1 and abs(right) > 32):
            raise RenderError(f"it computes a number above {_LARGEST}")
        return _tick(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Measures arguments and result of a function, method or macro."""
        _measure((getattr(function, "__self__", None), *args, *kwargs.values()))
        return _tick(super().call(context, function, *args, **kwargs))


def _ticking(value: Any) -> Any:
    return nodes.Call(nodes.Name("_tick", "load"), [value], [], None, None)


def _measure(values: Iterable[Any]) -> None:
    """Refuses a call whose result could be as long as the product of what it is given."""
    product = 1
    for value in values:
        if isinstance(value, str | list | tuple):
            product *= max(len(value), 1)
        elif isinstance(value, int):
            product *= max(abs(value), 1)
    _tick(product)


def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter measure its arguments."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _measure((*args, *kwargs.values()))
        return _tick(function(*args, **kwargs))

    return run
