"""Layers as directories, in the form overlayfs reads.

    layers/HEX/fs               one layer, HEX of its chain ID
    layers/NAME.tmp-RANDOM/fs   being unpacked
    empty                       the lower directory of an image without layers: overlayfs wants one
    trash/                      renamed aside, deleted later
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dolium import faults
from dolium.errors import NotFound
from dolium.images.reference import check_digest
from dolium.linux import syscalls
from dolium.trash import Trash

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
faults.register("snapshot.layer.begun", "snapshot.layer.renamed", "snapshot.layer.removed")


@contextmanager
def mapped(folders: Sequence[str], user_namespace: int) -> Iterator[Sequence[str | int]]:
    """Mounts of the folders with owners as the user namespace maps them; the folders themselves without one (-1)."""
    if user_namespace < 0:
        yield folders
        return
    mounts: list[int] = []
    try:
        for folder in folders:
            mounts.append(syscalls.open_tree(folder))
            syscalls.set_idmap(mounts[-1], user_namespace)
        yield mounts
    finally:
        for mount in mounts:
            os.close(mount)


class FolderLayers:
    """Implements ``Layers`` under one directory, which one process writes."""

    content = "fs"
    """What a complete layer has in its folder."""

    def __init__(self, root: Path) -> None:
        """Use ``root``, made if it is missing."""
        self._root = root
        self._layers, self._empty = root / "layers", root / "empty"
        # Others must not reach set-user-id programs of layers through the host's paths.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self._layers, self._empty):
            path.mkdir(exist_ok=True)
        self.trash = Trash(str(root / "trash"))

    @property
    def root(self) -> Path:
        """See ``Layers``."""
        return self._root

    def path(self, chain_id: str) -> Path:
        """The layer's folder or file, whether it exists or not."""
        return self._layers / check_digest(chain_id).removeprefix("sha256:") / self.content

    def has_layer(self, chain_id: str) -> bool:
        """See ``Layers``."""
        return self.path(chain_id).exists()

    def begin_layer(self, name: str) -> Path:
        """See ``Layers``."""
        stem = name.removeprefix("sha256:")
        path = self._layers / f"{stem}.tmp-{secrets.token_hex(6)}" / "fs"
        path.parent.mkdir(mode=0o755)
        path.mkdir(mode=0o755)
        faults.point("snapshot.layer.begun")
        return path

    def commit_layer(self, chain_id: str, prepared: Path) -> None:
        """See ``Layers``."""
        target = self.path(chain_id).parent
        try:
            os.rename(prepared.parent, target)
        except OSError:
            if not self.has_layer(chain_id):
                raise
            self.abort_layer(prepared)
            return
        faults.point("snapshot.layer.renamed")

    def abort_layer(self, prepared: Path) -> None:
        """See ``Layers``."""
        self.trash.discard(str(prepared.parent))

    def remove_layer(self, chain_id: str) -> None:
        """See ``Layers``."""
        self.trash.discard(str(self.path(chain_id).parent))
        faults.point("snapshot.layer.removed")

    def layers(self) -> list[str]:
        """See ``Layers``."""
        return [f"sha256:{name}" for name in os.listdir(self._layers) if _HEX.fullmatch(name)]

    @contextmanager
    def lowers(self, chain_ids: Sequence[str], user_namespace: int = -1) -> Iterator[Sequence[str | int]]:
        """What overlayfs stacks, top first: folders, or fds of detached mounts for one use, with owners as the user
        namespace (an fd, or -1) maps them. Raises NotFound, OSError."""
        with mapped([str(path) for path in self.folders(chain_ids)], user_namespace) as found:
            yield found

    def folders(self, chain_ids: Sequence[str]) -> list[Path]:
        """The layers' folders, top first, never none. Raises NotFound."""
        paths = [self.path(chain_id) for chain_id in reversed(chain_ids)]
        for path in paths:
            if not path.exists():
                raise NotFound(f"layer sha256:{path.parent.name} is not unpacked")
        return paths or [self._empty]

    @contextmanager
    def layer(self, chain_id: str) -> Iterator[Path]:
        """See ``Layers``."""
        with self.lowers([chain_id]) as found:
            yield Path(f"/proc/self/fd/{found[0]}" if isinstance(found[0], int) else found[0])

    def recover(self) -> None:
        """Drop what was being unpacked, and go on deleting."""
        for name in os.listdir(self._layers):
            if not _HEX.fullmatch(name):
                self.trash.discard(str(self._layers / name))
        self.trash.recover()

    def close(self) -> None:
        """Wait until what was removed is gone from the disk."""
        self.trash.close()
