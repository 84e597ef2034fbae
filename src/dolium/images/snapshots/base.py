"""What a snapshot driver offers. The words:

- a *layer* is named by its chain ID: unpacked once, never written again, shared by images;
- a *snapshot* is a container's own writable part, named by a key of the engine's (the container's ID);
- a *root fs* is what the executor attaches: the layers top to bottom, with the snapshot on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a root fs is mounted.

    ``lower``: a folder in place of the layers ("": the layers). ``lowest``: a folder below all layers, with mount points
    that images lack. ``volatile``: what is written need not outlive a power cut. ``user_namespace``: an fd; the layers'
    owners are shown as it maps them (-1: as they are).
    """

    lower: str = ""
    lowest: str = ""
    volatile: bool = False
    user_namespace: int = -1


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space: ``size`` in bytes as allocated, ``inodes`` counted once per hard-linked file."""

    size: int
    inodes: int


class Layers(Protocol):
    """The layers' half. Calls block for file system work but ``remove_layer``, which only renames."""

    @property
    def root(self) -> Path:
        """The directory all of it lies in, on one file system."""

    def has_layer(self, chain_id: str) -> bool:
        """True when the layer is complete."""

    def begin_layer(self, name: str) -> Path:
        """An empty directory to unpack into; ``name`` only helps people who look."""

    def commit_layer(self, chain_id: str, prepared: Path) -> None:
        """Make a prepared directory the layer. When the layer appeared meanwhile, drop the directory."""

    def abort_layer(self, prepared: Path) -> None:
        """Drop a prepared directory."""

    def remove_layer(self, chain_id: str) -> None:
        """Remove a layer nobody references; nothing happens when it is not there."""

    def layers(self) -> list[str]:
        """Chain IDs of all complete layers."""


class Snapshotter(Layers, Protocol):
    """The interface. Calls block for file system work but ``remove``, which only renames."""

    @property
    def name(self) -> str:
        """As ``--snapshotter`` has it."""

    def prepare(self, key: str, chain_ids: Sequence[str], *, owner: tuple[int, int] = (0, 0), size: int = 0) -> None:
        """Make a snapshot on top of layers (bottom first; none gives an empty root).

        ``owner`` is what root of the container's user namespace is mapped to; ``size``: bytes it may take, 0 for no limit.
        Raises AlreadyExists, NotFound, FailedPrecondition when nothing here can hold it to a size.
        """

    def rename(self, key: str, new: str) -> None:
        """Give a snapshot another key; a mount of it goes on. Raises AlreadyExists, NotFound."""

    def mount(self, key: str, chain_ids: Sequence[str], options: MountOptions) -> int:
        """An fd of the root fs of a snapshot made before, as a detached mount; closing the last fd of it unmounts it. One at
        a time. Raises NotFound, FailedPrecondition, OSError."""

    def written(self, key: str) -> AbstractContextManager[Path | None]:
        """What the container changed, in overlayfs's form (whiteouts, opaque folders), for reading while it is held; None
        when the driver keeps the whole root instead. Raises NotFound."""

    def image(self, chain_ids: Sequence[str], options: MountOptions) -> AbstractContextManager[int]:
        """The layers without a snapshot, as an fd of a folder that is read while it is held. Takes as long as ``prepare``.
        Raises NotFound, OSError."""

    def view(self, key: str, chain_ids: Sequence[str], options: MountOptions) -> AbstractContextManager[int]:
        """A snapshot's root as an fd of a folder that is read while it is held, also while the container has it mounted and
        writes: without what is mounted in it. Raises NotFound, OSError."""

    def layer_folder(self, chain_id: str) -> AbstractContextManager[Path]:
        """A layer as a folder in overlayfs's form, read while it is held. Raises NotFound, OSError."""

    def remove(self, key: str) -> None:
        """Remove a snapshot that is not mounted; nothing happens when it is not there."""

    def usage(self, key: str) -> Usage:
        """What the snapshot itself takes, shared layers not counted. Raises NotFound."""

    def hurry(self) -> None:
        """Room is wanted: delete at once what was removed."""

    def active(self) -> list[str]:
        """Keys of all snapshots."""

    def recover(self) -> None:
        """Drop what a dead process left half made or half removed. Called before anything else."""

    def close(self) -> None:
        """Wait until what was removed is gone from the disk."""
