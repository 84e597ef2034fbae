"""The image store against a real registry and archives other programs wrote. Root."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import registry as make
import zstandard
from registry import Registry, entry, image, index, layer, tar

from dolium import faults
from dolium.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from dolium.images.auth import Credentials
from dolium.images.content import ContentStore
from dolium.images.manifest import Descriptor
from dolium.images.names import Use
from dolium.images.platform import Platform
from dolium.images.progress import ProgressEvent, Status
from dolium.images.records import SqliteImageRecords
from dolium.images.reference import Reference
from dolium.images.registry import RegistryClient
from dolium.images.snapshots.base import MountOptions
from dolium.images.store import ImageStore
from dolium.images.view import Image

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and trusted xattrs need root"),
]

AMD64 = Platform("linux", "amd64")
BASE = layer({"etc/": b"", "etc/name": b"base\n", "etc/gone": b"x", "opt/": b"", "opt/old": b"x", "bin/": b""})
_T = TypeVar("_T")


def upper_layer() -> bytes:
    return tar([
        entry("etc", tarfile.DIRTYPE), (entry("etc/name"), b"upper\n"), entry("etc/.wh.gone"),
        entry("opt", tarfile.DIRTYPE), entry("opt/.wh..wh..opq"), (entry("opt/new"), b"y"),
    ])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def use(root: Path, work: Callable[[ImageStore], Awaitable[_T]], uses: dict[str, list[Use]] | None = None) -> _T:
    """Open the store as a new process would, recover, and work."""
    async def main() -> _T:
        with contextlib.closing(sqlite3.connect(root / "db")) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            store = ImageStore(root, SqliteImageRecords(connection), platform=AMD64,
                               in_use=lambda image: (uses or {}).get(image, []))
            await store.recover()
            try:
                return await work(store)
            finally:
                store.close()

    return asyncio.run(main())


def left(root: Path) -> dict[str, list[str]]:
    """What is on disk, but for partial downloads."""
    return {
        "blobs": sorted(os.listdir(root / "content/blobs/sha256")),
        "nameless": [name for name in os.listdir(root / "content/ingest") if name.startswith("tmp-")],
        "layers": sorted(os.listdir(root / "snapshots/layers")),
        "active": sorted(os.listdir(root / "snapshots/active")),
        "trash": sorted(os.listdir(root / "snapshots/trash")),
    }


NOTHING: dict[str, list[str]] = {"blobs": [], "nameless": [], "layers": [], "active": [], "trash": []}


@contextlib.contextmanager
def mounted(store: ImageStore, key: str, chains: Sequence[str]) -> Iterator[Path]:
    store.snapshots.prepare(key, chains)
    fd = store.snapshots.mount(key, chains, MountOptions())
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


# Pull


@pytest.mark.parametrize("kind", ["gzip", "zstd", "plain", "docker"])
def test_pull_unpack_and_mount(tmp_path: Path, registry: Registry, kind: str) -> None:
    layers, config = [BASE, upper_layer()], {"Cmd": ["sh"], "Env": ["A=1"]}
    files = {
        "gzip": lambda: image(layers, config=config),
        "zstd": lambda: image(layers, config=config, compress=zstandard.ZstdCompressor().compress, suffix="+zstd"),
        "plain": lambda: image(layers, config=config, compress=bytes, suffix=""),
        "docker": lambda: image(layers, config=config, media_type=make.DOCKER_MANIFEST, suffix=".gzip",
                                layer_type="application/vnd.docker.image.rootfs.diff.tar"),
    }[kind]()
    digest = registry.push(kind, "1", files)
    name = registry.reference(f"{kind}:1")
    events: list[ProgressEvent] = []

    async def work(store: ImageStore) -> None:
        pulled = await store.pull(name, progress=events.append)
        assert pulled.repo_tags == (name,)
        assert pulled.repo_digests == (f"{registry.address}/{kind}@{digest}",)
        assert (pulled.digest, str(pulled.platform)) == (digest, "linux/amd64")
        assert pulled.size == len(b"base\nxx") + len(b"upper\ny")
        assert store.config(pulled.id).cmd == ("sh",) and store.config(pulled.id).env == ("A=1",)
        assert [line.created_by for line in store.history(pulled.id)] == ["layer 1", "layer 0"]
        assert store.history(pulled.id)[0].id == pulled.id
        for text in (name, pulled.id, pulled.id[7:19], pulled.repo_digests[0]):
            assert store.resolve(text) == pulled

        assert len(pulled.chain_ids) == 2
        with mounted(store, "c1", pulled.chain_ids) as at:
            assert (at / "etc/name").read_text() == "upper\n"
            assert not (at / "etc/gone").exists()
            assert os.listdir(at / "opt") == ["new"]
            (at / "etc/written").write_text("by the container")
        assert store.snapshots.usage("c1").inodes == 2
        assert store.snapshots.active() == ["c1"]
        store.snapshots.remove("c1")
        store.snapshots.remove("c1")
        assert store.snapshots.active() == []

        again: list[ProgressEvent] = []
        assert await store.pull(name, progress=again.append) == pulled
        assert [event.status for event in again if len(event.id) == 12] == [Status.EXISTS, Status.EXISTS]
        assert again[-1].status == f"Status: Image is up to date for {name}"

    use(tmp_path, work)
    for short in {event.id for event in events if len(event.id) == 12}:
        seen = list(dict.fromkeys(event.status for event in events if event.id == short))
        assert seen == [s for s in Status if s in seen] and seen[0] == Status.PULLING and seen[-1] == Status.COMPLETE
    assert events[0] == ProgressEvent("1", f"Pulling from {kind}")
    assert events[-1].status == f"Status: Downloaded newer image for {name}"


def test_a_large_layer_in_parts(tmp_path: Path, registry: Registry) -> None:
    """As from afar: in ranges over several connections, from a real registry."""
    files = image([layer({"big": os.urandom(9 << 20)})], compress=bytes, suffix="")
    registry.push("parts", "1", files)
    digest, size = next((digest, len(data)) for digest, data in files.blobs.items() if len(data) > 1 << 20)

    async def main() -> None:
        content = ContentStore(tmp_path)
        async with RegistryClient(Reference.parse(registry.reference("parts:1")), parts_from=1 << 20) as client:
            await client.ping()
            with content.ingest(digest, size) as ingest:
                await client.blob(Descriptor("", digest, size), ingest, lambda done: None)
        assert content.verify(digest)

    asyncio.run(main())


def test_an_image_survives_the_process(tmp_path: Path, registry: Registry) -> None:
    registry.push("survives", "1", image([BASE]))
    name = registry.reference("survives:1")
    pulled = use(tmp_path, lambda store: store.pull(name))

    async def look(store: ImageStore) -> Image:
        assert store.images() == [pulled]
        return store.resolve(name)

    assert use(tmp_path, look) == pulled


def test_basic_authentication(tmp_path: Path) -> None:
    with Registry(tmp_path, auth=True) as private:
        private.push("app", "1", image([BASE]))
        name = private.reference("app:1")

        async def work(store: ImageStore) -> None:
            for credentials in (None, Credentials(make.USER, "wrong")):
                with pytest.raises(PermissionDenied):
                    await store.pull(name, credentials=credentials)
            await store.pull(name, credentials=Credentials(make.USER, make.PASSWORD))

        use(tmp_path, work)


def test_the_platform_is_picked_from_an_index(tmp_path: Path, registry: Registry) -> None:
    both = index({"linux/arm64": image([BASE], architecture="arm64"), "linux/amd64": image([BASE])})
    top = registry.push("multi", "1", both)
    registry.push("foreign", "1", index({"linux/arm64/v8": both.children[0], "linux/s390x": both.children[0]}))
    registry.push("single", "1", both.children[0])

    async def work(store: ImageStore) -> None:
        pulled = await store.pull(registry.reference("multi:1"))
        assert str(pulled.platform) == "linux/amd64"
        assert pulled.repo_digests == (f"{registry.address}/multi@{top}",)
        assert await store.pull(registry.reference(f"multi@{top}")) == pulled
        other = await store.pull(registry.reference("multi:1"), platform="linux/arm64")
        assert str(other.platform) == "linux/arm64" and store.resolve(registry.reference("multi:1")).id == other.id
        with pytest.raises(NotFound, match=r"no matching manifest for linux/amd64 .* it has linux/arm64, linux/s390x"):
            await store.pull(registry.reference("foreign:1"))
        with pytest.raises(NotFound, match=r"is an image for linux/arm64, not for linux/amd64"):
            await store.pull(registry.reference("single:1"))
        assert (await store.pull(registry.reference("single:1"), platform="linux/arm64")).id == other.id

    use(tmp_path, work)


def test_missing_images(tmp_path: Path, registry: Registry) -> None:
    async def work(store: ImageStore) -> None:
        with pytest.raises(NotFound, match="not found"):
            await store.pull(registry.reference("missing:1"))

    use(tmp_path, work)
    assert left(tmp_path) == NOTHING


SYM, LNK = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize("entries", [
    [entry("../evil")], [entry("evil", SYM, link="/tmp"), entry("evil/x")],
    [entry("evil", SYM, link="../.."), entry("evil/x")], [entry("evil", LNK, link="../../../../etc/passwd")],
    [entry("out", SYM, link="/etc"), entry("evil", LNK, link="out/passwd")],
], ids=["dotdot", "absolute", "relative", "hard link", "hard link through a link"])
def test_a_layer_that_leaves_is_refused_and_leaves_nothing(
    tmp_path: Path, registry: Registry, entries: list[tarfile.TarInfo]
) -> None:
    registry.push("evil", "1", image([BASE, tar(entries)]))

    async def work(store: ImageStore) -> None:
        with pytest.raises(InvalidArgument, match=r"layer sha256:.*evil"):
            await store.pull(registry.reference("evil:1"))
        assert store.images() == []

    use(tmp_path, work)
    assert left(tmp_path) == NOTHING


@pytest.mark.parametrize(("packing", "reason"), [
    (lambda data: gzip.compress(data)[:-20], "cut short"), (lambda data: b"\x1f\x8b" + data, "damaged"),
    (lambda data: gzip.compress(data[:-1500]), "diff ID"), (lambda data: gzip.compress(data + b"\0"), "diff ID"),
    (lambda data: gzip.compress(b"x" * 2000), "octal"),
])
def test_damaged_layers_leave_nothing(
    tmp_path: Path, registry: Registry, packing: Callable[[bytes], bytes], reason: str
) -> None:
    registry.push("damaged", "1", image([BASE], compress=packing))

    async def work(store: ImageStore) -> None:
        with pytest.raises(InvalidArgument, match=reason):
            await store.pull(registry.reference("damaged:1"))

    use(tmp_path, work)
    assert left(tmp_path) == NOTHING


def test_parallel_pulls_fetch_and_unpack_once(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dolium.images import installer
    registry.push("first", "1", image([BASE, upper_layer()]))
    registry.push("second", "1", image([BASE, layer({"other": b"1"})]))
    unpacked: list[str | None] = []
    real = installer.unpack

    def counting(*args: object, diff_id: str | None, **more: object) -> object:
        unpacked.append(diff_id)
        return real(*args, diff_id=diff_id, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(installer, "unpack", counting)

    async def work(store: ImageStore) -> None:
        names = [registry.reference(name) for name in ("first:1", "second:1", "first:1", "second:1")]
        images = await asyncio.gather(*(store.pull(name) for name in names))
        assert images[0].id == images[2].id and images[1].id == images[3].id
        assert images[0].size == len(b"base\nxx") + len(b"upper\ny")
        assert images[1].size == len(b"base\nxx") + 1

    use(tmp_path, work)
    assert len(unpacked) == len(set(unpacked)) == 3


@pytest.mark.parametrize("status", [Status.DOWNLOADING, Status.EXTRACTING])
def test_a_cancelled_pull_leaves_no_half_layer(tmp_path: Path, registry: Registry, status: Status) -> None:
    registry.push("cancelled", "1", image([layer({"big": os.urandom(40_000_000)}), BASE]))
    name = registry.reference("cancelled:1")

    async def work(store: ImageStore) -> None:
        def cancel(event: ProgressEvent) -> None:
            if event.status == status and event.total > 1_000_000:
                task.cancel()

        task = asyncio.ensure_future(store.pull(name, progress=cancel))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [each for each in os.listdir(tmp_path / "snapshots/layers") if ".tmp-" in each]
        assert store.images() == []
        await store.pull(name)

    use(tmp_path, work)
    assert left(tmp_path)["nameless"] == []


def test_an_image_without_layers(tmp_path: Path, registry: Registry) -> None:
    registry.push("bare", "1", image([]))

    async def work(store: ImageStore) -> None:
        pulled = await store.pull(registry.reference("bare:1"))
        with mounted(store, "c", pulled.chain_ids) as at:
            assert os.listdir(at) == []
        store.snapshots.remove("c")
        with pytest.raises(InvalidArgument, match="reserved"):
            await store.pull("scratch")

    use(tmp_path, work)


def test_a_full_disk_is_named(tmp_path: Path, registry: Registry) -> None:
    registry.push("large", "1", image([layer({"big": os.urandom(8_000_000)})]))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    try:
        async def work(store: ImageStore) -> None:
            with pytest.raises(ResourceExhausted, match="No space left"):
                await store.pull(registry.reference("large:1"))

        use(disk, work)
        assert left(disk) == NOTHING
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Remove


def test_shared_layers_stay_until_the_last_image_goes(tmp_path: Path, registry: Registry) -> None:
    registry.push("one", "1", image([BASE, layer({"a": b"1"})]))
    registry.push("two", "1", image([BASE, layer({"b": b"1"})]))
    one, two = registry.reference("one:1"), registry.reference("two:1")

    async def work(store: ImageStore) -> None:
        first, second = await store.pull(one), await store.pull(two)
        store.tag(one, "mine:latest")
        assert [(r.kind, r.value) for r in await store.remove("mine")] == [("Untagged", "mine:latest")]
        gone = await store.remove(one)
        assert [(r.kind, r.value) for r in gone] == [
            ("Untagged", one), ("Untagged", first.repo_digests[0]), ("Deleted", first.id),
            ("Deleted", first.chain_ids[1]),
        ]
        assert store.snapshots.layers() and set(store.snapshots.layers()) == set(second.chain_ids)
        with pytest.raises(NotFound, match="No such image"):
            store.resolve(one)
        assert [r.kind for r in await store.remove(second.id[:19])] == ["Untagged", "Untagged"] + ["Deleted"] * 3

    use(tmp_path, work)
    assert left(tmp_path) == NOTHING


def test_images_in_use(tmp_path: Path, registry: Registry) -> None:
    registry.push("used", "1", image([BASE]))
    name = registry.reference("used:1")
    uses: dict[str, list[Use]] = {}

    async def work(store: ImageStore) -> None:
        pulled = await store.pull(name)
        uses[pulled.id] = [Use("c" * 64, True)]
        with pytest.raises(FailedPrecondition, match="must force"):
            await store.remove(name)
        await store.remove(name, force=True)
        assert store.resolve(pulled.id).repo_tags == ()
        uses.clear()
        await store.remove(pulled.id)
        assert store.images() == []

    use(tmp_path, work, uses)


# Archives other programs wrote


@pytest.fixture
def layout(tmp_path: Path, registry: Registry) -> Path:
    """An OCI layout made by skopeo from a registry."""
    registry.push("archived", "1", image([BASE, upper_layer()], config={"Cmd": ["sh"]}))
    path = tmp_path / "layout"
    subprocess.run(["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{registry.reference('archived:1')}",
                    f"oci:{path}:archived:1"], check=True)
    return path


def load(root: Path, source: Path | io.BytesIO) -> list[Image]:
    async def work(store: ImageStore) -> list[Image]:
        images = await store.load(source)
        with mounted(store, "c", images[0].chain_ids) as at:
            assert (at / "etc/name").read_text() == "upper\n"
        store.snapshots.remove("c")
        assert store.config(images[0].id).cmd == ("sh",)
        return images

    images = use(root, work)
    # Whatever else the archive held is gone: only config, manifest and layers stay.
    assert len(left(root)["blobs"]) == 4 and left(root)["nameless"] == []
    return images


def packed(path: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for child in sorted(path.rglob("*")):
            archive.add(child, str(child.relative_to(path)), recursive=False)
    return out.getvalue()


def test_load_an_oci_layout(tmp_path: Path, layout: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = load(tmp_path / "a", layout)
    second = load(tmp_path / "b", io.BytesIO(gzip.compress(packed(layout))))
    assert first == second
    assert [each.repo_tags for each in first] == [("archived:1",)]


def test_load_umocis_layout(tmp_path: Path) -> None:
    path = tmp_path / "umoci"
    for words in (["init", "--layout", str(path)], ["new", "--image", f"{path}:tag"]):
        subprocess.run(["umoci", *words], check=True)
    subprocess.run(["umoci", "insert", "--image", f"{path}:tag", "/etc/hostname", "/etc/hostname"], check=True)

    async def work(store: ImageStore) -> None:
        (loaded,) = await store.load(path)
        assert loaded.repo_tags == () and len(loaded.chain_ids) == 1
        assert store.resolve(loaded.id) == loaded

    use(tmp_path, work)


@pytest.mark.parametrize("compressed", [False, True])
def test_load_a_docker_archive(tmp_path: Path, layout: Path, compressed: bool) -> None:
    archive = tmp_path / "docker.tar"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:archived:1", f"docker-archive:{archive}:some/app:2"],
                   check=True)
    if compressed:
        archive.write_bytes(zstandard.ZstdCompressor().compress(archive.read_bytes()))
    (loaded,) = load(tmp_path, archive)
    assert loaded.repo_tags == ("some/app:2",)


def test_load_an_archive_of_old_with_links_between_layers(tmp_path: Path) -> None:
    files = image([BASE, BASE])
    config = next(data for data in files.blobs.values() if data.startswith(b"{"))
    listing = [{"Config": "c.json", "RepoTags": ["old:1"], "Layers": ["1/layer.tar", "2/layer.tar"]}]
    data = tar([
        (entry("1/layer.tar"), BASE), entry("2/layer.tar", SYM, link="../1/layer.tar"), (entry("c.json"), config),
        (entry("manifest.json"), json.dumps(listing).encode()),
    ])

    async def work(store: ImageStore) -> None:
        (loaded,) = await store.load(io.BytesIO(data))
        assert len(loaded.chain_ids) == 2 and store.resolve("old:1") == loaded

    use(tmp_path, work)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "not an image archive"), (b"nonsense" * 100, "not an image archive"), (tar([(entry("a"), b"b")]), "no image"),
    (tar([(entry("manifest.json"), b"{}")]), "not a list"),
    (tar([(entry("manifest.json"), b'[{"Config": "../x"}]')]), "leads out"),
    (tar([(entry("manifest.json"), b'[{"Config": "x", "Layers": ["y"]}]')]), "lacks x"),
    (tar([(entry("index.json"), b'{"schemaVersion": 2, "manifests": []}')]), "no image in it"),
    (tar([(entry("../x"), b"1")]), "leads out"),
])
def test_archives_that_hold_no_image(tmp_path: Path, data: bytes, reason: str) -> None:
    async def work(store: ImageStore) -> None:
        with pytest.raises(InvalidArgument, match=reason):
            await store.load(io.BytesIO(data))

    use(tmp_path, work)
    assert left(tmp_path) == NOTHING


def test_a_layout_whose_blob_lies(tmp_path: Path, layout: Path) -> None:
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes() + b"x")

    async def work(store: ImageStore) -> None:
        with pytest.raises(InvalidArgument, match="wrong content"):
            await store.load(layout)

    use(tmp_path, work)
    assert left(tmp_path) == NOTHING


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress, bz2.compress])
def test_import(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    async def work(store: ImageStore) -> None:
        made = await store.import_tar(
            io.BytesIO(pack(BASE)), name="imported", config={"Env": ["A=1"]}, changes=["CMD echo hi", "ENV B=2"],
            message="by hand",
        )
        assert made.repo_tags == ("imported:latest",) and made.size == 7
        config = store.config(made.id)
        assert (config.cmd, config.env) == (("/bin/sh", "-c", "echo hi"), ("A=1", "B=2"))
        assert [line.comment for line in store.history(made.id)] == ["by hand"]
        with mounted(store, "c", made.chain_ids) as at:
            assert (at / "etc/name").read_bytes() == b"base\n"
        with pytest.raises(InvalidArgument):
            await store.import_tar(io.BytesIO(b"nonsense" * 100), name="bad")
        with pytest.raises(InvalidArgument):
            await store.import_tar(io.BytesIO(BASE), config={"Env": "A=1"})

    use(tmp_path, work)
    assert len(left(tmp_path)["blobs"]) == 3 and len(left(tmp_path)["layers"]) == 1


def test_a_busybox_root(tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    os.symlink("busybox", root / "bin/sh")
    data = subprocess.run(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE, check=True).stdout

    async def work(store: ImageStore) -> None:
        made = await store.import_tar(io.BytesIO(data), name="busybox")
        with mounted(store, "c", made.chain_ids) as at:
            words = ["chroot", str(at), "/bin/sh", "-c", "echo hello"]
            assert subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout == b"hello\n"

    use(tmp_path, work)


# Crashes

CHILD = """
import asyncio, sqlite3, sys
from pathlib import Path
from dolium.images.platform import Platform
from dolium.images.records import SqliteImageRecords
from dolium.images.store import ImageStore

async def main(root, name):
    store = ImageStore(root, SqliteImageRecords(sqlite3.connect(root / "db")), platform=Platform("linux", "amd64"))
    await store.recover()
    image = await store.pull(name)
    store.snapshots.prepare("c", image.chain_ids)
    store.snapshots.remove("c")
    await store.remove(name)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""

ROOM = ("content.", "snapshot.", "pull.", "image.")


@pytest.mark.parametrize("point", sorted(name for name in faults.POINTS if name.startswith(ROOM)))
def test_a_kill_at_any_point_leaves_a_whole_store(tmp_path: Path, registry: Registry, point: str) -> None:
    registry.push("crash", "1", image([BASE, upper_layer()]))
    name = registry.reference("crash:1")
    environment = {**os.environ, "DOLIUM_FAULT": point, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), name], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL

    async def look(store: ImageStore) -> None:
        for found in store.images():  # what is listed is whole
            store.snapshots.prepare("whole", found.chain_ids)
            store.snapshots.remove("whole")
            assert store.config(found.id).diff_ids
        if not store.images():
            leased = {digest for lease in store.leases() for digest in lease.blobs}
            assert store.snapshots.layers() == [] and set(store.content.digests()) <= leased  # for the next try
            assert all(map(store.content.verify, store.content.digests()))

    async def again(store: ImageStore) -> None:
        await store.pull(name)
        for key in store.snapshots.active():
            store.snapshots.remove(key)
        await store.remove(name)

    use(tmp_path, look)
    use(tmp_path, again)
    assert left(tmp_path) == NOTHING
