"""Pure parts of commit and save: documents, media types, archives that are the same each time."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest

from dolium.images.commit import Layer, config_document, new_manifest, oci_type, write_layer
from dolium.images.content import ContentStore, digest_of
from dolium.images.decompress import chunks
from dolium.images.manifest import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor, parse_config
from dolium.images.records import ImageRecord, LayerRecord
from dolium.images.reference import Reference
from dolium.images.saver import Saved, archive, index_json, manifest_json, repositories
from dolium.images.unpack import Cancelled

DIFF = digest_of(b"diff")
BASE = {"os": "linux", "architecture": "arm", "variant": "v7", "created": "2024-01-02T03:04:05Z", "config": {"Cmd": ["old"]},
        "rootfs": {"type": "layers", "diff_ids": [DIFF]}, "history": [{"created_by": "first"}], "container": "abc", "docker_version": "1"}
LAYER = Layer(Descriptor(f"{OCI_LAYER}+gzip", digest_of(b"blob"), 4), digest_of(b"new"), 3)


@pytest.mark.parametrize(("found", "expected"), [
    ("application/vnd.docker.image.rootfs.diff.tar.gzip", "+gzip"), ("application/vnd.docker.image.rootfs.diff.tar", ""),
    ("application/vnd.docker.image.rootfs.diff.tar.zstd", "+zstd"), ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "+gzip"),
    (OCI_LAYER, ""), (f"{OCI_LAYER}+zstd", "+zstd"), ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "+gzip"),
])
def test_media_types_of_a_new_manifest(found: str, expected: str) -> None:
    assert oci_type(found) == OCI_LAYER + expected


def test_the_new_configuration() -> None:
    base = parse_config(json.dumps(BASE).encode())
    data = config_document(base, LAYER, {"Cmd": ["new"]}, author="me", message="why", command="sh -c x")
    made, raw = parse_config(data), json.loads(data)
    assert made.diff_ids == (DIFF, LAYER.diff_id) and made.cmd == ("new",) and str(made.platform) == "linux/arm/v7"
    assert [line.created_by for line in made.history] == ["first", "sh -c x"] and made.history[1].comment == "why"
    assert not made.history[1].empty_layer and made.author == "me" and made.created > base.created
    assert not {"container", "docker_version"} & set(raw)
    bare = parse_config(config_document(base, None, {}, author="", message="", command="x"))
    assert bare.diff_ids == (DIFF,) and bare.history[1].empty_layer
    config = Descriptor(OCI_CONFIG, digest_of(data), len(data))
    manifest = new_manifest([Descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", digest_of(b"old"), 3)], LAYER, OCI_MANIFEST, config)
    assert [layer.media_type for layer in manifest.layers] == [f"{OCI_LAYER}+gzip"] * 2


def test_a_layer_is_compressed_the_same_each_time(tmp_path: Path) -> None:
    content = ContentStore(tmp_path)

    def write(out: object) -> int:
        for piece in (b"a" * 5000, b"", b"b" * 7):
            out(piece)  # type: ignore[operator]
        return 2

    first, again = (write_layer(content, write, threading.Event()) for _ in range(2))
    assert first == again and first.diff_id == digest_of(b"a" * 5000 + b"b" * 7) and first.entries == 2
    with content.open(first.descriptor.digest) as blob:
        assert b"".join(chunks(blob)) == b"a" * 5000 + b"b" * 7
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        write_layer(content, write, stop)
    assert not list((tmp_path / "ingest").iterdir())


def test_the_archive(tmp_path: Path) -> None:
    content = ContentStore(tmp_path)
    manifest, config, layer = (content.put(data) for data in (b"{manifest}", b"{config}", b"layer" * 300))
    record = ImageRecord(config, manifest, OCI_MANIFEST, "linux/arm/v7", "", 8, (LayerRecord(layer, 1500, OCI_LAYER, DIFF, DIFF),))
    saved = [Saved(record, (Reference.parse("app:1"), Reference.parse("r.example:5000/app:2"))), Saved(record, ())]

    async def read() -> bytes:
        return b"".join([piece async for piece in archive(content, saved)])

    data = asyncio.run(read())
    assert data == asyncio.run(read()) and len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as found:
        names = found.getnames()
        assert len(names) == len(set(names)) and [name for name in names if name.count("/") == 2] == sorted(
            f"blobs/sha256/{digest[7:]}" for digest in (manifest, config, layer))
        assert found.extractfile("oci-layout").read() == b'{"imageLayoutVersion":"1.0.0"}'  # type: ignore[union-attr]
    index = json.loads(index_json(saved, {manifest: 10}))
    assert [entry.get("annotations", {}).get("io.containerd.image.name") for entry in index["manifests"]] == [
        "docker.io/library/app:1", "r.example:5000/app:2", None]
    assert index["manifests"][0]["platform"] == {"os": "linux", "architecture": "arm", "variant": "v7"}
    assert [entry["RepoTags"] for entry in json.loads(manifest_json(saved))] == [["app:1", "r.example:5000/app:2"], None]
    assert json.loads(repositories(saved)) == {"app": {"1": config[7:]}, "r.example:5000/app": {"2": config[7:]}}
