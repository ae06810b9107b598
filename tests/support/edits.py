"""A function with one line of its source changed."""

from __future__ import annotations
import __future__

import ast
import contextlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any


def occurrences(source: str, quoted: str) -> list[tuple[int, int]]:
    """Where `quoted` begins and ends in `source`, however either is wrapped and indented.

    White space is not compared, nor is the comma that a formatter puts behind the last of several lines.
    """
    kept, places = _unwrapped(source)
    wanted, _ = _unwrapped(quoted)
    starts = (found.start() for found in re.finditer(f"(?={re.escape(wanted)})", kept))
    return [(places[start], places[start + len(wanted) - 1] + 1) for start in starts]


def _unwrapped(source: str) -> tuple[str, list[int]]:
    """The characters that are compared, and where they are."""
    kept = [(found.group(), found.start()) for found in re.finditer(r",(?!\s*[)\]}])|[^\s,]", source)]
    return "".join(character for character, _ in kept), [place for _, place in kept]


def edited(function: Callable[..., Any], old: str, new: str) -> FunctionType:
    """The function with `old`, which must occur exactly once in its source, replaced by `new`; without decorators.

    White space in `old` does not matter, see `occurrences`.
    """
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    found = occurrences(source, old)
    if len(found) != 1:
        msg = f"{function.__qualname__} must have {old!r} once in its source, got it {len(found)} times"
        raise ValueError(msg)
    start, end = found[0]
    tree = ast.parse(source[:start] + new + source[end:])
    definition = tree.body[0]
    definition.decorator_list = []
    code = compile(tree, f"<{function.__qualname__}, edited>", "exec", __future__.annotations.compiler_flag, True)
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    return namespace[definition.name]


@contextlib.contextmanager
def edit(function: Callable[..., Any], old: str, new: str) -> Iterator[None]:
    """Change the function in place, for every module that holds it, until the block ends."""
    target, changed = inspect.unwrap(function), edited(function, old, new)
    parts = ("__code__", "__defaults__", "__kwdefaults__")
    original = [getattr(target, part) for part in parts]
    try:
        for part in parts:
            setattr(target, part, getattr(changed, part))
        yield
    finally:
        for part, value in zip(parts, original, strict=True):
            setattr(target, part, value)
