"""A function with one line of its source changed."""

from __future__ import annotations
import __future__

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any


def edited(function: Callable[..., Any], old: str, new: str) -> FunctionType:
    """The function with `old`, which must occur exactly once in its source, replaced by `new`; without decorators."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        msg = f"{function.__qualname__} must have {old!r} once in its source, got it {source.count(old)} times"
        raise ValueError(msg)
    tree = ast.parse(source.replace(old, new))
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
