"""/dev/shm of containers that share it (``--ipc shareable``): a tmpfs on the host, bound into each that joins.

It is mounted from its owner's start to its end; what a killed daemon leaves of a container that has ended goes with the
record of its end.
"""

from __future__ import annotations

import logging
import os

from dolium.errors import Internal
from dolium.linux import syscalls

_log = logging.getLogger(__name__)


class SharedMemory:
    """The mounts below one folder, named by their owners' ids."""

    def __init__(self, folder: str) -> None:
        """Use ``folder``, made if it is missing."""
        self._folder = folder
        os.makedirs(folder, mode=0o700, exist_ok=True)

    def path(self, owner: str) -> str:
        """Where a container's is, while it runs."""
        return f"{self._folder}/{owner}"

    def make(self, owner: str, size: int, ids: tuple[int, int]) -> None:
        """A new one of so many bytes, which belongs to root of the container (its host ids). Raises Internal."""
        self.remove(owner)
        try:
            os.mkdir(self.path(owner), 0o700)
            syscalls.mount_tmpfs(self.path(owner), size, 0o1777, ids)
        except OSError as error:
            raise Internal(f"mount the shared /dev/shm of container {owner[:12]}: {error.strerror}",
                           errno=error.errno) from error

    def remove(self, owner: str) -> None:
        """Unmount it; who has it bound keeps it. Idempotent; what cannot be done is logged, and done at the next start."""
        path = self.path(owner)
        if os.path.isdir(path):
            try:
                syscalls.unmount(path)
                os.rmdir(path)
            except OSError as error:
                _log.warning("remove the shared /dev/shm of container %s: %s", owner[:12], error)

    def owners(self) -> list[str]:
        """Ids of the containers that have one."""
        return os.listdir(self._folder)
