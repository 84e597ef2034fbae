"""What an index names, found by reading; whatever the documents say."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from dolium.errors import InvalidArgument
from dolium.images.content import digest_of
from dolium.images.indexes import MANIFESTS_MAX, NESTING, Tree
from dolium.images.manifest import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Descriptor
from dolium.images.records import IndexRecord


def described(data: bytes, media_type: str) -> Descriptor:
    return Descriptor(media_type, digest_of(data), len(data))


def image(name: str) -> bytes:
    config, layer = described(name.encode(), OCI_CONFIG), described(b"layer of " + name.encode(), OCI_LAYER)
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.as_json(),
                       "layers": [layer.as_json()]}).encode()


def index(entries: Sequence[Descriptor]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [one.as_json() for one in entries]}).encode()


def read(top: bytes, *others: bytes, kind: str = OCI_INDEX) -> Tree:
    known = {digest_of(data): data for data in (top, *others)}
    tree = Tree(described(top, kind))
    while (entry := tree.next()) is not None:
        tree.take(known[entry.digest])
    return tree


def test_an_index_comes_after_what_it_names_and_nothing_twice() -> None:
    one, two = image("one"), image("two")
    inner = index([described(two, OCI_MANIFEST), described(one, OCI_MANIFEST)])
    top = index([described(inner, OCI_INDEX), described(one, OCI_MANIFEST), described(one, OCI_MANIFEST)])
    tree = read(top, inner, one, two)
    order = [entry.digest for entry in tree.manifests()]
    assert sorted(order) == sorted(map(digest_of, (one, two, inner, top)))
    assert order[-2:] == [digest_of(inner), digest_of(top)]
    assert {entry.digest for entry in tree.images()} == {digest_of(one), digest_of(two)}
    assert len(tree.blobs) == 4
    record = tree.record().called("docker.io/library/x:1")
    assert record.digest == digest_of(top) and len(record.digests()) == 8
    assert IndexRecord.from_json(record.name, json.loads(json.dumps(record.as_json()))) == record


def test_what_does_not_fit_is_refused() -> None:
    one = image("one")
    wrong = Descriptor(OCI_MANIFEST, digest_of(one), len(one) + 1)
    with pytest.raises(InvalidArgument, match=f"{digest_of(one)} has {len(one)} bytes, the index says {len(one) + 1}"):
        read(index([wrong]), one)
    with pytest.raises(InvalidArgument, match="no manifest: 'text/plain'"):
        read(index([described(b"x", "text/plain")]), b"x")
    with pytest.raises(InvalidArgument, match="is no index"):
        read(index([described(one, OCI_INDEX)]), one)
    top = index([])
    others = []
    for _ in range(NESTING + 1):
        others.append(top)
        top = index([described(top, OCI_INDEX)])
    with pytest.raises(InvalidArgument, match="nested too deep"):
        read(top, *others)
    with pytest.raises(InvalidArgument, match=f"more than {MANIFESTS_MAX}"):
        read(index([Descriptor(OCI_MANIFEST, digest_of(str(i).encode()), 1) for i in range(MANIFESTS_MAX + 1)]))
