"""Facts about the host, asked for by name and delivered from outside: the compiler opens no path itself. Cold module.

A missing fact raises Need; the caller (cold.py, a daemon, a test) fetches it and runs the pure function again.
"""

from __future__ import annotations

import posix

from dolium.errors import FailedPrecondition, NotFound, PermissionDenied

ENOENT, ESRCH, EACCES, ENOTDIR = 2, 3, 13, 20


class Need(Exception):
    """Facts that are missing: queries like ``read:/proc/self/cgroup``."""

    def __init__(self, queries: list[str]) -> None:
        super().__init__(", ".join(queries))
        self.queries = queries


class Facts:
    """What is known: query to ``[errno, data, ...]`` as the front sends it."""

    def __init__(self, known: dict[str, list[bytes]] | None = None) -> None:
        self.known = known if known is not None else {}

    def want(self, *queries: str) -> None:
        """Ask for several at once, so that one round brings them all."""
        missing = [query for query in queries if query not in self.known]
        if missing:
            raise Need(missing)

    def _get(self, query: str) -> tuple[int, list[bytes]]:
        if query not in self.known:
            raise Need([query])
        answer = self.known[query]
        return int(answer[0]), answer[1:]

    def read(self, path: str) -> bytes | None:
        """Content of a regular file, None when it is absent. Raises on any other failure."""
        number, data = self._get(f"read:{path}")
        if number in (ENOENT, ESRCH, ENOTDIR):
            return None
        _check(number, "read", path)
        return data[0]

    def stdin(self) -> bytes:
        """All of the caller's standard input. Raises when it cannot be read."""
        number, data = self._get("stdin:")
        _check(number, "read", "standard input")
        return data[0]

    def real(self, path: str) -> str:
        """The path with every link resolved. Raises NotFound."""
        number, data = self._get(f"real:{path}")
        _check(number, "resolve", path)
        return data[0].decode("utf-8", "surrogateescape")

    def stat(self, path: str) -> tuple[int, int, int, int] | None:
        """(mode, uid, gid, device number of a device node), None when absent."""
        number, data = self._get(f"stat:{path}")
        if number in (ENOENT, ENOTDIR):
            return None
        _check(number, "stat", path)
        mode, uid, gid, device = (int(part) for part in data[0].split())
        return mode, uid, gid, device

    def list(self, path: str) -> list[str]:
        """Sorted names in a folder; empty when it is absent, or none."""
        number, data = self._get(f"list:{path}")
        if number in (ENOENT, ENOTDIR):
            return []
        _check(number, "list", path)
        return sorted(name.decode("utf-8", "surrogateescape") for name in data)

    def program(self, name: str, env: dict[str, str]) -> str | None:
        """Where a program lies in the caller's PATH; None when nowhere."""
        for folder in (env.get("PATH") or "/usr/bin:/bin").split(":"):
            try:
                if folder.startswith("/") and self.stat(f"{folder}/{name}") is not None:
                    return f"{folder}/{name}"
            except (FailedPrecondition, PermissionDenied):  # a folder that is another's
                continue
        return None


def _check(number: int, what: str, path: str) -> None:
    if number == ENOENT:
        raise NotFound(f"{what} {path}: no such file or directory", errno=number)
    if number == EACCES:
        raise PermissionDenied(f"{what} {path}: permission denied", errno=number)
    if number:
        raise FailedPrecondition(f"{what} {path}: {posix.strerror(number)}", errno=number)
