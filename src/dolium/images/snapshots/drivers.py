"""The drivers by name."""

from __future__ import annotations

from pathlib import Path

from dolium.errors import InvalidArgument
from dolium.images.snapshots.base import Snapshotter
from dolium.images.snapshots.erofs import ErofsLayers
from dolium.images.snapshots.layers import FolderLayers
from dolium.images.snapshots.native import NativeSnapshotter
from dolium.images.snapshots.overlay import OverlaySnapshotter

DRIVERS = ("overlay", "native", "erofs")


def make_snapshotter(name: str, root: Path) -> Snapshotter:
    """A driver under a data folder: overlay and native share the unpacked layers. Raises InvalidArgument."""
    if name == "overlay":
        return OverlaySnapshotter(FolderLayers(root / "snapshots"))
    if name == "native":
        return NativeSnapshotter(FolderLayers(root / "snapshots"))
    if name == "erofs":
        return OverlaySnapshotter(ErofsLayers(root / "snapshots-erofs"), name)
    raise InvalidArgument(f"there is no snapshotter {name!r}", hint=f"one of {', '.join(DRIVERS)}")
