"""Crash-only, images: the daemon is killed -9 after each side effect of pull, import, load and rmi, and a new one started."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, base_tar
from registry import Registry, image, layer

import dolium.images
from dolium import faults

for module in pkgutil.walk_packages(dolium.images.__path__, "dolium.images."):
    importlib.import_module(module.name)

pytestmark = pytest.mark.crash
ROOMS = ("content.", "snapshot.", "pull.", "image.")
POINTS = sorted(point for point in faults.POINTS if point.startswith(ROOMS))
# A tar or an archive is no download: its blobs are written, or its layer unpacked, without one.
NOT_PASSED = {("load", "pull.layer.fetched"), ("import", "pull.layer.fetched"), ("import", "pull.layer.unpacked")}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        one.push("crash", "1", image([base_tar(), layer({"opt/": b"", "opt/second": b"2"})], config={"Cmd": ["cat", "/opt/second"]}))
        yield one


@pytest.fixture(scope="module")
def archive(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The registry's image as `docker save` writes it, by skopeo."""
    path = tmp_path_factory.mktemp("archive") / "saved.tar"
    subprocess.run(["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{registry.reference('crash:1')}",
                    f"docker-archive:{path}:crash:1"], check=True, timeout=60)
    return path


def obtain(daemon: Daemon, verb: str, registry: Registry, archive: Path, *, check: bool) -> str:
    """The image by one of the three ways; its name."""
    if verb == "pull":
        daemon.docker("pull", registry.reference("crash:1"), check=check)
        return registry.reference("crash:1")
    if verb == "load":
        daemon.docker("load", "-i", str(archive), check=check)
    else:
        tar = daemon.folder / "root.tar"
        tar.write_bytes(base_tar())
        daemon.docker("import", "-c", 'CMD ["echo", "-n", "2"]', str(tar), "crash:1", check=check)
    return "crash:1"


def whole(data: Path) -> None:
    """Every blob is what its name says, and nothing half done lies about."""
    for path in blobs(data):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    (ingests,) = data.glob("**/ingest")
    assert not list(ingests.glob("tmp-*")) + list((data / "snapshots" / "layers").glob("*.tmp-*"))


def blobs(data: Path) -> list[Path]:
    """Every blob of the store."""
    (folder,) = data.rglob("blobs/sha256")
    return list(folder.iterdir())


@pytest.mark.parametrize(("verb", "point"), [(verb, point) for verb in ("pull", "import", "load") for point in POINTS
                                             if (verb, point) not in NOT_PASSED])
def test_killed_at_every_point(tmp_path: Path, registry: Registry, archive: Path, verb: str, point: str) -> None:
    daemon = Daemon(tmp_path)
    daemon.start(fault=point)
    try:
        assert daemon.process is not None
        name = obtain(daemon, verb, registry, archive, check=False)
        for words in (("create", "--name", "one", name), ("rm", "one"), ("rmi", name)):
            if daemon.process.poll() is None:
                daemon.docker(*words, check=False)
        assert daemon.wait() == -9, f"{point} was never passed"
        daemon.start()
        whole(tmp_path / "data")
        for listed in daemon.docker("images", "-q").stdout.split():  # what is listed can run
            assert daemon.docker("run", "--rm", listed).stdout == "2"
        obtain(daemon, verb, registry, archive, check=True)
        assert daemon.docker("run", "--rm", name).stdout == "2"
        daemon.docker("rm", "-f", "one", check=False)
        for listed in set(daemon.docker("images", "-aq").stdout.split()):  # an import before the kill is another image
            daemon.docker("rmi", "-f", listed)
        assert daemon.docker("images", "-aq").stdout == ""
        assert blobs(tmp_path / "data") == list((tmp_path / "data" / "snapshots" / "layers").iterdir()) == []
    finally:
        daemon.close()
