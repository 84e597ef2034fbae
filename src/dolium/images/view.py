"""What is told of an image: the engine's and the commands' view of a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dolium.images.manifest import ImageConfig
from dolium.images.platform import Platform
from dolium.images.records import ImageRecord
from dolium.images.reference import Reference


@dataclass(frozen=True, slots=True)
class Image:
    """An image at the time of asking.

    ``size`` is the sum of its unpacked files, ``content_size`` that of its blobs, both in bytes and with shared layers
    counted in full. ``repo_tags`` and ``repo_digests`` are familiar names, sorted. ``digest`` is the manifest's.
    """

    id: str
    digest: str
    platform: Platform
    created: str
    size: int
    content_size: int
    chain_ids: tuple[str, ...]
    diff_ids: tuple[str, ...]
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """One line of ``docker history``, newest first: ``id`` is the image's for the first line, else ``<missing>``."""

    id: str
    created: str
    created_by: str
    size: int
    comment: str
    tags: tuple[str, ...]


def image(record: ImageRecord, names: Sequence[Reference], sizes: Mapping[str, int]) -> Image:
    """A record with its names; ``sizes`` by chain ID."""
    return Image(
        id=record.id, digest=record.manifest, platform=Platform.parse(record.platform), created=record.created,
        size=sum(sizes.get(chain, 0) for chain in record.chains()),
        content_size=record.config_size + sum(layer.size for layer in record.layers),
        chain_ids=record.chains(), diff_ids=tuple(layer.diff_id for layer in record.layers),
        repo_tags=tuple(name.familiar() for name in names if name.tag),
        repo_digests=tuple(name.familiar() for name in names if name.digest),
    )


def history(
    record: ImageRecord, config: ImageConfig, sizes: Mapping[str, int], tags: tuple[str, ...]
) -> list[HistoryLine]:
    """The lines of ``docker history``, newest first; ``sizes`` by chain ID."""
    chains = iter(record.chains())
    lines = []
    for entry in config.history:
        chain = None if entry.empty_layer else next(chains, None)
        size = sizes.get(chain, 0) if chain else 0
        lines.append(HistoryLine("<missing>", entry.created, entry.created_by, size, entry.comment, ()))
    lines += [HistoryLine("<missing>", "", "", sizes.get(chain, 0), "", ()) for chain in chains]
    if lines:
        lines[-1] = replace(lines[-1], id=record.id, tags=tags)
    return lines[::-1]
