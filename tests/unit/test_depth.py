"""Recursion without Python's stack: results, failures, and what `with` and `finally` promise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest

from dolium import depth


def count(left: int, closed: list[int]) -> depth.Steps[int]:
    try:
        return 0 if left == 0 else 1 + (yield count(left - 1, closed))
    finally:
        closed.append(left)


def test_deeper_than_python_goes() -> None:
    closed: list[int] = []
    deep = sys.getrecursionlimit() * 10
    assert depth.run(count(deep, closed)) == deep
    assert closed == list(range(deep + 1))  # the innermost one first


@contextlib.contextmanager
def noted(name: int, said: list[str]) -> Iterator[None]:
    try:
        yield
    except KeyError:
        said.append(f"failed {name}")
        raise
    finally:
        said.append(f"closed {name}")


def failing(left: int, said: list[str]) -> depth.Steps[str]:
    with noted(left, said):
        if left == 0:
            raise KeyError("x")
        try:
            yield failing(left - 1, said)
        except KeyError:
            if left != 2:
                raise
            return "caught"
    return "not reached"


def test_failures_go_up_and_may_be_caught() -> None:
    said: list[str] = []
    assert depth.run(failing(2, said)) == "caught"
    assert said == ["failed 0", "closed 0", "failed 1", "closed 1", "closed 2"]
    with pytest.raises(KeyError):
        depth.run(failing(1, []))
