"""What a snapshot driver offers. The words:

- a *layer* is a directory named by its chain ID: unpacked once, never written again, shared by images;
- a *snapshot* is a container's own writable part, named by a key of the engine's (the container's ID);
- a *root fs* is what the executor mounts: the layers top to bottom, with the snapshot on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Rootfs:
    """The parts of an overlay mount. ``lowerdirs`` is top first, never empty. Nothing is mounted yet."""

    lowerdirs: tuple[Path, ...]
    upper: Path
    work: Path


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space: ``size`` in bytes as allocated, ``inodes`` counted once per hard-linked file."""

    size: int
    inodes: int


class Snapshotter(Protocol):
    """The interface. Calls block for file system work but ``remove`` and ``remove_layer``, which only rename."""

    @property
    def root(self) -> Path:
        """The directory all of it lies in, on one file system."""

    def has_layer(self, chain_id: str) -> bool:
        """True when the layer is complete."""

    def begin_layer(self, name: str) -> Path:
        """An empty directory to unpack into; ``name`` only helps people who look."""

    def commit_layer(self, chain_id: str, prepared: Path) -> None:
        """Make a prepared directory the layer, by rename. When the layer appeared meanwhile, drop the directory."""

    def abort_layer(self, prepared: Path) -> None:
        """Drop a prepared directory."""

    def remove_layer(self, chain_id: str) -> None:
        """Remove a layer nobody references; nothing happens when it is not there."""

    def layers(self) -> list[str]:
        """Chain IDs of all complete layers."""

    def prepare(self, key: str, chain_ids: Sequence[str], *, owner: tuple[int, int] = (0, 0)) -> Rootfs:
        """Make a snapshot on top of layers (bottom first; none gives an empty root).

        ``owner`` is what root of the container's user namespace is mapped to. Raises AlreadyExists, NotFound.
        """

    def rename(self, key: str, new: str) -> None:
        """Give a snapshot another key; a mount of it goes on. Raises AlreadyExists, NotFound."""

    def rootfs(self, key: str, chain_ids: Sequence[str]) -> Rootfs:
        """The root fs of a snapshot made before. Raises NotFound."""

    def remove(self, key: str) -> None:
        """Remove a snapshot that is not mounted; nothing happens when it is not there."""

    def usage(self, key: str) -> Usage:
        """What the snapshot itself takes, layers not counted. Raises NotFound."""

    def hurry(self) -> None:
        """Room is wanted: delete at once what was removed."""

    def active(self) -> list[str]:
        """Keys of all snapshots."""

    def recover(self) -> None:
        """Drop what a dead process left half made or half removed. Called before anything else."""

    def close(self) -> None:
        """Wait until what was removed is gone from the disk."""
