"""The ground: every step of a start is timed by the context manager that names it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Phases of one operation, in the order they ended; milliseconds."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block; the phase is recorded whether the block returns or raises."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter_ns() - start) / 1e6)

    def add(self, name: str, milliseconds: float) -> None:
        """Record a phase that was measured elsewhere (the executor's operations)."""
        self.phases.append((name, milliseconds))

    def as_dict(self) -> dict[str, float]:
        """Phase to milliseconds, phases of one name added up, in order of first appearance."""
        sums: dict[str, float] = {}
        for name, milliseconds in self.phases:
            sums[name] = round(sums.get(name, 0.0) + milliseconds, 3)
        return sums
