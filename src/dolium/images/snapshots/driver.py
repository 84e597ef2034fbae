"""What all drivers have in common: layers that are kept as they are unpacked, and a place for each snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dolium.images.snapshots.layers import FolderLayers
from dolium.images.snapshots.places import Places


class Driver:
    """Everything of ``Snapshotter`` but making, mounting and reading a snapshot."""

    def __init__(self, layers: FolderLayers) -> None:
        self._layers = layers
        self._places = Places(layers.root, layers.trash)
        self.has_layer, self.begin_layer, self.commit_layer = layers.has_layer, layers.begin_layer, layers.commit_layer
        self.abort_layer, self.remove_layer, self.layers = layers.abort_layer, layers.remove_layer, layers.layers

    @property
    def root(self) -> Path:
        """See ``Layers``."""
        return self._layers.root

    def rename(self, key: str, new: str) -> None:
        """See ``Snapshotter``."""
        self._places.rename(key, new)

    def remove(self, key: str) -> None:
        """See ``Snapshotter``."""
        self._places.remove(key)

    def hurry(self) -> None:
        """See ``Snapshotter``."""
        self._layers.trash.hurry()

    def active(self) -> list[str]:
        """See ``Snapshotter``."""
        return self._places.keys()

    def recover(self) -> None:
        """See ``Snapshotter``."""
        self._places.recover()
        self._layers.recover()

    def close(self) -> None:
        """See ``Snapshotter``."""
        self._places.close()
        self._layers.close()

    @contextmanager
    def layer_folder(self, chain_id: str) -> Iterator[Path]:
        """See ``Snapshotter``."""
        with self._layers.lowers([chain_id]) as (folder,):
            yield Path(folder if isinstance(folder, str) else f"/proc/self/fd/{folder}")

    def check(self, chain_ids: Sequence[str]) -> None:
        """Raises NotFound when a layer is missing."""
        self._layers.folders(chain_ids)
