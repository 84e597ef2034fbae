from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from dolium.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from dolium.images.content import PARTIAL_MAX_AGE, ContentStore, digest_of


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "content")


def ingests(store: ContentStore) -> list[str]:
    return os.listdir(store.root / "ingest")


def test_put_read_delete(store: ContentStore) -> None:
    digest = store.put(b"hello")
    assert digest == digest_of(b"hello") == store.put(b"hello")
    assert store.has(digest) and store.has(digest, 5) and not store.has(digest, 6)
    assert (store.read(digest, limit=5), store.size(digest), list(store.digests())) == (b"hello", 5, [digest])
    assert store.delete(digest) and not store.delete(digest)
    for call in (lambda: store.read(digest, limit=5), lambda: store.size(digest), lambda: store.open(digest)):
        with pytest.raises(NotFound):
            call()
    assert ingests(store) == []


def test_a_blob_appears_only_when_its_digest_fits(store: ContentStore) -> None:
    digest = digest_of(b"right")
    with store.ingest(digest, 5) as ingest:
        ingest.write(b"wrong")
        with pytest.raises(InvalidArgument, match="wrong content"):
            ingest.commit()
        assert not store.has(digest)
        ingest.reopen()
        ingest.write(b"right")
        assert ingest.commit() == digest
    assert store.read(digest, limit=5) == b"right"
    assert ingests(store) == []


def test_sizes_are_enforced(store: ContentStore) -> None:
    with store.ingest(digest_of(b"abc"), 3) as ingest:
        with pytest.raises(InvalidArgument, match="longer than the 3 bytes"):
            ingest.write(b"abcd")
        ingest.write(b"ab")
        with pytest.raises(InvalidArgument, match="has 2 bytes"):
            ingest.commit()


def test_resuming_hashes_what_is_there(store: ContentStore) -> None:
    digest = digest_of(b"first second")
    with store.ingest(digest, 12) as ingest:
        ingest.write(b"first ")
        assert not ingest.resumed
    with store.ingest(digest, 12) as ingest:
        assert (ingest.offset, ingest.resumed) == (6, True)
        ingest.write(b"second")
        ingest.commit()
    assert store.has(digest, 12)


def test_a_partial_longer_than_the_blob_is_dropped(store: ContentStore) -> None:
    digest = digest_of(b"x")
    with store.ingest(digest) as ingest:
        ingest.write(b"too long")
    with store.ingest(digest, 1) as ingest:
        assert (ingest.offset, ingest.resumed) == (0, False)


def test_nameless_content_goes_with_its_block(store: ContentStore) -> None:
    with store.ingest(None) as ingest:
        ingest.write(b"abc")
    assert ingests(store) == []


def test_recover_keeps_young_partials_only(store: ContentStore) -> None:
    young, old = digest_of(b"young"), digest_of(b"old")
    for digest in (young, old):
        with store.ingest(digest) as ingest:
            ingest.write(b"part")
    (store.root / "ingest" / "tmp-1").touch()
    long_ago = time.time() - PARTIAL_MAX_AGE - 10
    os.utime(store.root / "ingest" / old.removeprefix("sha256:"), (long_ago, long_ago))
    store.recover()
    assert ingests(store) == [young.removeprefix("sha256:")]


def test_damage_on_disk_is_noticed(store: ContentStore) -> None:
    digest = store.put(b"hello")
    store.path(digest).write_bytes(b"hellO")
    with pytest.raises(FailedPrecondition, match="damaged"):
        store.read(digest, limit=10)
    with pytest.raises(InvalidArgument, match="longer than"):
        store.read(digest, limit=4)


def test_only_digests_become_paths(store: ContentStore) -> None:
    for name in ("../../etc/passwd", "sha256:../x", ""):
        with pytest.raises(InvalidArgument):
            store.path(name)


def test_following_a_blob_while_it_is_written(store: ContentStore) -> None:
    data = os.urandom(300_000)
    with store.ingest(digest_of(data), len(data)) as ingest:
        follower = ingest.follow()
        found: list[bytes] = []

        def reading() -> None:
            while part := follower.read(1000):
                found.append(part)

        thread = threading.Thread(target=reading)
        thread.start()
        for start in range(0, len(data), 70_000):
            ingest.write(data[start:start + 70_000])
        ingest.commit()
        thread.join()
        follower.close()
    assert b"".join(found) == data


@pytest.mark.parametrize("end", ["close", "reset", "stop", "wrong"])
def test_a_follower_ends_with_its_ingest(store: ContentStore, end: str) -> None:
    with store.ingest(digest_of(b"x" * 10), 10) as ingest:
        follower = ingest.follow()
        ingest.write(b"y" * 10)
        assert follower.read() == b"y" * 10
        failures: list[Exception] = []

        def reading() -> None:
            try:
                follower.read()
            except Unavailable as error:
                failures.append(error)

        thread = threading.Thread(target=reading)
        thread.start()
        if end == "wrong":
            with pytest.raises(InvalidArgument):
                ingest.commit()
        else:
            {"close": ingest.close, "reset": ingest.reset, "stop": follower.stop}[end]()
        thread.join()
        follower.close()
    assert len(failures) == 1


def test_sync(store: ContentStore) -> None:
    store.sync()
