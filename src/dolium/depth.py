"""The ground: recursion as deep as the folders that a container makes, on a stack of our own and not on Python's.

A function that would call itself is a generator, and says ``result = yield itself(...)`` instead; what ``with`` and
``finally`` promise holds as ever.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar

_T = TypeVar("_T")
Steps: TypeAlias = Generator[Any, Any, _T]


def run(work: Steps[_T]) -> _T:
    """The result of the outermost one. Raises what it, or one below it, raises."""
    stack: list[Steps[Any]] = [work]
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            inner = stack[-1].send(value) if failure is None else stack[-1].throw(failure)
        except StopIteration as end:
            stack.pop()
            value, failure = end.value, None
            if not stack:
                result: _T = end.value
                return result
        except BaseException as error:
            stack.pop()
            value, failure = None, error
            if not stack:
                raise
        else:
            stack.append(inner)
            value = failure = None
