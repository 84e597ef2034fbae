"""What a sandbox reports of the programs in it, as events: the system calls its kernel does not have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dolium.errors import DoliumError

if TYPE_CHECKING:
    from dolium.engine.engine import Engine
    from dolium.engine.model import Container

POLL = 1.0
"""Seconds between looks at the file that a runtime writes its reports to."""
MOST = 200
"""Of one run: a program can ask for what is not there as often as it likes."""


class Reports:
    """Of the containers that run in sandboxes. On the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[str, set[str]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def begin(self, container: Container) -> None:
        """It runs. Nothing happens for one whose level reports nothing."""
        self.forget(container.id)
        if self._file(container):
            self._seen[container.id] = set()
            self._later(container)

    def _later(self, container: Container) -> None:
        self._timers[container.id] = asyncio.get_running_loop().call_later(POLL, self._again, container)

    def _again(self, container: Container) -> None:
        self.look(container)
        if container.live and container.id in self._timers:
            self._later(container)

    def look(self, container: Container) -> None:
        """Tell what is new."""
        seen = self._seen.get(container.id)
        if seen is None:
            return
        try:
            found = self._engine.backend(container).unsupported(self._file(container))
        except DoliumError:
            return  # its runtime has been taken away
        for name, text in found:
            if name not in seen and len(seen) < MOST:
                seen.add(name)
                self._engine.event(container, "unsupported-syscall", syscall=name, message=text)

    def forget(self, identity: str) -> None:
        """It runs no more. Idempotent."""
        self._seen.pop(identity, None)
        timer = self._timers.pop(identity, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Look no more."""
        for identity in list(self._timers):
            self.forget(identity)

    def _file(self, container: Container) -> str:
        try:
            name = self._engine.backend(container).report_file
        except DoliumError:
            return ""
        return f"{self._engine.paths.shim(container.id)}/{name}" if name else ""
