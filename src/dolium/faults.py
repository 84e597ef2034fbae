"""Crash points: tests kill the process right after a side effect, and look at what the next start makes of it.

``DOLIUM_FAULT=NAME`` in the environment of a new process makes it end itself with SIGKILL the first time it passes the
point of that name. Names are ROOM.WHAT.HAPPENED; each is registered in ``POINTS``, so that tests can iterate them.
"""

from __future__ import annotations

import os
import signal

POINTS: set[str] = set()
"""Every point of every module that was imported."""

_wanted = os.environ.get("DOLIUM_FAULT", "")


def register(*names: str) -> None:
    """Announce a module's points; called once, when it is imported."""
    POINTS.update(names)


def point(name: str) -> None:
    """A side effect has just happened. Returns, unless this process was told to die here."""
    if name == _wanted:
        os.kill(os.getpid(), signal.SIGKILL)
