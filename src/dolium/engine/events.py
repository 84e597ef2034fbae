"""Events: what happened, to whom, when; kept in memory for late readers, as Docker does."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

KEPT = 1024


@dataclass(frozen=True, slots=True)
class Event:
    """``kind``: container, image, network, volume, daemon. ``action``: Docker's word. ``time_ns``: since 1970."""

    kind: str
    action: str
    actor: str
    attributes: dict[str, str] = field(default_factory=dict)
    time_ns: int = 0


class Bus:
    """Publishes to subscribers on the daemon's loop. A subscriber that never reads is dropped when its queue is full."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._queues: set[asyncio.Queue[Event | None]] = set()
        self._listeners: list[Callable[[Event], None]] = []

    def publish(self, kind: str, action: str, actor: str, attributes: dict[str, str] | None = None) -> Event:
        """Tell everyone; returns the event."""
        event = Event(kind, action, actor, attributes or {}, time.time_ns())
        self._kept.append(event)
        for listener in self._listeners:
            listener(event)
        for queue in list(self._queues):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._queues.discard(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)
        return event

    def subscribe(self) -> asyncio.Queue[Event | None]:
        """A queue of events from now on; None means: dropped, or the daemon ends."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(maxsize=4096)
        self._queues.add(queue)
        return queue

    def unsubscribe(self, queue: asyncio.Queue[Event | None]) -> None:
        """Idempotent."""
        self._queues.discard(queue)

    def since(self, time_ns: int) -> list[Event]:
        """Events kept from a time on."""
        return [event for event in self._kept if event.time_ns >= time_ns]

    def close(self) -> None:
        """End every subscription."""
        for queue in list(self._queues):
            if not queue.full():
                queue.put_nowait(None)
        self._queues.clear()
