"""Manifests, indexes and image configurations: bytes from a registry in, checked dataclasses out.

Formats: OCI image-spec v1.1 and Docker image manifest version 2, schema 2. Every field that is used later is checked
here, once; errors are InvalidArgument and name the document and the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dolium.errors import InvalidArgument, Unimplemented
from dolium.images.content import digest_of
from dolium.images.platform import Platform
from dolium.images.reference import is_digest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_SCHEMA1 = ("application/vnd.docker.distribution.manifest.v1+json",
                  "application/vnd.docker.distribution.manifest.v1+prettyjws")

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"
LAYERS = frozenset(
    base + suffix
    for base, suffixes in (
        (OCI_LAYER, ("", "+gzip", "+zstd")), (_OCI_FOREIGN, ("", "+gzip", "+zstd")),
        (_DOCKER_LAYER, ("", ".gzip", ".zstd")), (_DOCKER_FOREIGN, ("", ".gzip")),
    )
    for suffix in suffixes
)

MANIFEST_MAX = 4 << 20
CONFIG_MAX = 8 << 20
LAYERS_MAX = 500  # overlayfs takes no more lower directories (lowerdir+)
_SIZE_MAX = 1 << 50
_PLATFORM_PART = re.compile(r"[A-Za-z0-9_.+-]{0,64}", re.ASCII)

JsonObject = Mapping[str, object]
_T = TypeVar("_T")


class _Reader:
    """Typed access to one JSON document; knows its name for messages."""

    def __init__(self, what: str, value: object) -> None:
        self.what = what
        if not isinstance(value, dict):
            raise InvalidArgument(f"{what}: not a JSON object")
        self.value: JsonObject = value

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        """The field, or ``default`` when it is absent or null. A bool is not an int."""
        found = self.value.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise InvalidArgument(f"{self.what}: field {key!r} is not of type {kind.__name__}")
        return found

    def strings(self, key: str) -> tuple[str, ...]:
        return _strings(f"{self.what}: field {key!r}", self.get(key, list, []))

    def keys(self, key: str) -> tuple[str, ...]:
        """Keys of a set written as an object with empty values, in the order given."""
        return _strings(f"{self.what}: field {key!r}", list(self.get(key, dict, {})))

    def string_map(self, key: str) -> dict[str, str]:
        found = self.get(key, dict, {})
        for name, value in found.items():
            if not isinstance(value, str):
                raise InvalidArgument(f"{self.what}: field {key!r}: {name!r} is not a string")
        return dict(found)


def _strings(what: str, values: Sequence[object]) -> tuple[str, ...]:
    result = tuple(value for value in values if isinstance(value, str))
    if len(result) != len(values):
        raise InvalidArgument(f"{what} is not a list of strings")
    return result


def _load(what: str, data: bytes, limit: int) -> _Reader:
    if len(data) > limit:
        raise InvalidArgument(f"{what}: longer than {limit} bytes")
    try:
        return _Reader(what, json.loads(data))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what}: not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says about a blob. ``size`` is in bytes; ``platform`` only in an index."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, what: str, value: object) -> Descriptor:
        """Check one descriptor of the document called ``what``."""
        reader = _Reader(what, value)
        digest, size = reader.get("digest", str, ""), reader.get("size", int, -1)
        if not is_digest(digest):
            raise InvalidArgument(f"{what}: invalid digest {digest!r}", hint="only sha256 is supported")
        if not 0 <= size <= _SIZE_MAX:
            raise InvalidArgument(f"{what}: invalid size {reader.value.get('size')!r} of {digest}")
        return cls(reader.get("mediaType", str, ""), digest, size, _platform(reader), reader.string_map("annotations"))

    def as_json(self) -> dict[str, object]:
        """The descriptor as manifests and records hold it; platform and annotations left out."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


def _platform(reader: _Reader) -> Platform | None:
    if reader.value.get("platform") is None:
        return None
    return _platform_fields(_Reader(f"{reader.what}: platform", reader.value["platform"]))


def _platform_fields(reader: _Reader) -> Platform:
    parts = [reader.get(key, str, "") for key in ("os", "architecture", "variant")]
    for part in parts:
        if not _PLATFORM_PART.fullmatch(part):
            raise InvalidArgument(f"{reader.what}: {part!r} is no operating system or architecture")
    return Platform(parts[0].lower() or "linux", parts[1].lower(), parts[2].lower()).normalized()


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image of one platform; layers bottom first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Several manifests or indexes; attestations and other things that are not images are not in ``images``."""

    media_type: str
    manifests: tuple[Descriptor, ...]

    @property
    def images(self) -> tuple[Descriptor, ...]:
        """Entries that can be run: BuildKit hides attestations behind platform unknown/unknown."""
        return tuple(
            entry for entry in self.manifests
            if entry.media_type in (*MANIFESTS, *INDEXES)
            and (entry.platform is None or entry.platform.architecture != "unknown")
            and "vnd.docker.reference.type" not in entry.annotations
        )


def parse_manifest(data: bytes, media_type: str = "", *, what: str = "manifest") -> Manifest | Index:
    """Parse and check a manifest or an index.

    ``media_type`` is the Content-Type; the document's own field wins, and the fields present decide when neither says
    (OCI makes the field optional). Raises InvalidArgument; Unimplemented for schema 1.
    """
    reader = _load(what, data, MANIFEST_MAX)
    kind = reader.get("mediaType", str, "") or media_type
    if kind in DOCKER_SCHEMA1 or reader.get("schemaVersion", int, 2) == 1:
        raise Unimplemented(f"{what}: Docker image manifest schema 1 is not supported", hint="push the image again")
    if reader.get("schemaVersion", int, 0) != 2:
        raise InvalidArgument(f"{what}: schemaVersion {reader.value.get('schemaVersion')!r} is not 2")
    if "layers" in reader.value and "manifests" in reader.value:
        # An ambiguous document would be one image to one tool and another to the next (CVE-2021-41190).
        raise InvalidArgument(f"{what}: has both layers and manifests")
    if kind not in (*MANIFESTS, *INDEXES):
        kind = OCI_INDEX if "manifests" in reader.value else OCI_MANIFEST if "layers" in reader.value else kind
    if kind in INDEXES:
        entries = reader.get("manifests", list, [])
        return Index(kind, tuple(Descriptor.parse(f"{what}: manifest {i}", entry) for i, entry in enumerate(entries)))
    if kind in MANIFESTS:
        return _image_manifest(reader, kind)
    raise InvalidArgument(f"{what}: unknown media type {kind!r}")


def _image_manifest(reader: _Reader, kind: str) -> Manifest:
    what = reader.what
    config = Descriptor.parse(f"{what}: config", reader.value.get("config"))
    if config.media_type not in CONFIGS:
        raise InvalidArgument(f"{what}: not a container image: its config is {config.media_type!r}",
                              hint="dolium artifact pull fetches what is not to be run")
    if config.size > CONFIG_MAX:
        raise InvalidArgument(f"{what}: config is longer than {CONFIG_MAX} bytes")
    found = reader.get("layers", list, [])
    if len(found) > LAYERS_MAX:
        raise InvalidArgument(f"{what}: {len(found)} layers, overlayfs takes {LAYERS_MAX}")
    layers = tuple(Descriptor.parse(f"{what}: layer {i}", layer) for i, layer in enumerate(found))
    for layer in layers:
        if layer.media_type not in LAYERS:
            raise InvalidArgument(f"{what}: layer {layer.digest}: unknown media type {layer.media_type!r}")
    return Manifest(kind, config, layers)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Any manifest, whatever its config and blobs are: OCI image-spec 1.1 manifest.md. ``declared_type`` is its own
    artifactType, ``artifact_type`` what it counts as: that, or its config's media type.
    """

    media_type: str
    declared_type: str
    config: Descriptor
    blobs: tuple[Descriptor, ...]
    subject: Descriptor | None
    annotations: Mapping[str, str]

    @property
    def artifact_type(self) -> str:
        return self.declared_type or self.config.media_type


def parse_artifact(data: bytes, media_type: str = "", *, what: str = "manifest") -> Artifact:
    """Parse and check a manifest that need not be an image's. Raises InvalidArgument, also for an index."""
    reader = _load(what, data, MANIFEST_MAX)
    kind = reader.get("mediaType", str, "") or media_type or OCI_MANIFEST
    if kind not in MANIFESTS or "manifests" in reader.value or reader.get("schemaVersion", int, 0) != 2:
        raise InvalidArgument(f"{what}: not a manifest: {kind!r}")
    blobs = reader.get("layers", list, [])
    subject = reader.value.get("subject")
    return Artifact(
        kind, reader.get("artifactType", str, ""), Descriptor.parse(f"{what}: config", reader.value.get("config")),
        tuple(Descriptor.parse(f"{what}: blob {i}", blob) for i, blob in enumerate(blobs)),
        Descriptor.parse(f"{what}: subject", subject) if subject is not None else None,
        reader.string_map("annotations"),
    )


@dataclass(frozen=True, slots=True)
class Healthcheck:
    """HEALTHCHECK; times in nanoseconds, 0 for the default."""

    test: tuple[str, ...]
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class History:
    """One line of ``docker history``; ``created`` is RFC 3339 or empty."""

    created: str
    created_by: str
    author: str
    comment: str
    empty_layer: bool


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image's configuration. None for ``cmd`` and ``entrypoint`` means not set, () means set to nothing.

    ``raw`` is the whole document, for inspect.
    """

    platform: Platform
    created: str
    author: str
    diff_ids: tuple[str, ...]
    history: tuple[History, ...]
    env: tuple[str, ...]
    cmd: tuple[str, ...] | None
    entrypoint: tuple[str, ...] | None
    working_dir: str
    user: str
    volumes: tuple[str, ...]
    exposed_ports: tuple[str, ...]
    labels: Mapping[str, str]
    stop_signal: str
    shell: tuple[str, ...]
    on_build: tuple[str, ...]
    healthcheck: Healthcheck | None
    raw: JsonObject

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """Chain ID of each layer, bottom first."""
        return chain_ids(self.diff_ids)


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """OCI image-spec config.md, "Layer ChainID": a layer's identity together with all that is below it."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


def parse_config(data: bytes, *, what: str = "image config") -> ImageConfig:
    """Parse and check an image configuration. Raises InvalidArgument."""
    reader = _load(what, data, CONFIG_MAX)
    rootfs = _Reader(f"{what}: rootfs", reader.value.get("rootfs"))
    diff_ids = rootfs.strings("diff_ids")
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise InvalidArgument(f"{what}: invalid diff ID {diff_id!r}")
    if rootfs.get("type", str, "layers") != "layers":
        raise InvalidArgument(f"{what}: rootfs type {rootfs.value.get('type')!r} is not 'layers'")
    config = _Reader(f"{what}: config", reader.get("config", dict, {}))
    return ImageConfig(
        platform=_platform_fields(reader),
        created=reader.get("created", str, ""),
        author=reader.get("author", str, ""),
        diff_ids=diff_ids,
        history=tuple(_history(what, entry) for entry in reader.get("history", list, [])),
        env=config.strings("Env"),
        cmd=_words(config, "Cmd"),
        entrypoint=_words(config, "Entrypoint"),
        working_dir=config.get("WorkingDir", str, ""),
        user=config.get("User", str, ""),
        volumes=config.keys("Volumes"),
        exposed_ports=config.keys("ExposedPorts"),
        labels=config.string_map("Labels"),
        stop_signal=config.get("StopSignal", str, ""),
        shell=config.strings("Shell"),
        on_build=config.strings("OnBuild"),
        healthcheck=_healthcheck(config),
        raw=reader.value,
    )


def _words(config: _Reader, key: str) -> tuple[str, ...] | None:
    found = config.value.get(key)
    if isinstance(found, str):  # images of old have a string here
        return (found,)
    return None if found is None else config.strings(key)


def _history(what: str, value: object) -> History:
    entry = _Reader(f"{what}: history", value)
    text: Callable[[str], str] = lambda key: entry.get(key, str, "")  # noqa: E731
    return History(
        text("created"), text("created_by"), text("author"), text("comment"), entry.get("empty_layer", bool, False)
    )


def _healthcheck(config: _Reader) -> Healthcheck | None:
    if config.value.get("Healthcheck") is None:
        return None
    check = _Reader(f"{config.what}: Healthcheck", config.value["Healthcheck"])
    return Healthcheck(
        test=check.strings("Test"),
        interval=check.get("Interval", int, 0),
        timeout=check.get("Timeout", int, 0),
        start_period=check.get("StartPeriod", int, 0),
        start_interval=check.get("StartInterval", int, 0),
        retries=check.get("Retries", int, 0),
    )
