"""Volumes and mounts, by the docker command line and by dolium's own."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemon import Daemon, eventually

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background


def test_volumes_are_made_listed_and_pruned(engine: Daemon) -> None:
    for name, label in (("one", "team=a"), ("two", "team=b"), ("three", "keep")):
        assert engine.dolium("volume", "create", "--label", label, name).stdout == f"{name}\n"
    nameless = engine.docker("volume", "create").stdout.strip()
    engine.docker("create", "--name", "user", "-v", "two:/data", "base:1", "true")
    try:
        for words, names in ((("name=t",), ["three", "two"]), (("label=team",), ["one", "two"]), (("label=team=a",), ["one"]),
                             (("dangling=false",), ["two"]), (("driver=other",), []),
                             (("label=team", "dangling=true"), ["one"])):
            chosen = [word for one in words for word in ("--filter", one)]
            for client in (engine.docker, engine.dolium):
                listed = client("volume", "ls", "-q", *chosen).stdout.split()
                assert [name for name in listed if name != nameless] == names
        assert "invalid filter 'size'" in engine.docker("volume", "ls", "--filter", "size=1", check=False).stderr
        found = json.loads(engine.dolium("volume", "inspect", "one").stdout)[0]
        assert (found["Labels"], found["Scope"], found["Driver"]) == ({"team": "a"}, "local", "local")
        engine.docker("run", "--rm", "-v", "one:/v", "base:1", "sh", "-c", "head -c 1048576 /dev/zero > /v/f")
        assert engine.dolium("volume", "prune", "-f").stdout.startswith(f"Deleted Volumes:\n{nameless}\n\n")
        done = engine.docker("volume", "prune", "-af", "--filter", "label!=keep").stdout
        assert done.startswith("Deleted Volumes:\none\n\n")
        assert "1.0" in done.splitlines()[-1]
        assert engine.dolium("volume", "ls", "-q").stdout.split() == ["three", "two"]
        done = engine.dolium("volume", "rm", "two", "absent", "three", check=False)
        assert (done.stdout, done.returncode) == ("three\n", 1)
        assert "volume is in use" in done.stderr
        assert "no such volume" in done.stderr
    finally:
        engine.docker("rm", "user", check=False)
        engine.docker("volume", "rm", "-f", "one", "two", "three", check=False)


def test_volumes_from_another_container(engine: Daemon, tmp_path: Path) -> None:
    engine.docker("run", "--name", "owner", "-v", "/data", "-v", f"{tmp_path}:/host", "base:1", "sh", "-c", "echo a > /data/f")
    try:
        for client in (engine.docker, engine.dolium):
            done = client("run", "--rm", "--volumes-from", "owner:ro", "base:1", "sh", "-c",
                          "cat /data/f; touch /data/x || touch /host/x || echo refused", check=False)
            assert done.stdout == "a\nrefused\n", done.stderr
        engine.docker("run", "--name", "heir", "--volumes-from", "owner", "-v", "own:/host", "base:1", "sh", "-c",
                      "echo b >> /data/f; touch /host/x")
        assert not (tmp_path / "x").exists()
        engine.docker("rm", "-v", "owner")
        assert engine.docker("run", "--rm", "--volumes-from", "heir", "base:1", "cat", "/data/f").stdout == "a\nb\n"
        engine.docker("rm", "-v", "heir")
        assert engine.docker("volume", "ls", "-q").stdout == "own\n"
    finally:
        engine.docker("rm", "-fv", "owner", "heir", check=False)
        engine.docker("volume", "rm", "-f", "own", check=False)


def test_a_subpath_never_leads_out_of_its_volume(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host\n")
    (tmp_path / "new").write_text("new\n")

    def at(subpath: str, *command: str) -> subprocess.CompletedProcess[str]:
        return engine.docker("run", "--rm", "--mount", f"type=volume,src=parts,dst=/m,volume-subpath={subpath}", "base:1",
                             *command, check=False)
    try:
        engine.docker("run", "--rm", "-v", "parts:/v", "base:1", "sh", "-c",
                      f"mkdir -p /v/a/b && echo in > /v/a/b/f && ln -s {tmp_path} /v/out && ln -s a /v/in && mkdir -p /v{tmp_path}")
        assert at("a/b", "cat", "/m/f").stdout == "in\n"
        assert at("in/b", "cat", "/m/f").stdout == "in\n"
        assert at("a/b/f", "cat", "/m").stdout == "in\n"
        assert at("out", "ls", "/m").stdout == ""  # the folder of that name in the volume
        done = at("absent", "true")
        assert (done.returncode != 0, "no such file or directory" in done.stderr) == (True, True), done.stderr
        engine.docker("create", "--name", "part", "--mount", "type=volume,src=parts,dst=/m,volume-subpath=a/b", "base:1",
                      "cat", "/m/new")
        engine.docker("cp", str(tmp_path / "new"), "part:/m/new")
        assert engine.docker("start", "-a", "part").stdout == "new\n"
    finally:
        engine.docker("rm", "-f", "part", check=False)
        engine.docker("volume", "rm", "-f", "parts", check=False)


def test_what_is_mounted_below_a_bind_mount(engine: Daemon, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(below)], check=True)
    try:
        (below / "f").touch()
        for client in (engine.docker, engine.dolium):
            for keys, expected in (("readonly", "f\nro\n"), ("readonly,bind-recursive=writable", "f\nrw\n"),
                                   ("readonly,bind-recursive=readonly,bind-propagation=rprivate", "f\nro\n"),
                                   ("bind-recursive=disabled", "rw\n")):
                done = client("run", "--rm", "--mount", f"type=bind,src={tmp_path},dst=/m,{keys}", "base:1", "sh", "-c",
                              "ls /m/below; touch /m/below/x 2>/dev/null && echo rw || echo ro; rm -f /m/below/x")
                assert done.stdout == expected, keys
        done = engine.dolium("run", "--mount", f"type=bind,src={tmp_path},dst=/m,bind-recursive=readonly", "base:1", "true",
                             check=False)
        assert "requires 'readonly' to be specified in conjunction" in done.stderr
    finally:
        subprocess.run(["umount", str(below)], check=True)


def test_idmapped_bind_mounts(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.chown(tmp_path / "f", 1000, 1000)
    tmp_path.chmod(0o755)
    seen = ("base:1", "stat", "-c", "%u:%g", "/m/f")
    bind = f"type=bind,src={tmp_path},dst=/m"
    assert engine.dolium("run", "--rm", "--userns", "auto", "--mount", f"{bind},idmap", *seen).stdout == "1000:1000\n"
    assert engine.dolium("run", "--rm", "--userns", "auto", "-v", f"{tmp_path}:/m:idmap,z", *seen).stdout == "1000:1000\n"
    assert engine.dolium("run", "--rm", "--userns", "auto", "-v", f"{tmp_path}:/m:Z", *seen).stdout == "65534:65534\n"
    assert engine.docker("run", "--rm", "-v", f"{tmp_path}:/m:idmap=uids=1000-3-1;gids=1000-4-1,Z", *seen).stdout == "3:4\n"
    mapping = "idmap=uids=1000-0-1;gids=1000-7-1"
    assert engine.dolium("run", "--rm", "--mount", f"{bind},{mapping}", *seen).stdout == "0:7\n"
    done = engine.dolium("run", "--rm", "--mount", f"{bind},idmap", *seen, check=False)
    assert "idmap: the container has no user namespace of its own" in done.stderr


def mounts_below(engine: Daemon) -> list[str]:
    with open("/proc/self/mountinfo") as file:
        return [line.split()[4] for line in file if line.split()[4].startswith(f"{engine.folder}/data/volumes/")]


def test_containers_that_start_together_find_a_new_volume_filled(engine: Daemon) -> None:
    engine.docker("run", "--name", "source", "base:1", "sh", "-c", "for i in $(seq 2000); do : >/data/$i; done")
    engine.docker("commit", "source", "many:1")
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: engine.docker("run", "--rm", "-v", "together:/data", "many:1", "sh", "-c", "ls /data | wc -l",
                                                     check=False), range(4)))
    assert [(one.returncode, one.stdout.strip()) for one in done] == [(0, "2001")] * 4, [one.stderr for one in done]
    engine.docker("rm", "source")
    engine.docker("volume", "rm", "together")
    engine.docker("rmi", "many:1")


def test_a_tmpfs_volume_lives_as_long_as_a_container_has_it(engine: Daemon) -> None:
    engine.docker("volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=1m,uid=7,nosuid", "mem")
    try:
        found = json.loads(engine.docker("volume", "inspect", "mem").stdout)[0]
        assert found["Options"] == {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,uid=7,nosuid"}
        assert mounts_below(engine) == []
        engine.docker("run", "-d", "--name", "holder", "-v", "mem:/data", "base:1", "sh", "-c", "echo kept > /data/f; sleep 99")
        other = ("run", "--rm", "-v", "mem:/m", "base:1", "sh", "-c")
        done = engine.dolium(*other, "until test -e /m/f; do :; done; cat /m/f; stat -c %u /m; grep ' /m ' /proc/mounts; ls /m;"
                             " head -c 2097152 /dev/zero > /m/big || rm /m/big")
        kept, owner, line, listed = done.stdout.splitlines()
        # it begins empty: the image's /data is not in it
        assert (kept, owner, listed) == ("kept", "7", "f")
        assert "nosuid" in line.split()[3].split(",")
        assert engine.docker(*other, "cat /m/f").stdout == "kept\n"
        assert len(mounts_below(engine)) == 1
        engine.docker("rm", "-f", "holder")
        assert mounts_below(engine) == []
        assert engine.docker(*other, "ls /m").stdout == ""
    finally:
        engine.docker("rm", "-f", "holder", check=False)
        engine.docker("volume", "rm", "-f", "mem", check=False)
    assert mounts_below(engine) == []


def test_a_tmpfs_volume_outlives_the_daemon_as_its_container_does(tmp_path: Path) -> None:
    own = Daemon(tmp_path)
    own.start()
    try:
        own.import_base()
        own.docker("run", "-d", "--name", "holder", "--mount", "type=volume,src=mem,dst=/m,volume-opt=type=tmpfs,"
                   "volume-opt=device=tmpfs", "base:1", "sh", "-c", "echo kept > /m/f; exec sleep 99")
        pid = own.inspect("holder")["State"]["Pid"]
        eventually(lambda: own.docker("exec", "holder", "ls", "/m").stdout == "f\n", "the file is there")
        own.kill()
        own.start()
        assert own.docker("run", "--rm", "-v", "mem:/m", "base:1", "cat", "/m/f").stdout == "kept\n"
        assert len(mounts_below(own)) == 1
        own.kill()
        os.kill(pid, 9)
        own.start()
        assert mounts_below(own) == []
        assert own.docker("run", "--rm", "-v", "mem:/m", "base:1", "ls", "/m").stdout == ""
    finally:
        own.close()


def test_a_volume_that_is_a_folder_of_the_host(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine\n")
    (tmp_path / "empty").mkdir()
    try:
        for name, options in (("full", "bind,ro"), ("empty", "bind")):
            engine.dolium("volume", "create", "-o", "type=none", "-o", f"device={tmp_path}/{name}", "-o", f"o={options}", name)
        done = engine.docker("run", "--rm", "-v", "full:/v", "base:1", "sh", "-c", "ls /v; touch /v/x || echo ro")
        assert done.stdout == "mine\nro\n", done.stderr
        engine.docker("run", "--rm", "-v", "empty:/etc", "base:1", "true")
        assert (tmp_path / "empty/passwd").exists(), "what the image has there becomes its first content"
        assert sorted(path.name for path in (tmp_path / "empty").iterdir() if path.name.startswith(".")) == []
        # a stopped container's is mounted as long as it is copied to
        engine.docker("create", "--name", "still", "-v", "empty:/v", "base:1", "true")
        engine.docker("cp", str(tmp_path / "full/mine"), "still:/v/copied")
        assert (tmp_path / "empty/copied").read_text() == "mine\n"
        assert mounts_below(engine) == []
        engine.docker("rm", "still")
        engine.docker("volume", "rm", "full", "empty")
        assert (tmp_path / "full/mine").exists()
        assert (tmp_path / "empty/copied").exists()
    finally:
        engine.docker("rm", "-f", "still", check=False)
        engine.docker("volume", "rm", "-f", "full", "empty", check=False)


def test_a_volume_with_a_size_is_full_in_time(engine: Daemon) -> None:
    try:
        engine.docker("volume", "create", "--opt", "size=8m", "small")
        done = engine.docker("run", "--rm", "-v", "small:/etc", "base:1", "sh", "-c",
                             "ls /etc/passwd; dd if=/dev/zero of=/etc/big bs=1M count=16 && echo fits || ls -d /etc/lost+found",
                             check=False)
        assert done.stdout == "/etc/passwd\n", done.stderr
        assert "No space left" in done.stderr or "quota" in done.stderr.lower()
        assert engine.docker("run", "--rm", "-v", "small:/v", "base:1", "ls", "/v/passwd").stdout == "/v/passwd\n"
        df = json.loads(engine.api("GET", "/system/df?type=volume")[1])["Volumes"]
        assert 0 < next(one["UsageData"]["Size"] for one in df if one["Name"] == "small") < 12 << 20
        assert mounts_below(engine) == []
        engine.docker("volume", "rm", "small")
    finally:
        engine.docker("volume", "rm", "-f", "small", check=False)


def test_options_of_a_volume_that_are_wrong_change_nothing(engine: Daemon, tmp_path: Path) -> None:
    def create(*options: str) -> str:
        words = [word for option in options for word in ("--opt", option)]
        done = engine.docker("volume", "create", *words, "wrong", check=False)
        assert done.returncode == 1
        return done.stderr
    assert "invalid option: 'kind'" in create("kind=tmpfs")
    assert "missing required option: 'device'" in create("type=tmpfs")
    assert "missing required option: 'device'" in create("o=size=1m")
    assert "at least 4 MiB" in create("size=1m")
    assert "invalid volume size" in create("size=much")
    assert "needs o=bind" in create("type=none", "device=/tmp", "o=ro")
    assert "size is for a volume without a type" in create("size=8m", "type=tmpfs", "device=tmpfs")
    for body, expected in (({"Name": 5}, "Name must be a text"), ({"DriverOpts": [1]}, "DriverOpts must be an object"),
                           ({"DriverOpts": {"size": 5}}, "objects of texts"), ({"Name": "a" * 256}, "more than 255 characters")):
        status, said = engine.api("POST", "/volumes/create", body)
        assert (status, expected in said.decode()) == (400, True), said
    assert engine.docker("volume", "ls", "-q").stdout == ""
    try:
        engine.docker("volume", "create", "--opt", "type=none", "--opt", f"device={tmp_path}/absent", "--opt", "o=bind", "gone")
        engine.docker("volume", "create", "--opt", "type=ext4", "--opt", f"device={tmp_path}", "--opt", "o=frobnicate", "odd")
        engine.docker("volume", "create", "--opt", "type=cifs", "--opt", "device=//127.0.0.1/x", "--opt",
                      "o=addr=absent..test,username=u,password=secret", "far")
        for name, reason, code in (("gone", "no such file or directory", 127), ("odd", "frobnicate", 125),
                                   ("far", "absent..test,username=u,password=****", 125)):
            done = engine.docker("run", "--rm", "-v", f"{name}:/v", "base:1", "true", check=False)
            assert done.returncode == code
            assert "failed to mount local volume" in done.stderr
            assert reason in done.stderr
        assert mounts_below(engine) == []
    finally:
        engine.docker("volume", "rm", "-f", "gone", "odd", "far", check=False)


def test_a_volume_is_attached_to_a_container_that_runs_and_detached(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "live", "base:1", "sleep", "600")
    try:
        engine.docker("run", "--rm", "-v", "more:/v", "base:1", "sh", "-c", "echo more > /v/f")
        assert engine.dolium("volume", "attach", "live", "more:/mnt/a/b").stdout == "more:/mnt/a/b\n"
        assert engine.docker("exec", "live", "cat", "/mnt/a/b/f").stdout == "more\n"
        # first use takes what is there
        engine.dolium("volume", "attach", "live", "fresh:/data:ro")
        assert engine.docker("exec", "live", "ls", "/data").stdout == "seed\n"
        assert engine.docker("exec", "live", "touch", "/data/x", check=False).returncode != 0
        there = {mount["Destination"]: (mount["Name"], mount["RW"]) for mount in engine.inspect("live")["Mounts"]}
        assert there == {"/mnt/a/b": ("more", True), "/data": ("fresh", False)}
        assert "volume is in use" in engine.docker("volume", "rm", "more", check=False).stderr
        engine.docker("restart", "-t", "0", "live")
        assert engine.docker("exec", "live", "cat", "/mnt/a/b/f").stdout == "more\n"

        engine.docker("exec", "-d", "live", "sh", "-c", "cd /mnt/a/b; exec sleep 600")
        eventually(lambda: "/mnt/a/b" in engine.docker("exec", "live", "sh", "-c", "ls -l /proc/*/cwd; true").stdout, "it is there")
        done = engine.dolium("volume", "detach", "live", "more", check=False)
        assert done.returncode == 1
        assert "Device or resource busy" in done.stderr and "--force" in done.stderr
        assert engine.dolium("volume", "detach", "--force", "live", "more").stdout == "more:/mnt/a/b\n"
        assert engine.docker("exec", "live", "ls", "/mnt/a/b").stdout == ""
        assert engine.dolium("volume", "detach", "live", "/data/").stdout == "fresh:/data\n"
        assert engine.docker("exec", "live", "ls", "/data").stdout == "seed\n"
        assert engine.inspect("live")["Mounts"] == []
        engine.docker("volume", "rm", "more", "fresh")
        for words, expected in ((("attach", "live", "more"), "names no volume"),
                                (("attach", "live", "/tmp:/x"), "names no volume"), (("attach", "live", "more:/proc/x"), "the kernel's"),
                                (("attach", "absent", "more:/x"), "No such container"), (("detach", "live", "more"), "has no volume more"),
                                (("attach", "live"), "takes CONTAINER VOLUME")):
            done = engine.dolium("volume", *words, check=False)
            assert done.returncode != 0
            assert expected in done.stderr, done.stderr
        assert engine.docker("volume", "ls", "-q").stdout == ""
        # of a container that does not run: at its next start
        engine.docker("stop", "-t", "0", "live")
        engine.dolium("volume", "attach", "live", "more:/mnt")
        engine.docker("start", "live")
        assert " /mnt " in engine.docker("exec", "live", "cat", "/proc/mounts").stdout
        engine.docker("stop", "-t", "0", "live")
        engine.dolium("volume", "detach", "live", "more")
        engine.docker("start", "live")
        assert " /mnt " not in engine.docker("exec", "live", "cat", "/proc/mounts").stdout
    finally:
        engine.docker("rm", "-f", "live", check=False)
        engine.docker("volume", "rm", "-f", "more", "fresh", check=False)


def test_an_attached_volume_has_the_owners_that_are_seen_inside(engine: Daemon) -> None:
    engine.docker("run", "--rm", "-v", "owned:/v", "base:1", "sh", "-c", "touch /v/f && chown 5:6 /v/f")
    engine.dolium("run", "-d", "--name", "mapped", "--userns", "auto", "--read-only", "base:1", "sleep", "600")
    try:
        done = engine.dolium("volume", "attach", "mapped", "owned:/absent", check=False)
        assert "Read-only file system" in done.stderr and "name a folder that is there" in done.stderr
        engine.dolium("volume", "attach", "mapped", "owned:/data")
        assert engine.docker("exec", "mapped", "stat", "-c", "%u:%g", "/data/f").stdout == "5:6\n"
        engine.docker("exec", "mapped", "touch", "/data/own")
        assert engine.docker("run", "--rm", "-v", "owned:/v", "base:1", "stat", "-c", "%u", "/v/own").stdout == "0\n"
        engine.dolium("volume", "detach", "mapped", "owned")
    finally:
        engine.docker("rm", "-f", "mapped", check=False)
        engine.docker("volume", "rm", "-f", "owned", check=False)


def test_a_zero_byte_is_in_no_place(engine: Daemon) -> None:
    engine.docker("create", "--name", "zero", "base:1")
    try:
        assert engine.api("POST", "/dolium/containers/zero/volumes", {"Volume": "zeros:/a\0b"})[0] == 400
        assert "zeros" not in engine.docker("volume", "ls", "-q").stdout
    finally:
        engine.docker("rm", "zero")


def test_a_fresh_volume_takes_what_a_host_s_root_has(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/f").write_text("there\n")
    engine.dolium("run", "-d", "--name", "whole", "--rootfs", "/:O", "sleep", "600")
    try:
        engine.dolium("volume", "attach", "whole", f"taken:{tmp_path}/inside")
        engine.docker("exec", "whole", "sh", "-c", f"echo own >> {tmp_path}/inside/f")
        assert engine.docker("run", "--rm", "-v", "taken:/v", "base:1", "cat", "/v/f").stdout == "there\nown\n"
        assert (tmp_path / "inside/f").read_text() == "there\n"
    finally:
        engine.docker("rm", "-f", "whole", check=False)
        engine.docker("volume", "rm", "-f", "taken", check=False)


def test_links_of_a_container_lead_neither_an_attach_nor_a_detach_astray(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "sly", "base:1", "sleep", "600")
    try:
        engine.docker("exec", "sly", "sh", "-c", "mkdir /a && ln -s /proc /a/link && ln -s /proc /direct")
        for target in ("/a/link/sys", "/direct"):
            done = engine.dolium("volume", "attach", "sly", f"vol:{target}", check=False)
            assert "a symbolic link is in the way" in done.stderr, done.stderr
        assert engine.inspect("sly")["Mounts"] == []
        engine.dolium("volume", "attach", "sly", "vol:/a/bus")
        # the folder on the way becomes a link to where the kernel's files are read-only: they stay so
        engine.docker("exec", "sly", "sh", "-c", "mv /a /b && ln -s /proc /a")
        before = engine.docker("exec", "sly", "cat", "/proc/mounts").stdout
        assert " /proc/bus proc ro" in before
        for force in ([], ["--force"]):
            done = engine.dolium("volume", "detach", *force, "sly", "vol", check=False)
            assert "the container has put a symbolic link in the way" in done.stderr, done.stderr
        engine.docker("exec", "sly", "sh", "-c", "rm /a && mkdir -p /a/bus")
        assert "it is not at /a/bus any more" in engine.dolium("volume", "detach", "sly", "vol", check=False).stderr
        assert engine.docker("exec", "sly", "cat", "/proc/mounts").stdout == before
        engine.docker("exec", "sly", "sh", "-c", "rm -r /a && mv /b /a")
        engine.dolium("volume", "detach", "sly", "vol")
    finally:
        engine.docker("rm", "-f", "sly", check=False)
        engine.docker("volume", "rm", "-f", "vol", check=False)
