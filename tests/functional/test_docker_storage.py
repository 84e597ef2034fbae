"""Where containers' roots lie, by the docker command line: other snapshotters, sizes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from daemon import Daemon, eventually

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background


@pytest.mark.parametrize(("name", "driver"), [("overlay", "overlay2"), ("native", "native"), ("erofs", "erofs")])
def test_a_container_lives_on_any_snapshotter(tmp_path: Path, name: str, driver: str) -> None:
    one = Daemon(tmp_path, "--snapshotter", name)
    one.start()
    try:
        one.import_base("base:1", 'CMD ["sh"]')
        assert one.docker("info", "--format", "{{.Driver}}").stdout == f"{driver}\n"
        assert f"storage     {driver}\n" in one.dolium("info").stdout
        write = "cat /data/seed && echo more >> /data/seed && rm /etc/group && cat /etc/hosts > /dev/null && mkdir /made"
        assert one.docker("run", "--name", "box", "base:1", "sh", "-c", write).stdout == "seed\n"
        assert one.inspect("box")["GraphDriver"]["Name"] == driver
        one.docker("start", "-a", "box", check=False)  # mkdir fails now: what was written is there
        assert one.docker("cp", "box:/data/seed", "-").stdout.count("more") == 2
        assert set(one.docker("diff", "box").stdout.splitlines()) >= {"C /data", "C /data/seed", "D /etc/group", "A /made", "C /etc"}
        one.docker("commit", "box", "made:1")
        made = "cat /data/seed; ls /etc/group; ls -d /made"
        again = one.docker("run", "--rm", "made:1", "sh", "-c", made, check=False)
        assert again.stdout.split() == ["seed", "more", "more", "/made"] and "/etc/group" in again.stderr
        one.docker("rmi", "made:1")
        with tarfile.open(fileobj=io.BytesIO(one.output("export", "box"))) as archive:
            names = archive.getnames()
        assert "made" in names and "data/seed" in names and "etc/group" not in names
        for number in range(3):
            assert one.docker("run", "--rm", "base:1", "cat", "/data/seed").stdout == "seed\n", number
        one.kill()
        one.start()
        one.docker("start", "-a", "box", check=False)
        assert one.docker("cp", "box:/data/seed", "-").stdout.count("more") >= 2
        one.docker("rm", "-f", "box")
        one.docker("rmi", "base:1")
        eventually(lambda: not list((tmp_path / "data").glob("snapshots*/layers/*")), "the layers go")
    finally:
        one.close()


def test_images_are_unpacked_again_for_another_snapshotter(tmp_path: Path) -> None:
    one = Daemon(tmp_path)
    one.start()
    try:
        one.import_base("base:1", 'CMD ["sh"]')
        one.docker("create", "--name", "old", "base:1", "true")
        one.options = ("--snapshotter", "erofs")
        one.stop()
        one.start()
        assert one.docker("run", "--rm", "base:1", "cat", "/data/seed").stdout == "seed\n"
        refused = one.docker("start", "old", check=False)
        assert refused.returncode == 1 and "no snapshot" in refused.stderr
        one.options = ("--snapshotter", "overlay")
        one.stop()
        one.start()
        one.docker("start", "-a", "old")
        one.docker("rm", "old")
    finally:
        one.close()


def test_a_size_holds_the_root_of_a_container(engine: Daemon) -> None:
    fill = "dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null; ls -l /big | tr -s ' ' | cut -d ' ' -f 5; df -P / | tail -n 1"
    done = engine.docker("run", "--name", "small", "--storage-opt", "size=24m", "base:1", "sh", "-c", fill)
    try:
        written = int(done.stdout.split()[0])
        assert 8 << 20 < written <= 24 << 20
        assert json.loads(engine.docker("inspect", "small").stdout)[0]["HostConfig"]["StorageOpt"] == {"size": "24m"}
        assert engine.docker("ps", "-as", "--filter", "name=small", "--format", "{{.Size}}").stdout != "0B"
        engine.docker("start", "-a", "small")
        engine.docker("cp", "small:/etc/passwd", "/dev/null", check=False)
        assert engine.docker("run", "--rm", "--storage-opt", "size=16m", "base:1", "sh", "-c", "echo x > /y; cat /y").stdout == "x\n"
    finally:
        engine.docker("rm", "-f", "small")
    for options, words in ((["size=1k"], "at least 4 MiB"), (["size=many"], "size"), (["colour=red"], "unknown option"),
                           (["size=8000p"], "larger than a file can be"), (["size=9000p"], "more than the kernel can count")):
        refused = engine.docker("create", *[word for one in options for word in ("--storage-opt", one)], "base:1", check=False)
        assert refused.returncode == 1 and words in refused.stderr, refused.stderr
