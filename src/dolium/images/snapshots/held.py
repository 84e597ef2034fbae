"""A mounted file system that is nowhere in the tree of mounts, held open, of which copies are made for single uses."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from dolium.linux import syscalls


@dataclass(frozen=True, slots=True)
class HeldMount:
    """``fd``: the mount; ``kind`` and ``source`` (a device or file): the file system."""

    fd: int
    kind: str
    source: str
    read_only: bool

    @classmethod
    def make(cls, kind: str, source: str, *, read_only: bool = False, later: str = "") -> HeldMount:
        """Mount it. ``later``: another name of the source, for later. Raises OSError."""
        return cls(syscalls.mount_file_system(kind, source, read_only=read_only), kind, later or source, read_only)

    def copy(self) -> int:
        """An fd of one more mount of the same file system, the caller's. Raises OSError."""
        try:
            return syscalls.open_tree(self.fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # before Linux 6.15 a mount that is nowhere could not be copied
            return syscalls.mount_file_system(self.kind, self.source, read_only=self.read_only)

    def folder(self, path: str) -> int:
        """An fd of a detached mount of one of its folders, the caller's. Raises OSError."""
        try:
            return syscalls.open_tree(f"/proc/self/fd/{self.fd}/{path}")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        whole = self.copy()
        try:
            with syscalls.attached(whole) as place:
                return syscalls.open_tree(f"{place}/{path}")
        finally:
            os.close(whole)

    def close(self) -> None:
        """The file system is unmounted when nobody else has a mount of it."""
        os.close(self.fd)
