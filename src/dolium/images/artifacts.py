"""OCI artifacts: what a registry keeps beside images (signatures, bills of materials, charts), by its manifest.

OCI image-spec 1.1, "Guidelines for Artifact Usage". An artifact made here has the empty config and one blob a file, with
its name in the annotation that all tools read.
"""

from __future__ import annotations

import json
import tarfile
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from dolium.errors import InvalidArgument
from dolium.images.content import CHUNK, ContentStore
from dolium.images.manifest import CONFIGS, OCI_MANIFEST, Artifact, Descriptor
from dolium.images.saver import tar_blobs
from dolium.images.unpack import Cancelled

EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
TITLE = "org.opencontainers.image.title"
_FILE_TYPE = "application/octet-stream"
_UNKNOWN = "application/vnd.unknown.artifact.v1"


@dataclass(frozen=True, slots=True)
class Stored:
    """An artifact whose blobs are in the store."""

    digest: str
    artifact: Artifact


def is_image(artifact: Artifact) -> bool:
    """Could it be run? Its config is an image's, and nothing says it is something else."""
    return artifact.config.media_type in CONFIGS and not artifact.declared_type


def make(
    content: ContentStore, source: BinaryIO, *, artifact_type: str, annotations: Mapping[str, str],
    subject: Descriptor | None, cancel: threading.Event,
) -> str:
    """Store the files of a tar and a manifest that names them; returns its digest. Blocks.

    Raises InvalidArgument when there is no file, two have one name, or it is no tar.
    """
    files: list[dict[str, Any]] = []
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                data = archive.extractfile(member) if member.isreg() else None
                if data is None:
                    raise InvalidArgument(f"{member.name}: only files can be in an artifact")
                files.append(_store(content, cast(BinaryIO, data), member.name.rpartition("/")[2], cancel))
    except (tarfile.TarError, EOFError) as error:
        raise InvalidArgument(f"the artifact's files: not a tar: {error}") from None
    titles = [file["annotations"][TITLE] for file in files]
    if not files or len(set(titles)) < len(titles):
        raise InvalidArgument("an artifact needs files, each with a name of its own")
    document: dict[str, Any] = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": artifact_type or _UNKNOWN,
        "config": {"mediaType": EMPTY_TYPE, "digest": content.put(EMPTY), "size": len(EMPTY)}, "layers": files,
    }
    if subject is not None:
        document["subject"] = subject.as_json()
    if annotations:
        document["annotations"] = dict(annotations)
    return content.put(json.dumps(document, separators=(",", ":")).encode())


def _store(content: ContentStore, data: BinaryIO, title: str, cancel: threading.Event) -> dict[str, Any]:
    with content.ingest(None) as ingest:
        while piece := data.read(CHUNK):
            if cancel.is_set():
                raise Cancelled
            ingest.write(piece)
        digest = ingest.commit()
    return {"mediaType": _FILE_TYPE, "digest": digest, "size": ingest.offset, "annotations": {TITLE: title}}


def titles(blobs: Sequence[Descriptor]) -> list[tuple[str, str]]:
    """(file name, digest) of each blob: its title, made safe, else its digest's hexadecimal part."""
    found = []
    for blob in blobs:
        name = blob.annotations.get(TITLE, "").rstrip("/").rpartition("/")[2]
        found.append((name if name not in ("", ".", "..") else blob.digest.removeprefix("sha256:"), blob.digest))
    return found


def archive(content: ContentStore, artifact: Artifact) -> AsyncGenerator[bytes, None]:
    """The artifact's files as a tar."""
    return tar_blobs(content, titles(artifact.blobs))
