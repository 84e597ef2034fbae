"""Pure parts of runtime, linux and engine: specs refused, signals, cgroup arithmetic, device programs, requests, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.cli.bodies import ports, restart, size
from dolium.cli.flags import UsageError
from dolium.cli.run import EXEC, RUN
from dolium.engine import changes, id_ranges, request, specs
from dolium.engine.etc_files import check_extra_hosts, resolv_text
from dolium.engine.model import Container, Mount
from dolium.engine.mounts import from_others, lend, mappings, parse_mounts
from dolium.engine.restart import next_delay, wants_restart
from dolium.engine.users import User, resolve
from dolium.errors import InvalidArgument, NotFound, ResourceExhausted
from dolium.linux.cgroup import bpf_devices, tree, v2
from dolium.linux.cgroup.v1 import DEFAULT_DEVICES
from dolium.linux.mounts import Options
from dolium.linux.seccomp import resolve_profile
from dolium.runtime.cli import Words, signal_number
from dolium.runtime.default_spec import default_spec
from dolium.runtime.lifecycle import rfc3339
from dolium.runtime.spec import validate
from dolium.units import format_size, parse_size


@pytest.mark.parametrize(("path", "value", "field"), [
    ("ociVersion", None, "ociVersion"), ("ociVersion", "2.0", "ociVersion"), ("root", None, "root"),
    ("root.path", "", "root.path"), ("process.args", [], "process.args"), ("process.cwd", "rel", "process.cwd"),
    ("process.env", ["X"], "process.env[0]"), ("process.user.uid", -1, "process.user.uid"),
    ("process.capabilities.bounding", ["CAP_X"], "process.capabilities.bounding[0]"),
    ("process.rlimits", [{"type": "RLIMIT_X", "soft": 1, "hard": 1}], "process.rlimits[0].type"),
    ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}], "process.rlimits[0]"),
    ("process.oomScoreAdj", 2000, "process.oomScoreAdj"), ("mounts", [{"type": "tmpfs"}], "mounts[0].destination"),
    ("mounts", [{"destination": "/x"}], "mounts[0].type"), ("linux.namespaces", [{"type": "odd"}], "linux.namespaces[0].type"),
    ("linux.namespaces", [{"type": "pid"}, {"type": "pid"}], "linux.namespaces[1].type"),
    ("linux.namespaces", [{"type": "pid"}], "linux.namespaces"), ("linux.maskedPaths", ["x"], "linux.maskedPaths[0]"),
    ("linux.sysctl", {"kernel.panic": "1"}, "linux.sysctl.kernel.panic"),
    ("linux.sysctl", {"net/../kernel/x": "1"}, "linux.sysctl.net/../kernel/x"),
    ("linux.devices", [{"type": "c", "path": "/x", "major": 1}], "linux.devices[0].minor"),
    ("linux.cgroupsPath", "/a/../b", "linux.cgroupsPath"), ("hooks", {"poststop": [{"path": "x"}]}, "hooks.poststop[0].path"),
    ("hooks", {"poststop": [{"path": "/x", "timeout": 0}]}, "hooks.poststop[0].timeout"),
    ("linux.resources.memory", {"limit": 10, "swap": 5}, "linux.resources.memory.swap"),
    ("hostname", "x" * 65, "hostname"), ("linux.rootfsPropagation", "odd", "linux.rootfsPropagation"),
])
def test_a_wrong_configuration_names_the_field(path: str, value: Any, field: str) -> None:
    config: Any = copy.deepcopy(default_spec())
    *parents, last = path.split(".")
    target = config
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    with pytest.raises(InvalidArgument) as error:
        validate(config)
    assert f"config.json: {field}: " in str(error.value)


def test_the_default_configuration_is_right() -> None:
    validate(default_spec())


@pytest.mark.parametrize(("text", "number"), [("TERM", 15), ("SIGKILL", 9), ("9", 9), ("rtmin+1", 35), ("SIGRTMAX", 64)])
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number


def test_unknown_signals_and_flags_are_refused() -> None:
    for text in ("NOPE", "65", "RTMIN+99", ""):
        with pytest.raises(InvalidArgument):
            signal_number(text)
    words = Words(["r", "--root=/x", "run", "-d", "--pid-file", "p", "--", "id"])
    assert (words.globals["root"], words.options, words.arguments) == ("/x", {"detach": True, "pid-file": "p"}, ["id"])
    for bad in (["r", "--nope"], ["r", "run", "--bundle"], ["r", "nope"]):
        with pytest.raises(InvalidArgument):
            Words(bad)


def test_cgroup_paths_and_weights() -> None:
    assert tree.group_of("", "id") == "/dolium/id"
    assert tree.group_of("a/b", "id") == "/dolium/a/b"
    assert tree.group_of("/a//b/", "id") == "/a/b"
    with pytest.raises(ValueError, match=r"\.\."):
        tree.group_of("/a/../b", "id")
    assert [v2.weight_of_shares(shares) for shares in (0, 2, 1024, 262144)] == [0, 1, 39, 10000]
    assert [v2.weight_of_blkio(weight) for weight in (0, 10, 1000)] == [0, 1, 10000]
    assert ("memory.swap.max", "50") in v2.memory({"limit": 100, "swap": 150})
    layout = tree.parse("2:cpu,cpuacct:/x\n0::/y\n", ["cpu,cpuacct", "unified"], False)
    assert tree.parse_membership("2:cpu,cpuacct:/a\n0::/\n", layout) == ["/sys/fs/cgroup/cpu,cpuacct/a",
                                                                        "/sys/fs/cgroup/unified"]


def interpret(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """The few instructions the device programs use."""
    memory = {0: kind | access << 16, 4: major, 8: minor}
    registers = [0] * 11
    at = 0
    for _ in range(10_000):
        code, regs = program[at * 8], program[at * 8 + 1]
        dst, src = regs & 15, regs >> 4
        offset = int.from_bytes(program[at * 8 + 2 : at * 8 + 4], "little", signed=True)
        value = int.from_bytes(program[at * 8 + 4 : at * 8 + 8], "little")
        at += 1
        if code == 0x61:
            registers[dst] = memory[offset]
        elif code == 0xBC:
            registers[dst] = registers[src]
        elif code == 0x54:
            registers[dst] &= value
        elif code == 0x74:
            registers[dst] >>= value
        elif code == 0xB7:
            registers[dst] = value
        elif code == 0x95:
            return registers[0]
        elif code == 0x55:
            at += offset if registers[dst] != value else 0
        elif code == 0x5D:
            at += offset if registers[dst] != registers[src] else 0
        elif code == 0x15:
            at += offset if registers[dst] == value else 0
        else:
            raise AssertionError(hex(code))
    raise AssertionError("no end")


def allowed(rules: list[dict[str, Any]], kind: str, letter: str, major: int, minor: int) -> bool:
    """The rules' meaning: the last that matches decides."""
    defaults = [{"allow": True, "type": k, "major": ma, "minor": mi, "access": a} for k, ma, mi, a in DEFAULT_DEVICES]
    for rule in reversed([*rules, *defaults]):
        if (rule.get("type") or "a") in ("a", kind) and letter in (rule.get("access") or "rwm") \
                and rule.get("major") in (None, major) and rule.get("minor") in (None, minor):
            return bool(rule["allow"])
    return False


_RULES = st.lists(st.fixed_dictionaries({
    "allow": st.booleans(), "type": st.sampled_from(["a", "b", "c"]), "access": st.sampled_from(["r", "w", "m", "rw", "rwm"]),
    "major": st.sampled_from([None, 1, 7]), "minor": st.sampled_from([None, 3, 9])}), max_size=6)


@given(_RULES, st.sampled_from("bc"), st.sampled_from("rwm"), st.sampled_from([1, 7, 50]), st.sampled_from([3, 9, 60]))
def test_device_programs_mean_their_rules(rules: list[dict[str, Any]], kind: str, letter: str, major: int, minor: int) -> None:
    program = bpf_devices.program(rules)
    result = interpret(program, {"b": 1, "c": 2}[kind], {"m": 1, "r": 2, "w": 4}[letter], major, minor)
    assert bool(result) == allowed(rules, kind, letter, major, minor)


def test_mount_options() -> None:
    options = Options(["ro", "nosuid", "noatime", "rslave", "rbind", "size=1m", "rro", "defaults"])
    assert (options.set, options.bind, options.propagation, options.data) == (0x13, "rbind", 1 << 19 | 1 << 14, ["size=1m"])
    assert options.recursive_set == 1
    assert Options(["ro", "rw"]).set == 0


def test_profiles_are_resolved_by_capability_architecture_and_kernel() -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "archMap": [{"architecture": "SCMP_ARCH_X86_64",
                                                              "subArchitectures": ["SCMP_ARCH_X86"]}],
               "syscalls": [{"names": ["a"], "action": "SCMP_ACT_ALLOW"},
                            {"names": ["b"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                            {"names": ["c"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                            {"names": ["d"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "6.0"}},
                            {"names": ["e"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}}]}
    found = resolve_profile(profile, {"CAP_SYS_ADMIN"}, "amd64", (6, 1))
    assert [rule["names"][0] for rule in found["syscalls"]] == ["a", "b", "d"]
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert [rule["names"][0] for rule in resolve_profile(profile, set(), "amd64", (5, 10))["syscalls"]] == ["a", "c"]


@given(st.integers(0, 4_000_000_000))
def test_times_by_arithmetic(seconds: int) -> None:
    from datetime import UTC, datetime

    assert rfc3339(seconds) == datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_capabilities_of_a_request() -> None:
    assert request.capabilities({"CapDrop": ["ALL"], "CapAdd": ["chown", "CAP_KILL"]}) == ["CAP_CHOWN", "CAP_KILL"]
    assert "CAP_SYS_ADMIN" in request.capabilities({"CapAdd": ["ALL"]})
    assert "CAP_CHOWN" not in request.capabilities({"CapDrop": ["CHOWN"]})


def test_nothing_takes_the_place_of_proc() -> None:
    for config, host in (({"Volumes": {"/proc": {}}}, {}), ({"Volumes": {"/x/../proc/sys": {}}}, {}), ({}, {"Tmpfs": {"/proc/acpi": ""}}),
                         ({}, {"Binds": ["/tmp:/proc"]}), ({}, {"Binds": ["/proc/../tmp:/proc"]}), ({}, {"Binds": ["named:/proc/1"]})):
        with pytest.raises(InvalidArgument, match="inside /proc"):
            parse_mounts(config, host)
    kept = parse_mounts({"Volumes": {"/process": {}}}, {"Binds": ["/proc:/proc", "/var/lib/lxcfs/proc/meminfo:/proc/meminfo", "/proc:/host"]})
    assert [mount.target for mount in kept] == ["/proc", "/host", "/process", "/proc/meminfo"]


def test_mounts_of_a_request() -> None:
    mounts = parse_mounts({"Volumes": {"/v": {}}}, {"Binds": ["/a:/b:ro", "n1:/c", "/x"], "Tmpfs": {"/t": "size=1m"}})
    assert {(mount.kind, mount.target, mount.read_only, mount.anonymous) for mount in mounts} == {
        ("bind", "/b", True, False), ("volume", "/c", False, False), ("volume", "/x", False, True),
        ("tmpfs", "/t", False, False), ("volume", "/v", False, True)}
    for bad in ("a:", ":b", "/a:/b:zz", "/a:b", "rel/x:/b", "/a:/"):
        with pytest.raises(InvalidArgument):
            parse_mounts({}, {"Binds": [bad]})


@pytest.mark.parametrize(("entry", "text"), [
    ({"Type": "bind", "Source": "/s"}, 'type "bind": field Target must not be empty'),
    ({"Type": "bind", "Target": "/t"}, "field Source must not be empty"),
    ({"Type": "bind", "Source": "s", "Target": "/t"}, "invalid mount path: 's' mount path must be absolute"),
    ({"Type": "bind", "Source": "/s", "Target": "/t", "VolumeOptions": {"NoCopy": True}},
     "field VolumeOptions must not be specified"),
    ({"Type": "bind", "Source": "/s", "Target": "/t", "BindOptions": {"Propagation": "odd"}}, "propagation mode: odd"),
    ({"Type": "bind", "Source": "/s", "Target": "/t", "BindOptions": {"ReadOnlyNonRecursive": True}}, "needs ReadOnly"),
    ({"Type": "bind", "Source": "/s", "Target": "/t", "BindOptions": {"IDMap": "idmap=uids=0-1-1"}}, "needs uids and gids"),
    ({"Type": "volume", "Target": "/t", "ReadOnly": True}, "must not set ReadOnly mode when using anonymous volumes"),
    ({"Type": "volume", "Target": "/t", "VolumeOptions": {"Subpath": "a"}}, "must not set Subpath when using anonymous"),
    ({"Type": "volume", "Source": "v1", "Target": "/t", "VolumeOptions": {"Subpath": "a/../../b"}}, "relative path within"),
    ({"Type": "volume", "Source": "v1", "Target": "/t", "VolumeOptions": {"DriverConfig": {"Name": "nfs"}}}, "'nfs'"),
    ({"Type": "tmpfs", "Source": "/s", "Target": "/t"}, "field Source must not be specified"),
    ({"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"Options": [["lower", "/"]]}}, "invalid tmpfs option"),
    ({"Type": "npipe", "Source": "s", "Target": "/t"}, 'invalid mount config for type "npipe": mount type unknown'),
])
def test_mounts_that_are_refused(entry: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(text)):
        parse_mounts({}, {"Mounts": [entry]})


def test_how_much_of_a_bind_mount_is_read_only() -> None:
    for options, expected in (({}, ["rbind", "rro"]), ({"NonRecursive": True}, ["bind", "ro"]),
                              ({"ReadOnlyNonRecursive": True}, ["rbind", "ro"]), ({"ReadOnlyForceRecursive": True}, ["rbind", "rro"])):
        mount, = parse_mounts({}, {"Mounts": [
            {"Type": "bind", "Source": "/s", "Target": "/t", "ReadOnly": True, "BindOptions": options}]})
        assert specs._user_mount(mount, [], "/s")["options"] == [*expected, "rprivate"]


def test_mounts_of_others_give_way() -> None:
    lent = lend([Mount("volume", "/s", "/a", name="va"), Mount("bind", "/h", "/b"), Mount("tmpfs", "", "/c")], True)
    mounts = {mount.target: mount for mount in parse_mounts({"Volumes": {"/a": {}, "/d": {}}}, {"Binds": ["/own:/b"]}, lent)}
    assert sorted(mounts) == ["/a", "/b", "/d"]
    assert (mounts["/a"].name, mounts["/a"].read_only, mounts["/a"].no_copy) == ("va", True, True)
    assert (mounts["/b"].source, mounts["/b"].read_only) == ("/own", False)
    assert [from_others(text) for text in ("a", "a:rw", "a:ro", "a:ro,z")] == [
        ("a", False), ("a", False), ("a", True), ("a", True)]
    for bad in ("", ":ro", "a:", "a:rx", "a:ro,rw"):
        with pytest.raises(InvalidArgument):
            from_others(bad)


def test_mappings_of_idmapped_mounts() -> None:
    assert mappings("uids=0-5-1#1-9-2;gids=0-7-1") == {
        "uidMappings": [{"containerID": 0, "hostID": 5, "size": 1}, {"containerID": 1, "hostID": 9, "size": 2}],
        "gidMappings": [{"containerID": 0, "hostID": 7, "size": 1}]}
    for bad in ("", "uids=0-1-1", "uids=0-1-0;gids=0-1-1", "uids=0-1-2#1-9-1;gids=0-1-1", "uids=@0-1-1;gids=0-1-1",
                "uids=0-4294967295-1;gids=0-1-1", "uids=0-1-1;uids=0-1-1"):
        with pytest.raises(InvalidArgument):
            mappings(bad)


def test_environment_is_merged() -> None:
    assert request.merge_env(["A=1", "B=2"], ["B=3", "A"]) == ["B=3"]


def test_users() -> None:
    files = {"/etc/passwd": b"root:x:0:0::/root:\nme:x:5:6::/home/me:\n", "/etc/group": b"g:x:7:me\nh:x:8:\n"}
    assert resolve("me", files.get).groups == (7,)
    assert resolve("me:h", files.get).gid == 8
    assert (resolve("99", files.get).uid, resolve("99", files.get).home) == (99, "/")
    for bad in ("ghost", "me:ghosts", "99999999999"):
        with pytest.raises(InvalidArgument):
            resolve(bad, files.get)


def test_lines_of_passwd_that_make_no_sense_are_passed_over() -> None:
    """The image wrote the file; a uid of -1 would leave the process root, a word would be an error nobody expects."""
    text = b"me:x:word:1::/:\nme:x:\xc2\xb2:1::/:\nme:x:7:8::/home:\nbig:x:4294967295:1::/:\n"
    files = {"/etc/passwd": text, "/etc/group": "g:x:\u00b2:me\n".encode()}
    assert resolve("me", files.get) == User(7, 8, (), "/home")
    with pytest.raises(InvalidArgument):
        resolve("big", files.get)


def test_read_only_is_recursive() -> None:
    assert specs._user_mount(Mount("bind", "/s", "/t", True), [], "/s")["options"] == ["rbind", "rro", "rprivate"]


def test_restart_policies_as_typed() -> None:
    assert restart("on-failure:3") == {"Name": "on-failure", "MaximumRetryCount": 3}
    assert restart("always") == {"Name": "always", "MaximumRetryCount": 0}
    assert restart("on-failure:-1")["MaximumRetryCount"] == -1  # the daemon's to refuse, as for every client
    for text in (":3", "on-failure:x", "on-failure:", "on-failure:1.5"):
        with pytest.raises(UsageError, match=f"--restart {text}"):
            restart(text)


def test_restart_rules_and_back_off() -> None:
    assert wants_restart({"Name": "always"}, 0, 9, False)
    assert not wants_restart({"Name": "always"}, 0, 0, True)
    assert wants_restart({"Name": "on-failure", "MaximumRetryCount": 2}, 1, 1, False)
    assert not wants_restart({"Name": "on-failure", "MaximumRetryCount": 2}, 1, 2, False)
    assert not wants_restart({"Name": "on-failure"}, 0, 0, False)
    delays = [0.0]
    for _ in range(12):
        delays.append(next_delay(delays[-1], 0.1))
    assert delays[1:4] == [0.1, 0.2, 0.4]
    assert delays[-1] == 60.0
    assert next_delay(30.0, 11.0) == 0.1


def test_resolv_conf_and_extra_hosts() -> None:
    text = "nameserver 127.0.0.53\nnameserver 10.0.0.1\nsearch a b\n"
    assert resolv_text(text, [], [], [], isolated=True) == "nameserver 10.0.0.1\nsearch a b\n"
    assert "127.0.0.53" in resolv_text(text, [], [], [], isolated=False)
    assert check_extra_hosts(["g:host-gateway"], "172.18.0.1") == ["g:172.18.0.1"]
    with pytest.raises(InvalidArgument):
        check_extra_hosts(["x:nope"], "")


def test_sizes() -> None:
    assert (parse_size("64m"), parse_size("1.5g"), parse_size("512")) == (64 << 20, 3 << 29, 512)
    assert (size("64m", "-m"), size("1kb", "-m")) == (64 << 20, 1024)
    assert format_size(1_230_000) == "1.23MB"
    with pytest.raises(InvalidArgument):
        parse_size("lots")
    assert parse_size("8191p") == 8191 << 50
    for much in ("8192p", "9" * 400):
        with pytest.raises(InvalidArgument, match="more than the kernel can count"):
            parse_size(much)


def test_command_lines() -> None:
    options, words = RUN.parse(["-it", "-p80:80", "--rm", "-e", "A=1", "--name=x", "img", "-c", "ls", "--rm"])
    assert options["interactive"]
    assert (options["publish"], options["env"], options["name"], words) == (["80:80"], ["A=1"], "x", ["img", "-c", "ls", "--rm"])
    assert EXEC.parse(["-u", "me", "c", "sh"])[0]["user"] == "me"
    bindings, exposed = ports(["127.0.0.1:8000-8001:80-81/udp", "90"])
    assert bindings["80/udp"] == [{"HostIp": "127.0.0.1", "HostPort": "8000"}]
    assert bindings["90/tcp"] == [{"HostIp": "", "HostPort": ""}]
    assert set(exposed) == set(bindings)
    for bad in (["--nope"], ["-z"], ["--name"], []):
        with pytest.raises(UsageError):
            RUN.parse(bad)
    for bad_port in ("x", "1:2:3:4", "80:80/sctp", "1-3:1-2", "0:70000"):
        with pytest.raises(UsageError):
            ports([bad_port])


def test_a_daemons_own_oom_protection_is_not_for_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    container = Container("a" * 64, "n", 0.0, "i", "", [], "", {}, {}, "true", [])
    for own, wish, found in ((-500, 0, 0), (0, 0, None), (0, 7, 7), (-500, -3, -3)):
        monkeypatch.setattr(specs, "_own_oom_score", lambda own=own: own)
        container.host_config = {"OomScoreAdj": wish}
        process = specs.process_for(container, User(0, 0, (), "/"), ["true"], [], terminal=False, cwd="/", privileged=False)
        assert process.get("oomScoreAdj") == found


def test_volumes_are_mapped_where_a_container_has_ids_of_its_own() -> None:
    mapped = specs._user_mount(Mount("volume", "/s", "/t"), [100000, 65536], "/s")
    assert "idmap" in mapped["options"] and mapped["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 65536}]
    assert "uidMappings" not in specs._user_mount(Mount("bind", "/s", "/t"), [100000, 65536], "/s")


def test_ranges_of_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_ranges, "pool", lambda: (1000, 2))
    assert id_ranges.free([[], [66536, 65536]]) == [1000, 65536] and id_ranges.free([[1000, 65536]]) == [66536, 65536]
    for across in ([999, 2], [66535, 1], [0, 66536]):  # one id is enough
        assert id_ranges.free([across]) == [66536, 65536]
    assert id_ranges.free([[66536, 1]]) == id_ranges.free([[0, 1000], [132072, 5]]) == [1000, 65536]
    with pytest.raises(ResourceExhausted, match="all 2 ranges"):
        id_ranges.free([[66535, 2]])
    path = tmp_path / "subuid"
    path.write_text("other:1:2\n# comment\nsome:x:y\nsome:100:70000\nsome:5:6\n")
    assert id_ranges.subordinate(str(path), "some") == (100, 70000)
    assert id_ranges.subordinate(str(path), "absent") is None
    assert id_ranges.subordinate(str(tmp_path / "none"), "some") is None
    with pytest.raises(NotFound, match="has no entry in /etc/subuid"):
        id_ranges.remapped("no-such-user-anywhere")


def test_export_holds_the_container_while_its_root_is_mounted_and_not_while_it_is_read(tmp_path: Path) -> None:
    """A removal meanwhile closes the fd by which a snapshot on a disk of its own is named: the number may be another's."""
    (tmp_path / "file").write_text("x")
    locked: list[bool] = []

    async def run() -> None:
        lock, container = asyncio.Lock(), types.SimpleNamespace(id="c" * 64, ids=[], rootfs="")

        @contextlib.contextmanager
        def view(_: object) -> Iterator[int]:
            locked.append(lock.locked())
            fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
            try:
                yield fd
            finally:
                os.close(fd)

        engine: Any = types.SimpleNamespace(find=lambda _: container, lock=lambda _: lock, roots=types.SimpleNamespace(view=view),
                                            containers={container.id: container},
                                            paths=types.SimpleNamespace(data="/none"))
        await changes.export(engine, "name", lambda data: locked.append(lock.locked()))
        engine.containers.clear()
        with pytest.raises(NotFound):
            await changes.export(engine, "name", lambda data: locked.append(True))

    asyncio.run(run())
    assert locked[0] and len(locked) > 1 and not any(locked[1:])
