"""Images through the daemon: pulled from a real registry, loaded, imported, tagged, removed; published ports of what runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DOLIUM, Daemon, base_tar, eventually
from registry import Registry, image, index, layer
from terminal import Terminal

pytestmark = pytest.mark.leaves("links", "nft")


def push(archive: Path, target: str) -> None:
    """A docker archive to the registry, by skopeo."""
    subprocess.run(["skopeo", "copy", "-q", "--dest-tls-verify=false", f"docker-archive:{archive}", f"docker://{target}"],
                   check=True, capture_output=True, timeout=120)


def archive_of(folder: Path, root: Path, name: str) -> Path:
    """A root file system's tar as a one-layer docker archive, by umoci and skopeo."""
    layout = folder / f"{name}-layout"
    run = lambda *words: subprocess.run(words, check=True, capture_output=True, timeout=120)  # noqa: E731
    run("umoci", "init", "--layout", str(layout))
    run("umoci", "new", "--image", f"{layout}:1")
    bundle = folder / f"{name}-bundle"
    run("umoci", "unpack", "--image", f"{layout}:1", str(bundle))
    run("tar", "-xf", str(root), "-C", str(bundle / "rootfs"), "--exclude=./dev/*")
    run("umoci", "repack", "--image", f"{layout}:1", str(bundle))
    run("umoci", "config", "--image", f"{layout}:1", "--config.cmd", "sh", "--config.env", "WHO=image")
    run("skopeo", "copy", "-q", f"oci:{layout}:1", f"docker-archive:{folder}/{name}.tar:{name}:1")
    shutil.rmtree(bundle)
    return folder / f"{name}.tar"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        yield one


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("busybox")
    (folder / "root.tar").write_bytes(base_tar())
    return archive_of(folder, folder / "root.tar", "bb")


def test_pull_run_tag_and_remove(engine: Daemon, registry: Registry, busybox: Path) -> None:
    name = registry.reference("bb:1")
    push(busybox, name)
    done = engine.docker("run", "--rm", name, "sh", "-c", "echo $WHO")
    assert done.stdout == "image\n"
    assert "Pull complete" in done.stderr or "Pulling from" in done.stderr
    assert "Image is up to date" in engine.docker("pull", name).stdout
    engine.docker("tag", name, "mine:2")
    short = engine.docker("images", "-q", "mine:2").stdout.split()
    assert len(short) == 1
    assert short[0] in engine.docker("images", "-q", "--no-trunc", name).stdout
    engine.docker("create", "--name", "user", "mine:2")
    engine.docker("rmi", name)
    done = engine.docker("rmi", "mine:2", check=False)
    assert done.returncode == 1
    assert "conflict" in done.stderr
    assert "container" in done.stderr
    engine.docker("rm", "user")
    engine.docker("rmi", "mine:2")
    assert "No such image" in engine.docker("inspect", "--type", "image", name, check=False).stderr
    done = engine.dolium("pull", name)
    assert "Digest: sha256:" in done.stdout
    assert engine.dolium("run", "--rm", name, "id", "-u").stdout == "0\n"
    engine.dolium("rmi", name)


def test_a_missing_name_and_a_dead_registry_are_told(engine: Daemon, registry: Registry) -> None:
    done = engine.docker("pull", registry.reference("nothing:1"), check=False)
    assert done.returncode == 1
    assert "nothing" in done.stderr
    done = engine.docker("pull", "127.0.0.1:1/x:1", check=False)
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr


def test_what_was_pulled_by_digest_is_listed_by_its_repository(engine: Daemon, registry: Registry) -> None:
    files = image([base_tar()], config={"Cmd": ["echo", "by digest"]})
    registry.push("team/pinned", "1", files)
    repository = registry.reference("team/pinned")
    for tag in (":1", ":absent", ""):  # the digest decides, whatever the tag says
        pinned = f"{repository}{tag}@{files.digest}"
        engine.dolium("pull", pinned)
        assert engine.docker("run", "--rm", pinned).stdout == "by digest\n"
    for call in (engine.docker, engine.dolium):
        for wanted in (repository, f"{repository}*"):
            line = call("images", "--digests", "--no-trunc", wanted).stdout.splitlines()[1].split()
            assert line[:3] == [repository, "<none>", files.digest]
        assert "base" in call("images", "-f", "until=0s").stdout and repository not in call("images", "base").stdout
        assert call("images", "-q", "-f", "until=2001-01-01").stdout == ""
    engine.docker("tag", f"{repository}@{files.digest}", "pinned:2")
    assert [line.split()[:2] for line in engine.dolium("images", "-f", "before=base:1").stdout.splitlines()[1:]] == [
        ["pinned", "2"], [repository, "<none>"]]
    engine.docker("rmi", "pinned:2", f"{repository}@{files.digest}")


def test_an_image_for_another_machine_is_pulled_anew(engine: Daemon, registry: Registry) -> None:
    variants = {f"linux/arm/{one}": image([base_tar()], config={"Cmd": ["echo", one]}, architecture="arm") for one in ("v6", "v7")}
    registry.push("machines", "1", index({"linux/amd64": image([base_tar()], config={"Cmd": ["echo", "amd64"]}), **variants}))
    name = registry.reference("machines:1")
    for call, command in ((engine.docker, "run"), (engine.dolium, "run"), (engine.dolium, "create")):
        assert call("run", "--rm", "--platform", "linux/amd64", name).stdout == "amd64\n"
        done = call(command, "--pull", "never", "--platform", "linux/arm/v7", name, check=False)
        assert done.returncode != 0
        assert f"No such image: {name} for linux/arm/v7: the one that is here is for linux/amd64" in done.stderr
        assert "Unable to find image" in call(command, "--platform", "linux/arm/v6", "--name", "other", name).stderr
        assert engine.inspect("other")["Config"]["Cmd"] == ["echo", "v6"]  # it runs, too: its busybox is the host's
        engine.docker("rm", "other")
    assert "invalid platform" in engine.dolium("create", "--platform", "a/b/c/d", name, check=False).stderr
    engine.docker("rmi", name)
    assert engine.docker("images", "-aq").stdout.count("\n") == 2  # base:1, and amd64 without a name
    engine.docker("image", "prune", "-f")


def test_bars_on_a_terminal_and_lines_elsewhere(engine: Daemon, registry: Registry) -> None:
    registry.push("bars", "1", image([base_tar(), layer({"big": os.urandom(1 << 20)})]))
    name = registry.reference("bars:1")
    terminal = Terminal(engine, DOLIUM, "pull", name)
    seen = terminal.expect("Downloaded newer image")
    assert terminal.end() == 0
    assert re.search(r"\x1b\[\d+A\r\x1b\[2K[0-9a-f]{12}: (Downloading|Extracting) \[=+>? *\] [\d.]+[kM]B/[\d.]+[kM]B\x1b\[\d+B", seen)
    engine.dolium("tag", name, registry.reference("other/bars:1"))
    terminal = Terminal(engine, DOLIUM, "push", registry.reference("other/bars:1"))
    assert re.search(r"\x1b\[2K[0-9a-f]{12}: (Pushed|Mounted from bars)\x1b\[", terminal.expect("digest: sha256:"))
    assert terminal.end() == 0
    engine.dolium("rmi", name, registry.reference("other/bars:1"))
    plain = engine.dolium("pull", name).stdout
    assert "\x1b" not in plain and ": Pull complete\n" in plain and "[" not in plain
    engine.dolium("rmi", name)


def test_load_and_history(engine: Daemon, busybox: Path) -> None:
    done = engine.docker("load", "-i", str(busybox))
    assert "Loaded image: bb:1" in done.stdout
    assert engine.docker("run", "--rm", "bb:1", "echo", "loaded").stdout == "loaded\n"
    assert "CREATED BY" in engine.docker("history", "bb:1").stdout
    engine.docker("rmi", "bb:1")
    assert "Loaded image: bb:1" in engine.dolium("load", "-i", str(busybox)).stdout
    engine.docker("rmi", "bb:1")
    bad = engine.folder / "bad.tar"
    bad.write_bytes(b"no archive" * 100)
    done = engine.docker("load", "-i", str(bad), check=False)
    assert done.returncode == 1
    assert done.stderr


def test_debian_made_with_mmdebstrap(engine: Daemon, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("debian")
    done = subprocess.run(["mmdebstrap", "--variant=minbase", "--quiet", "bookworm", str(folder / "root.tar")],
                          capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    name = registry.reference("debian:12")
    push(archive_of(folder, folder / "root.tar", "debian"), name)
    shutil.rmtree(folder)
    engine.docker("pull", "-q", name, timeout=120)
    assert engine.docker("run", "--rm", name, "cat", "/etc/os-release").stdout.startswith("PRETTY_NAME=\"Debian GNU/Linux 12")
    text = engine.docker("run", "--rm", name, "bash", "-c", "dpkg -l | wc -l; su nobody -s /bin/sh -c 'id -un'; perl -e 'print 6*7'").stdout
    assert text.split()[1:] == ["nobody", "42"]
    engine.docker("rmi", name)


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_published_port_answers(engine: Daemon, host: str) -> None:
    spec = f"{host}::8000" if host else "8000"
    engine.docker("run", "-d", "--name", "web", "-p", spec, "base:1", "sh", "-c",
                  "mkdir /www; echo served > /www/index.html; httpd -f -p 8000 -h /www")
    try:
        port = int(engine.docker("port", "web", "8000").stdout.splitlines()[0].rpartition(":")[2])

        def fetch() -> str:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    return str(answer.read().decode())
            except OSError:
                return ""

        assert eventually(fetch, "the web server answers") == "served\n"
        done = engine.docker("run", "--rm", "-p", f"127.0.0.1:{port}:1", "base:1", "true", check=False)
        assert done.returncode == 125
        assert "port is already allocated" in done.stderr
        address = engine.inspect("web")["NetworkSettings"]["IPAddress"]
        assert engine.docker("run", "--rm", "base:1", "wget", "-q", "-O", "-", f"http://{address}:8000/").stdout == "served\n"
        assert re.search("->8000/tcp", engine.docker("ps").stdout)
    finally:
        engine.docker("rm", "-f", "web")
    assert fetch() == ""


def test_containers_have_addresses_and_a_way_out(engine: Daemon) -> None:
    text = engine.docker("run", "--rm", "-h", "me", "base:1", "sh", "-c", "ip -4 addr show eth0; ip route; grep me /etc/hosts").stdout
    address = re.search(r"inet (\d+\.\d+\.\d+\.\d+)/", text)
    assert address
    assert "default via" in text
    assert re.search(rf"^{re.escape(address.group(1))}\s+me$", text, re.MULTILINE)
