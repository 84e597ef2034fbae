"""Images and containers taken out and changed: save, export, commit, diff, prune, df; docker's words and skopeo's eyes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import DOCKER, Daemon, base_tar, eventually
from registry import Registry, entry, image, layer, tar

pytestmark = pytest.mark.leaves("links", "nft")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        one.push("two", "1", image([base_tar(), layer({"opt/": b"", "opt/second": b"2"})], config={"Cmd": ["cat", "/opt/second"]}))
        yield one


@pytest.fixture
def two(engine: Daemon, registry: Registry) -> Iterator[str]:
    name = registry.reference("two:1")
    engine.docker("pull", "-q", name)
    yield name
    engine.docker("rmi", "-f", name, check=False)


def files(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return {member.name: member for member in archive}


def test_saved_images_are_read_by_all(engine: Daemon, registry: Registry, two: str, tmp_path: Path) -> None:
    before = engine.inspect(two)
    engine.docker("tag", two, "other/name:x")
    path, again = tmp_path / "saved.tar", tmp_path / "again.tar"
    engine.docker("save", "-o", str(path), two, "other/name:x", "base:1")
    engine.dolium("save", "-o", str(again), two, "other/name:x", "base:1")
    assert path.read_bytes() == again.read_bytes()  # nothing of the moment is in it
    with tarfile.open(path) as archive:
        for member in archive:  # every blob is what its name says
            if member.name.startswith("blobs/sha256/") and member.isfile():
                data = archive.extractfile(member)
                assert data is not None and hashlib.sha256(data.read()).hexdigest() == member.name[13:]
        listed = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert [entry["RepoTags"] for entry in listed] == [[two, "other/name:x"], ["base:1"]]
    assert [one.digest for one in _layout(path)] == [before["RepoDigests"][0].partition("@")[2]] * 2 + [_layout(path)[2].digest]
    for kind in (f"docker-archive:{path}:other/name:x", f"oci-archive:{path}:1"):
        found = json.loads(subprocess.run(["skopeo", "inspect", "--config", kind], check=True, capture_output=True, text=True).stdout)
        assert found["rootfs"]["diff_ids"] == before["RootFS"]["Layers"], kind
    engine.docker("rmi", "-f", two, "other/name:x")
    assert "Loaded image: other/name:x" in engine.docker("load", "-i", str(path)).stdout
    after = engine.inspect("other/name:x")
    assert after["Id"] == before["Id"] and after["RootFS"] == before["RootFS"]
    assert engine.docker("run", "--rm", two).stdout == "2"
    engine.docker("tag", "other/name:x", registry.reference("saved:1"))
    pushed = engine.docker("push", registry.reference("saved:1")).stdout
    assert before["RepoDigests"][0].partition("@")[2] in pushed  # it has come through the archive with its digest
    engine.docker("rmi", "-f", "other/name:x", registry.reference("saved:1"))


class _Entry:
    def __init__(self, value: dict[str, Any]) -> None:
        self.digest = value["digest"]


def _layout(path: Path) -> list[_Entry]:
    with tarfile.open(path) as archive:
        index = archive.extractfile("index.json")
        assert index is not None
        return [_Entry(value) for value in json.load(index)["manifests"]]


def test_a_layout_of_several_images(engine: Daemon, registry: Registry, two: str, tmp_path: Path) -> None:
    """Without Docker's manifest.json the archive is an OCI layout, and no less."""
    engine.docker("save", "-o", f"{tmp_path}/both.tar", two, "base:1")
    with tarfile.open(tmp_path / "both.tar") as read, tarfile.open(tmp_path / "layout.tar", "w") as write:
        for member in read:
            if member.name not in ("manifest.json", "repositories"):
                write.addfile(member, read.extractfile(member))
    before = [engine.inspect(name)["Id"] for name in (two, "base:1")]
    engine.docker("rmi", "-f", two, "base:1")
    done = engine.dolium("load", "-i", f"{tmp_path}/layout.tar").stdout
    assert f"Loaded image: {two}" in done and "Loaded image: base:1" in done
    assert [engine.inspect(name)["Id"] for name in (two, "base:1")] == before
    assert engine.docker("run", "--rm", two).stdout == "2"


def test_an_upload_that_breaks_off_is_no_image(engine: Daemon) -> None:
    """Cut between two entries a tar is as whole as any: only the connection tells."""
    data = tar([entry("a", tarfile.DIRTYPE), (entry("a/b"), b"x" * 3000)])[:-512 * 8]
    for path in ("/images/create?fromSrc=-&repo=cut&tag=1", "/images/load"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(engine.socket)
            sock.sendall(f"POST {path} HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n{len(data):x}\r\n".encode() + data + b"\r\n")
    assert engine.docker("run", "--rm", "base:1", "true").returncode == 0
    blobs = engine.folder / "data/content"
    eventually(lambda: not list((blobs / "ingest").glob("tmp-*")), "nothing half done stays")
    assert engine.docker("image", "inspect", "cut:1", check=False).returncode == 1 and not (engine.folder / "data/tmp").exists()
    done = engine.dolium("system", "check")
    assert done.stdout.endswith("all whole\n")


def test_slow_clients_hold_nobody_up(engine: Daemon, tmp_path: Path) -> None:
    """Uploads that do not go on, and an export that nobody reads: a thread each, of their own."""
    engine.docker("create", "--name", "still", "base:1")
    with contextlib.ExitStack() as waiting:
        for number in range(24):
            sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(engine.socket)
            verb = "GET /containers/still/export" if number % 2 else "POST /images/load"
            more = "" if number % 2 else "Transfer-Encoding: chunked\r\n"
            sock.sendall(f"{verb} HTTP/1.1\r\nHost: d\r\n{more}\r\n".encode())
        assert engine.docker("run", "--rm", "base:1", "echo", "on").stdout == "on\n"
        assert engine.dolium("system", "check", "--quick").stdout.endswith("all whole\n")
        engine.docker("export", "-o", str(tmp_path / "read.tar"), "still")
    engine.docker("rm", "still")


def test_save_by_repository_and_id(engine: Daemon, two: str, tmp_path: Path) -> None:
    engine.docker("tag", two, "mine:1")
    engine.docker("tag", "base:1", "mine:2")
    engine.docker("save", "-o", f"{tmp_path}/all.tar", "mine")
    with tarfile.open(tmp_path / "all.tar") as archive:
        listed = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert sorted(tag for entry in listed for tag in entry["RepoTags"]) == ["mine:1", "mine:2"]
    engine.docker("rmi", "mine:1", "mine:2")
    identity = engine.inspect(two)["Id"]
    done = subprocess.run(["skopeo", "inspect", "--raw", f"docker-archive:{tmp_path}/id.tar"], capture_output=True, check=False)
    engine.docker("save", "-o", f"{tmp_path}/id.tar", identity[:19])
    engine.docker("rmi", two)
    assert f"Loaded image ID: {identity}" in engine.docker("load", "-i", f"{tmp_path}/id.tar").stdout
    engine.docker("rmi", identity)
    done = engine.docker("save", "-o", f"{tmp_path}/no.tar", "absent:1", check=False)
    assert done.returncode == 1 and "No such image: absent:1" in done.stderr
    assert engine.dolium("save", "-o", f"{tmp_path}/no.tar", "absent:1", check=False).returncode == 1
    assert not (tmp_path / "no.tar").exists()


CHANGE = """set -e
echo new > /new; mkdir -p /made/deep; echo x > /made/deep/file
echo more >> /etc/passwd; rm /data/seed; rm -rf /home; mkdir /home
ln /new /made/hard; ln -s /new /made/soft; mkfifo /made/pipe 2>/dev/null || true; chmod 600 /etc/group
"""
EXPECTED = {"A /new", "A /made", "A /made/deep", "A /made/deep/file", "A /made/hard", "A /made/soft", "C /etc", "C /etc/passwd",
            "C /etc/group", "C /data", "D /data/seed", "C /home", "D /home/app"}


@pytest.mark.parametrize("running", [True, False])
def test_diff_commit_and_export(engine: Daemon, tmp_path: Path, running: bool) -> None:
    engine.docker("run", "-d", "--name", "work", "-e", "A=1", "-v", "/volume", "base:1", "sh", "-c", CHANGE + "touch /volume/mine; sync; echo done; sleep 1000")
    try:
        eventually(lambda: "done" in engine.docker("logs", "work").stdout, "the changes are made")
        if not running:
            engine.docker("kill", "work")
        for call in (engine.docker, engine.dolium):
            found = set(call("diff", "work").stdout.splitlines())
            assert found >= EXPECTED and not found - EXPECTED - {"A /volume", "A /made/pipe"}
        done = engine.docker("commit", "-a", "me", "-m", "words", "-c", "ENV B=2", "-c", 'CMD ["cat", "/new"]', "work", "made:1")
        identity = done.stdout.strip()
        assert engine.inspect("work")["State"]["Status"] == ("running" if running else "exited")
        other = engine.dolium("commit", "--pause=false", "work", "made:2").stdout.strip()
        one, two = engine.inspect("made:1"), engine.inspect("made:2")
        assert (one["Id"], two["Id"]) == (identity, other) and one["Author"] == "me"
        assert one["RootFS"]["Layers"] == two["RootFS"]["Layers"]  # the same changes are the same layer
        assert one["Config"]["Env"] == ["A=1", "B=2"] and one["Config"]["Cmd"] == ["cat", "/new"] and "Hostname" not in one["Config"]
        history = json.loads(engine.docker("history", "--no-trunc", "--format", "json", "made:1").stdout.splitlines()[0])
        assert history["Comment"] == "words" and history["CreatedBy"].startswith("sh -c")
        assert engine.docker("run", "--rm", "made:1").stdout == "new\n"
        seen = engine.docker("run", "--rm", "made:1", "sh", "-c", "ls /data /home /volume; stat -c %h /made/hard; readlink /made/soft; stat -c %a /etc/group; tail -n1 /etc/passwd").stdout
        assert seen.split() == ["/data:", "/home:", "/volume:", "2", "/new", "600", "more"]
        for name, call in (("docker", engine.docker), ("dolium", engine.dolium)):
            call("export", "-o", f"{tmp_path}/{name}.tar", "work")
            root = files(tmp_path / f"{name}.tar")
            assert root["made/hard"].isfile() and "data/seed" not in root and "volume/mine" not in root and "home" in root
            assert {root["new"].linkname, root["made/hard"].linkname} == {"", "made/hard"} and root["made/soft"].linkname == "/new"
            assert not any(entry.startswith("proc/") for entry in root) and root["bin/busybox"].mode == 0o755
        assert (tmp_path / "docker.tar").read_bytes() == (tmp_path / "dolium.tar").read_bytes()
        engine.docker("import", f"{tmp_path}/docker.tar", "imported:1")
        assert engine.docker("run", "--rm", "imported:1", "cat", "/made/deep/file").stdout == "x\n"
    finally:
        engine.docker("rm", "-fv", "work")
        engine.docker("rmi", "-f", "made:1", "made:2", "imported:1", check=False)


def test_what_a_container_of_the_host_s_root_has_changed(engine: Daemon, tmp_path: Path) -> None:
    """dolium's own state lies in that root: no mount may have both as layers."""
    for flags in ((), ("--userns", "auto")):
        engine.dolium("run", "-d", "--name", "whole", *flags, "--rootfs", "/:O", "sh", "-c",
                      "mkdir /new-here && touch /new-here/f && rm /etc/shells && echo done && sleep 1000")
        try:
            eventually(lambda: "done" in engine.docker("logs", "whole").stdout, "the changes are made")
            found = engine.dolium("diff", "whole").stdout.splitlines()
            assert {"A /new-here", "A /new-here/f", "D /etc/shells"} <= set(found)
            for words in (("export", "-o", str(tmp_path / "x.tar"), "whole"), ("commit", "whole")):
                assert "dolium diff lists what it changed" in engine.dolium(*words, check=False).stderr
            assert not (tmp_path / "x.tar").exists()
            engine.docker("kill", "whole")
            assert engine.dolium("diff", "whole").stdout.splitlines() == found
        finally:
            engine.docker("rm", "-f", "whole")
    # another folder of the host's is exported as any root
    (tmp_path / "root/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tmp_path / "root/bin/sh")
    engine.dolium("run", "--name", "part", "--rootfs", f"{tmp_path}/root:O", "/bin/sh", "-c", "echo new > /file")
    try:
        assert "A /file" in engine.dolium("diff", "part").stdout.splitlines()
        engine.dolium("export", "-o", str(tmp_path / "part.tar"), "part")
        assert {"file", "bin/sh"} <= set(files(tmp_path / "part.tar"))
    finally:
        engine.docker("rm", "-f", "part")


@pytest.mark.parametrize("kind", ["native", "erofs", "userns", "sized"])
def test_the_same_for_every_kind_of_root(tmp_path: Path, kind: str) -> None:
    engine = Daemon(tmp_path, *(("--snapshotter", kind) if kind in ("native", "erofs") else ()))
    more = {"userns": ("--userns", "auto"), "sized": ("--storage-opt", "size=32m")}.get(kind, ())
    engine.start()
    try:
        engine.import_base("base:1", 'CMD ["sh"]')
        engine.dolium("run", "-d", *more, "--name", "work", "base:1", "sh", "-c", CHANGE + "chown 5:6 /made/deep/file; echo done; sleep 1000")
        eventually(lambda: "done" in engine.docker("logs", "work").stdout, "the changes are made")
        found = set(engine.docker("diff", "work").stdout.splitlines())
        assert found - {"A /made/pipe"} == EXPECTED
        engine.docker("commit", "work", "made:1")
        seen = engine.docker("run", "--rm", "made:1", "sh", "-c", "ls /data /home; stat -c '%u %g' /made/deep/file /new; stat -c %h /made/hard; cat /new").stdout
        assert seen.split() == ["/data:", "/home:", "5", "6", "0", "0", "2", "new"]
        engine.docker("export", "-o", f"{tmp_path}/root.tar", "work")
        root = files(tmp_path / "root.tar")
        assert root["made/deep/file"].uid == 5 and root["bin/busybox"].uid == 0 and "data/seed" not in root
        assert engine.dolium("system", "check").stdout.endswith("all whole\n")
    finally:
        engine.close()


def test_a_committed_image_can_be_pushed_and_judged(engine: Daemon, registry: Registry, two: str, tmp_path: Path) -> None:
    engine.docker("run", "--name", "work", two, "sh", "-c", "rm -rf /opt; mkdir /opt; echo 3 > /opt/third; setfattr 2>/dev/null; chown 5:6 /opt/third")
    name = registry.reference("committed:1")
    engine.docker("commit", "work", name)
    engine.docker("rm", "work")
    engine.docker("push", name)
    subprocess.run(["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"oci:{tmp_path}/layout:1"], check=True)
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/layout:1", f"{tmp_path}/bundle"], check=True, capture_output=True)
    third = tmp_path / "bundle/rootfs/opt/third"
    assert os.listdir(third.parent) == ["third"] and (third.stat().st_uid, third.stat().st_gid) == (5, 6)
    manifest = json.loads(subprocess.run(["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"], check=True,
                                         capture_output=True).stdout)
    assert len(manifest["layers"]) == 3
    engine.docker("rmi", name)


def test_a_commit_without_changes_adds_no_layer(engine: Daemon) -> None:
    engine.docker("create", "--name", "same", "base:1", "true")
    engine.docker("commit", "-c", "LABEL a=b", "same", "labelled:1")
    assert engine.inspect("labelled:1")["RootFS"] == engine.inspect("base:1")["RootFS"]
    assert engine.docker("images", "-q", "--filter", "label=a=b").stdout
    assert engine.docker("commit", "absent", check=False).returncode == 1
    done = engine.docker("commit", "-c", "NONSENSE x", "same", check=False)
    assert done.returncode == 1 and "not a valid change command" in done.stderr
    engine.docker("rm", "same")
    engine.docker("rmi", "labelled:1")


def test_prune_df_and_rmi(engine: Daemon, registry: Registry, two: str) -> None:
    engine.docker("tag", "base:1", "loose:1")
    engine.docker("create", "--name", "holds", two)
    (engine.folder / "other.tar").write_bytes(layer({"f": os.urandom(50_000)}))
    engine.docker("import", str(engine.folder / "other.tar"), "loose:1")
    engine.docker("import", "-c", "LABEL keep=yes", str(engine.folder / "other.tar"))
    rows = {row["Type"]: row for row in map(json.loads, engine.docker("system", "df", "--format", "json").stdout.splitlines())}
    assert rows["Images"]["TotalCount"] == "4" and rows["Images"]["Active"] == "1" and rows["Containers"]["TotalCount"] == "1"
    ours = {row["Type"]: row for row in map(json.loads, engine.dolium("system", "df", "--format", "json").stdout.splitlines())}
    assert ours["Images"]["TotalCount"] == 4 and ours["Image blobs"]["Size"] > 50_000
    for call in (engine.docker, engine.dolium):
        assert "UNIQUE SIZE" in call("system", "df", "-v").stdout
    done = engine.docker("image", "prune", "-f", "--filter", "label!=keep")
    assert "Total reclaimed space: 0B" in done.stdout
    done = engine.dolium("image", "prune", "-f", "--filter", "until=24h")
    assert "Total reclaimed space: 0B" in done.stdout
    done = engine.dolium("image", "prune", "-f")
    assert "deleted: sha256:" in done.stdout  # the layer is another image's, too
    done = engine.docker("image", "prune", "-af", "--filter", "label!=nothing")
    assert "loose:1" in done.stdout and "untagged: base:1" in done.stdout and two not in done.stdout
    assert engine.docker("run", "--rm", two).stdout == "2"
    done = engine.docker("rmi", two, check=False)
    assert done.returncode == 1 and "conflict" in done.stderr
    assert "Untagged" in engine.docker("rmi", "-f", two).stdout
    assert [row.split()[:2] for row in engine.docker("images").stdout.splitlines()[1:]] == [["<none>", "<none>"]]
    assert engine.docker("image", "prune", "-af").stdout.startswith("Total reclaimed space: 0B")
    assert engine.docker("start", "-a", "holds").stdout == "2"  # what a container needs is never taken away
    done = engine.docker("system", "prune", "-af", "--volumes")
    assert "Deleted Containers" in done.stdout and "Deleted Images" in done.stdout
    assert engine.docker("images", "-aq").stdout == "" and not list((engine.folder / "data/content/blobs/sha256").iterdir())
    done = engine.dolium("image", "prune", check=False)
    assert done.returncode == 125 and "--force" in done.stderr
    assert engine.dolium("system", "prune", "-f").stdout == "Total reclaimed space: 0B\n"
    engine.import_base("base:1", 'CMD ["sh"]')


def test_rmi_by_id_and_dangling(engine: Daemon) -> None:
    engine.docker("tag", "base:1", "a/one:1")
    identity = engine.inspect("base:1")["Id"]
    done = engine.docker("rmi", identity, check=False)
    assert "referenced in multiple repositories" in done.stderr
    assert "Untagged: a/one:1" in engine.docker("rmi", "a/one:1").stdout
    (engine.folder / "x.tar").write_bytes(layer({"x": b"x"}))
    nameless = engine.docker("import", str(engine.folder / "x.tar")).stdout.strip()
    assert nameless[7:19] in engine.docker("images", "-q", "--filter", "dangling=true").stdout
    assert f"Deleted: {nameless}" in engine.docker("rmi", nameless[7:19]).stdout
    assert "No such image" in engine.docker("rmi", nameless[7:19], check=False).stderr


def test_the_archive_ends_when_the_client_does(engine: Daemon, two: str) -> None:
    """A reader that goes away in the middle holds nothing: the image can go."""
    reader = subprocess.Popen([DOCKER, "save", two], stdout=subprocess.PIPE, env=engine.env, bufsize=0)
    assert reader.stdout is not None and reader.stdout.read(512)
    reader.kill()
    reader.wait()
    reader.stdout.close()
    engine.docker("rmi", two)
    blobs = engine.folder / "data/content/blobs/sha256"
    left = {path.name for path in blobs.iterdir()}
    eventually(lambda: {path.name for path in blobs.iterdir()} <= left, "the blobs go")
