"""Restart policies: which ended container starts again, and when. Back-off doubles from 100 ms to a minute."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from dolium.engine import model
from dolium.engine.model import Container
from dolium.errors import DoliumError, NotFound

if TYPE_CHECKING:
    from dolium.engine.containers import Containers

_log = logging.getLogger(__name__)
FIRST_DELAY, LAST_DELAY = 0.1, 60.0
STEADY = 10.0  # seconds of running after which the back-off starts anew


def wants_restart(policy: dict[str, object], exit_code: int, restart_count: int, stopped_by_user: bool) -> bool:
    """Docker's rules for a container that has ended. Pure."""
    name = str(policy.get("Name") or "no")
    if stopped_by_user:
        return False
    if name in ("always", "unless-stopped"):
        return True
    if name == "on-failure" and exit_code != 0:
        limit = int(str(policy.get("MaximumRetryCount") or 0))
        return limit == 0 or restart_count < limit
    return False


def next_delay(previous: float, ran_seconds: float) -> float:
    """Seconds until the next start. Pure."""
    if ran_seconds >= STEADY or previous <= 0:
        return FIRST_DELAY
    return min(previous * 2, LAST_DELAY)


class Restarts:
    """Timers of the containers that wait for their next start."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._delays: dict[str, float] = {}

    def schedule(self, container: Container) -> bool:
        """Called when init is dead. True when it will start again."""
        policy = container.host_config.get("RestartPolicy") or {}
        if not wants_restart(policy, container.exit_code, container.restart_count, container.stopped_by_user):
            self._delays.pop(container.id, None)
            return False
        ran = max(container.finished_at - container.started_at, 0.0)
        delay = next_delay(self._delays.get(container.id, 0.0), ran)
        self._delays[container.id] = delay
        self._arm(container.id, delay)
        return True

    def _arm(self, identity: str, delay: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[identity] = loop.call_later(
            delay, lambda: self._containers.task(self._again(identity)))

    async def _again(self, identity: str) -> None:
        engine = self._containers._engine
        async with engine.lock(identity):
            if self._timers.pop(identity, None) is None:
                return
            container = engine.containers.get(identity)
            if container is None or container.live:
                return
            container.restart_count += 1
            container.stopped_by_user = False  # what `always` brings back with a new daemon is as any other
            try:
                await self._containers.launch(container)
            except DoliumError as error:
                _log.warning("restart of container %s: %s", container.name, error)
                container.finished_at = container.started_at = time.time()
                container.status = model.RESTARTING if self.schedule(container) else model.EXITED
                with contextlib.suppress(NotFound):
                    engine.record(container)

    def resume(self, container: Container) -> None:
        """After a restart of the daemon: start it soon."""
        self._arm(container.id, FIRST_DELAY)

    def forget(self, identity: str) -> bool:
        """Cancel a waiting start; True when there was one."""
        self._delays.pop(identity, None)
        timer = self._timers.pop(identity, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def close(self) -> None:
        """Cancel all timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
