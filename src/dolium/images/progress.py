"""Progress of a pull or load, as events the API renders into Docker's JSON stream and the CLI into bars."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

_INTERVAL = 0.1


class Status(StrEnum):
    """The words of ``docker pull`` and ``docker push``, in the order a layer goes through them."""

    PULLING = "Pulling fs layer"
    DOWNLOADING = "Downloading"
    VERIFYING = "Verifying Checksum"
    DOWNLOADED = "Download complete"
    EXTRACTING = "Extracting"
    COMPLETE = "Pull complete"
    EXISTS = "Already exists"
    PREPARING = "Preparing"
    PUSHING = "Pushing"
    PUSHED = "Pushed"
    THERE = "Layer already exists"
    MOUNTED = "Mounted from"


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step. ``id`` is a layer's short digest, a tag, or empty for a line about the whole image.

    ``status`` is one of ``Status`` for layers, free text for lines. ``current`` and ``total`` are bytes; ``total`` is 0
    when there is nothing to measure. ``aux`` is for programs, with an empty status.
    """

    id: str
    status: str
    current: int = 0
    total: int = 0
    aux: Mapping[str, object] | None = None


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """The callback of a caller that does not want to know. Called from the event loop's thread only, as all are."""


def short_id(digest: str) -> str:
    """Twelve hexadecimal digits, as Docker shows layers and images."""
    return digest.removeprefix("sha256:")[:12]


class LayerProgress:
    """One layer's events, made from any thread, delivered in the event loop's, at most ten a second and status."""

    def __init__(self, progress: Progress, digest: str, loop: asyncio.AbstractEventLoop) -> None:
        """Events carry the short form of ``digest``."""
        self._progress = progress
        self._id = short_id(digest)
        self._loop = loop
        self._next = 0.0
        self._status = ""

    def __call__(self, status: str, current: int = 0, total: int = 0) -> None:
        """Report; dropped when the last one with this status is not a tenth of a second old and this is not the end."""
        now = time.monotonic()
        if status == self._status and now < self._next and current != total:
            return
        self._status, self._next = status, now + _INTERVAL
        self._loop.call_soon_threadsafe(self._progress, ProgressEvent(self._id, status, current, total))
