"""Which level and runtime a container has; what a runtime says, in our words."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable, Unimplemented
from dolium.isolation import levels, oci
from dolium.isolation.base import Wish
from dolium.isolation.levels import Levels, read_runtimes
from dolium.isolation.oci import Runtime, _beyond_sandbox, _message, _with_own_tmp, platform_of
from dolium.isolation.shim import Shim
from dolium.linux.cgroup.tree import Layout
from dolium.runtime import plan as P


def program(folder: Path, name: str, version: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Levels]:
    """A table of levels on a machine that has the runtimes named."""
    def made(*names: str, settings: object = None) -> Levels:
        bin = tmp_path / "bin"
        bin.mkdir(exist_ok=True)
        for name in names:
            program(bin, name, "runsc version 1" if name.startswith("runsc") else f"{name} version 1")
        monkeypatch.setattr(levels.policy, "DEFAULT_PATH", str(bin))
        if settings is not None:
            (tmp_path / "etc/docker").mkdir(parents=True, exist_ok=True)
            (tmp_path / "etc/docker/daemon.json").write_text(json.dumps(settings))
        return Levels(Layout({}, "/sys/fs/cgroup"), etc=str(tmp_path / "etc"), cache=str(tmp_path), run=str(tmp_path / "run"),
                      discard=lambda path: None)

    return made


@pytest.mark.parametrize(("host", "names", "expected"), [
    ({}, (), "dolium"), ({"Isolation": "process"}, ("runsc",), "dolium"), ({"Isolation": "default"}, (), "dolium"),
    ({"Runtime": "runc"}, (), "dolium"), ({"Runtime": "runc"}, ("runc",), "runc"), ({"Runtime": "crun"}, ("crun",), "crun"),
    ({"Isolation": "gvisor"}, ("runc", "runsc"), "runsc"), ({"Isolation": "gvisor", "Runtime": "runsc"}, ("runsc",), "runsc"),
    ({"Isolation": "process", "Runtime": "crun"}, ("crun",), "crun")])
def test_choice(make: Callable[..., Levels], host: dict[str, str], names: tuple[str, ...], expected: str) -> None:
    assert make(*names).choose(host) == expected


@pytest.mark.parametrize(("host", "names", "kind", "says"), [
    ({"Isolation": "hyperv"}, (), InvalidArgument, "invalid isolation: 'hyperv'"),
    ({"Isolation": "vm"}, (), Unimplemented, "vm"),
    ({"Isolation": "gvisor"}, ("runc",), FailedPrecondition, "not installed"),
    ({"Runtime": "crun"}, (), FailedPrecondition, "crun is not installed"),
    ({"Runtime": "kata"}, (), InvalidArgument, "unknown or invalid runtime name: kata"),
    ({"Runtime": "../runc"}, ("runc",), InvalidArgument, "unknown or invalid runtime name"),
    ({"Isolation": "gvisor", "Runtime": "crun"}, ("crun", "runsc"), InvalidArgument, "does not go with --runtime crun"),
    ({"Isolation": "process", "Runtime": "runsc"}, ("runsc",), InvalidArgument, "which is gvisor")])
def test_choices_that_cannot_be(make: Callable[..., Levels], host: dict[str, str], names: tuple[str, ...],
                                kind: type[DoliumError], says: str) -> None:
    with pytest.raises(kind, match=says):
        make(*names).choose(host)


def test_daemon_json_names_runtimes(make: Callable[..., Levels], tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    settings = {"runtimes": {"strong": {"path": program(own, "other-name", "runsc version 1"), "runtimeArgs": ["--platform=kvm"]},
                             "plain": {"path": program(own, "crun", "crun version 1")}}, "default-runtime": "plain"}
    table = make("runc", settings=settings)
    assert table.default == table.choose({}) == "plain"
    assert table.choose({"Isolation": "gvisor"}) == "strong"
    assert table.find("strong").describe() == {"Isolation": "gvisor", "Runtime": "strong", "RuntimePath": str(own / "other-name"),
                                               "Platform": "kvm"}
    assert table.choose({"Isolation": "process"}) == "dolium"
    assert table.table().keys() == {"dolium", "runc", "strong", "plain"}
    assert table.table()["strong"]["runtimeArgs"] == ["--platform=kvm"]


@pytest.mark.parametrize(("text", "says"), [
    ("{", "daemon.json"), ('{"runtimes": []}', None), ('{"runtimes": [1]}', "runtimes"), ('{"runtimes": {"a": 1}}', "runtimes: a"),
    ('{"runtimes": {"a": {"runtimeType": "x"}}}', "runtimes: a"), ('{"runtimes": {"a": {"path": "x", "runtimeArgs": [1]}}}', "texts"),
    ('{"runtimes": {"dolium": {"path": "x"}}}', "dolium's own"), ('{"runtimes": {"../x": {"path": "x"}}}', "no name")])
def test_what_daemon_json_may_not_say(tmp_path: Path, text: str, says: str | None) -> None:
    (tmp_path / "dolium").mkdir()
    (tmp_path / "dolium/daemon.json").write_text(text)
    if says is None:
        assert read_runtimes(tmp_path) == ({}, "")
        return
    with pytest.raises(FailedPrecondition, match=says):
        read_runtimes(tmp_path)


def test_a_default_that_is_not_there_stops_the_daemon(make: Callable[..., Levels]) -> None:
    with pytest.raises(InvalidArgument, match="unknown or invalid runtime name: gone"):
        make(settings={"default-runtime": "gone"})


@pytest.mark.parametrize(("wished", "names", "meant"), [
    ("dolium", (), "dolium"), ("runc", (), "dolium"), ("runc", ("runc",), "runc"), ("crun", ("crun",), "crun")])
def test_the_default_runtime(make: Callable[..., Levels], wished: str, names: tuple[str, ...], meant: str) -> None:
    made = make(*names, settings={"default-runtime": wished})
    assert made.default == meant == made.choose({}) == made.find(made.default).runtime


@pytest.mark.parametrize(("host", "refused"), [
    ({}, ""), ({"NetworkMode": "bridge", "PidMode": "", "IpcMode": "private", "SecurityOpt": ["seccomp=unconfined"]}, ""),
    ({"NetworkMode": "host"}, "--network host"), ({"NetworkMode": "container:1"}, "--network container:1"),
    ({"PidMode": "host"}, "--pid host"), ({"IpcMode": "container:1"}, "--ipc container:1"), ({"UTSMode": "host"}, "--uts host"),
    ({"Devices": [{}]}, "--device"), ({"Sysctls": {"a": "b"}}, "--sysctl"), ({"Egress": ["allow=x"]}, "--egress"),
    ({"SecurityOpt": ["seccomp={}"]}, "--security-opt seccomp")])
def test_what_a_sandbox_cannot_have(host: dict[str, Any], refused: str) -> None:
    assert _beyond_sandbox(host) == refused


@pytest.mark.parametrize(("line", "text"), [
    ('{"level":"error","msg":"runc run failed: no","time":"t"}\n', "runc run failed: no"),
    ('time="t" level=error msg="exec: \\"x\\": not found"\n', 'exec: "x": not found'), ("plain words\n", "plain words"),
    ("[1]", "[1]"), ('{"msg":"first","level":"error"}{"msg":"then","level":"error"}', "first; then"), ("", "")])
def test_messages_of_runtimes(line: str, text: str) -> None:
    assert _message(line) == text


def test_platform() -> None:
    assert [platform_of(words) for words in ((), ("--platform=kvm",), ("-platform=systrap", "--x"))] == ["ptrace", "kvm", "systrap"]


def spec(**fields: Any) -> dict[str, Any]:
    return {"process": {"args": ["sh"], "terminal": False, "capabilities": {"bounding": ["CAP_NET_RAW"]}},
            "root": {"path": "rootfs", "readonly": False}, "mounts": [{"destination": "/ro", "type": "bind", "options": ["rro"]}],
            "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}, {"type": "user", "path": "x"}],
                      "cgroupsPath": "/dolium/x/c", "seccomp": {}, "sysctl": {"a": "b"}}, **fields}


def test_the_plan_of_a_launch(make: Callable[..., Levels]) -> None:
    made = make("crun", "runsc")
    compiled = made.find("crun").compile("c", spec(), "/run/shims/c", network=True, hidden=[], user=True)
    names = [(P.STAGES[op.stage], op.name) for op in compiled.plan.ops]
    assert ("parent-started", "adopt") in names and names.count(("after-exit", "hook")) == names.count(("on-failure", "hook")) == 1
    assert P.decode(compiled.after_exit).ops
    words = compiled.plan.named("exec")[0].args[1]
    assert words[-1] == "c" and "run" in words and "--detach" in words
    told = json.loads(compiled.config)
    assert [entry.get("path") for entry in told["linux"]["namespaces"]] == ["/run/shims/c/network", None, "/run/shims/c/user"]
    assert told["linux"]["seccomp"] == {} and told["ociVersion"] == "1.0.2" and told["mounts"][0]["options"] == ["rro"]
    strong = made.find("runsc").compile("c", spec(), "/run/shims/c", network=True, hidden=[])
    told = json.loads(strong.config)
    assert "seccomp" not in told["linux"] and "sysctl" not in told["linux"] and told["mounts"][0]["options"] == ["ro"]
    assert strong.plan.named("mount_fs")[0].args[4] == "/proc/sys/net"


def test_a_terminal_comes_by_a_socket(make: Callable[..., Levels]) -> None:
    wish = spec(process={"args": ["sh"], "terminal": True, "capabilities": {"bounding": []}})
    plan = make("runc").find("runc").compile("c", wish, "/run/shims/c", network=False, hidden=[]).plan
    assert plan.named("stdio") == [] and plan.named("adopt")[0].args[1] >= 0
    assert "--console-socket" in plan.named("exec")[0].args[1]


def test_own_tmp_only_where_it_is_a_folder(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    told = json.dumps(spec()).encode()
    try:
        assert _with_own_tmp(told, root, "/f") == told  # there is none
        os.symlink("/etc", tmp_path / "tmp")
        assert _with_own_tmp(told, root, "/f") == told
        os.unlink(tmp_path / "tmp")
        os.mkdir(tmp_path / "tmp")
        first = json.loads(_with_own_tmp(told, root, "/f"))["mounts"][0]
        assert (first["source"], first["destination"]) == ("/f/rootfs/tmp", "/tmp")
        taken = json.dumps(spec(mounts=[{"destination": "/tmp/", "type": "tmpfs"}])).encode()
        assert _with_own_tmp(taken, root, "/f") == taken
    finally:
        os.close(root)


@pytest.mark.parametrize(("wish", "says"), [
    (Wish({}, True, True, False, False), "idmapped"), (Wish({}, False, False, True, False), "shared"),
    (Wish({}, False, False, False, True), "--rootfs")])
def test_what_no_other_runtime_is_asked_for(make: Callable[..., Levels], wish: Wish, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        make("crun").find("crun").check(wish)
    make().find("dolium").check(wish)


def test_a_runtime_is_known_by_its_version(make: Callable[..., Levels]) -> None:
    assert make("runsc").find("runsc").level == "gvisor" and not make("runsc").find("runsc").live
    assert Runtime("a", "/b") == Runtime("a", "/b", (), False)


def test_reports_without_end_fill_no_disk(make: Callable[..., Levels], tmp_path: Path) -> None:
    backend, path = make("runsc").find("runsc"), tmp_path / "user.log"
    line = '{"log":"Unsupported syscall sys_%d(0x1). It is likely"}\n'
    assert backend.unsupported(str(path)) == []
    path.write_text(line % 1)
    assert backend.unsupported(str(path)) == [("sys_1", "Unsupported syscall sys_1(0x1)")]
    assert path.read_text() == line % 1
    path.write_text(line % 2 * 10_000)
    assert set(backend.unsupported(str(path))) == {("sys_2", "Unsupported syscall sys_2(0x1)")}
    assert path.read_text() == ""


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, ResourceExhausted), (errno.EROFS, Unavailable)])
def test_a_file_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, number: int, kind: type[DoliumError]) -> None:
    def refused(*words: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(oci.os, "open", refused)
    with pytest.raises(kind, match=f"write /run/shims/c/config.json: {os.strerror(number)}"):
        oci._write("/run/shims/c/config.json", b"")


def test_a_signal_does_not_wait_for_a_runtime_that_hangs(make: Callable[..., Levels], tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make("crun").find("crun")
    (tmp_path / "bin/crun").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    monkeypatch.setattr(oci, "SIGNAL_PATIENCE", 0.05)
    with pytest.raises(FailedPrecondition, match=r"crun kill: .*timed out"):
        asyncio.run(backend.signal(cast(Shim, None), "c", 15))


def test_a_sandbox_is_in_no_user_namespace(make: Callable[..., Levels]) -> None:
    """Whoever asked for it: the container, or the daemon's --userns-remap."""
    wish, made = Wish({}, True, False, False, False), make("crun", "runsc")
    made.find("crun").check(wish)
    with pytest.raises(InvalidArgument, match="user namespace"):
        made.find("runsc").check(wish)
