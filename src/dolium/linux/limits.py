"""The daemon's limit of open files: it takes all it may have, what it starts for containers gets what it was given itself.

As dockerd, whose runtime raises its own soft limit and gives programs it starts the old one: select(2) of an old program
breaks above 1024, and some close every number up to the limit.
"""

from __future__ import annotations

import resource


class OpenFiles:
    """One process's. ``raise_own`` is called once, at its start."""

    def __init__(self) -> None:
        """Note what was given."""
        self._given = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def raise_own(self) -> None:
        """The soft limit up to the hard one."""
        self._given, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def give_to(self, pid: int) -> None:
        """Let a child, and all it starts from then on, have the limit that was given. Raises ProcessLookupError."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (self._given, hard))


OPEN_FILES = OpenFiles()
