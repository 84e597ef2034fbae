"""``commit``: a writable layer's changes on top of an image become a new image."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from isal import isal_zlib

from dolium import faults
from dolium.images.content import ContentStore
from dolium.images.manifest import OCI_LAYER, Descriptor, ImageConfig, Manifest
from dolium.images.unpack import Cancelled
from dolium.units import rfc3339

_LEVEL = 1  # of igzip: twice as fast as 2 for a few percent
_GZIP = 31  # zlib's window bits for a gzip header; its time is 0, so that equal layers are equal blobs
Write = Callable[[bytes], object]
faults.register("commit.layer.written")


@dataclass(frozen=True, slots=True)
class Layer:
    """A new layer: its blob, its diff ID, the number of its entries."""

    descriptor: Descriptor
    diff_id: str
    entries: int


def write_layer(content: ContentStore, pack: Callable[[Write], int], cancel: threading.Event) -> Layer:
    """Store what ``pack`` writes, compressed. Blocks. Raises Cancelled, ResourceExhausted, and what ``pack`` raises."""
    compressor = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, _GZIP)
    plain = hashlib.sha256()
    with content.ingest(None) as ingest:
        def write(data: bytes) -> None:
            if cancel.is_set():
                raise Cancelled
            plain.update(data)
            ingest.write(compressor.compress(data))

        entries = pack(write)
        ingest.write(compressor.flush())
        digest = ingest.commit()
    faults.point("commit.layer.written")
    return Layer(Descriptor(f"{OCI_LAYER}+gzip", digest, ingest.offset), f"sha256:{plain.hexdigest()}", entries)


def config_document(
    base: ImageConfig, layer: Layer | None, settings: Mapping[str, object], *, author: str, message: str, command: str,
) -> bytes:
    """The new image's configuration: the base's with its own ``config``, one line of history, and the layer if there is
    one.
    """
    created = rfc3339(time.time())
    document = dict(base.raw)
    line: dict[str, object] = {"created": created, "created_by": command}
    line |= {key: value for key, value in (("author", author), ("comment", message)) if value}
    if layer is None:
        line["empty_layer"] = True
    history = document.get("history")
    document |= {
        "created": created, "config": dict(settings), "author": author,
        "rootfs": {"type": "layers", "diff_ids": [*base.diff_ids, *([layer.diff_id] if layer else [])]},
        "history": [*(history if isinstance(history, list) else []), line],
    }
    for key in ("container", "container_config", "docker_version", "id", "parent"):  # of the base's own making
        document.pop(key, None)
    return json.dumps(document, separators=(",", ":")).encode()


def oci_type(media_type: str) -> str:
    """The OCI name of a layer's media type: a new manifest is an OCI one throughout."""
    suffix = media_type.rpartition("diff.tar")[2] if ".rootfs." in media_type else media_type.rpartition(".tar")[2]
    kinds = {"": "", ".gzip": "+gzip", ".zstd": "+zstd", "+gzip": "+gzip", "+zstd": "+zstd"}
    return OCI_LAYER + kinds[suffix]


def new_manifest(base: Sequence[Descriptor], layer: Layer | None, media_type: str, config: Descriptor) -> Manifest:
    """The manifest over the base's layers and the new one."""
    layers = [Descriptor(oci_type(each.media_type), each.digest, each.size) for each in base]
    return Manifest(media_type, config, (*layers, *([layer.descriptor] if layer else [])))
