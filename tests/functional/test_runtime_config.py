"""What config.json asks for, looked at from inside a container that dolium-runtime made, or from the host's side."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import Bundle, Runtime, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs

FILES = {"user": "user", "mount": "mnt", "network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid", "cgroup": "cgroup",
         "time": "time"}
IDS = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]


def mapped(bundle: Bundle) -> Bundle:
    """A user namespace whose root is host id 100000; the root file system belongs to it."""
    bundle.namespace("user")
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = IDS
    for base, folders, files in os.walk(bundle.rootfs):
        for name in [*folders, *files, "."]:
            os.lchown(os.path.join(base, name), 100_000, 100_000)
    for folder in (bundle.path, *bundle.path.parents):
        if str(folder).startswith("/tmp/pytest"):
            folder.chmod(0o755)
    return bundle


def inside_namespaces(runtime: Runtime, bundle: Bundle) -> dict[str, str]:
    bundle.sh("for n in user mnt net ipc uts pid cgroup time; do echo $n $(readlink /proc/self/ns/$n); done")
    return dict(line.split() for line in runtime.run(bundle).out.splitlines())


# -- namespaces --

def test_every_namespace_is_new(runtime: Runtime, bundle: Bundle) -> None:
    mapped(bundle).namespace("time")
    found = inside_namespaces(runtime, bundle)
    shared = [kind for kind, name in FILES.items() if found[name] == os.readlink(f"/proc/self/ns/{name}")]
    assert shared == []


def test_namespaces_that_are_not_listed_are_the_callers(runtime: Runtime, bundle: Bundle) -> None:
    for kind in ("network", "ipc", "uts", "pid", "cgroup"):
        bundle.namespace(kind, absent=True)
    del bundle.config["hostname"]
    found = inside_namespaces(runtime, bundle)
    shared = [kind for kind, name in FILES.items() if found[name] == os.readlink(f"/proc/self/ns/{name}")]
    assert shared == [kind for kind in FILES if kind != "mount"]


@pytest.mark.parametrize("with_user", [False, True])
def test_namespaces_joined_by_path(runtime: Runtime, bundle: Bundle, tmp_path: Path, with_user: bool) -> None:
    first = bundle.sh("exec sleep 1000")
    if with_user:
        mapped(first)
    runtime.started(first, identity="first")
    pid = runtime.state("first")["pid"]
    second = Bundle(tmp_path / "second")
    del second.config["hostname"]
    kinds = ["network", "ipc", "uts", "pid", "cgroup"] + (["user"] if with_user else [])
    for kind in kinds:
        second.namespace(kind, f"/proc/{pid}/ns/{FILES[kind]}")
    if with_user:
        for base, folders, files in os.walk(second.rootfs):
            for name in [*folders, *files, "."]:
                os.lchown(os.path.join(base, name), 100_000, 100_000)
    found = inside_namespaces(runtime, second)
    assert {kind: found[FILES[kind]] for kind in kinds} == {kind: os.readlink(f"/proc/{pid}/ns/{FILES[kind]}")
                                                            for kind in kinds}
    assert found["mnt"] != os.readlink(f"/proc/{pid}/ns/mnt")


def test_a_namespace_of_another_type_is_refused(runtime: Runtime, bundle: Bundle) -> None:
    bundle.namespace("network", "/proc/self/ns/uts")
    assert "a namespace of another type" in runtime.run(bundle, code=1).err
    bundle.namespace("network", "/etc/passwd")
    assert "not a namespace" in runtime.run(bundle, code=1).err
    assert runtime.left() == [] and bundle.groups() == []


def test_a_new_network_has_loopback_up_and_nothing_else(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("ls /sys/class/net; ping -c 1 -W 5 127.0.0.1 > /dev/null && echo up").capabilities("CAP_NET_RAW")
    lines = runtime.run(bundle).out.split()
    assert lines[-1] == "up" and "lo" in lines
    assert not set(lines) & {name for _, name in socket.if_nameindex() if name != "lo"}


def test_user_namespace_maps(runtime: Runtime, bundle: Bundle) -> None:
    mapped(bundle).sh("id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map; touch /tmp/mine; ls -ln /dev/null | "
                      "cut -c1; echo x > /dev/null; mount | grep -c proc")
    out = runtime.run(bundle).out.split()
    assert out[:2] == ["0", "0"] and out[2:8] == ["0", "100000", "65536"] * 2
    assert out[8] == "c"
    assert (bundle.rootfs / "tmp/mine").stat().st_uid == 100_000


def test_exec_into_a_user_namespace(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(mapped(bundle).sh("exec sleep 1000"))
    pid = runtime.state()["pid"]
    out = runtime("exec", "c", "sh", "-c", "id -u; readlink /proc/self/ns/user").out.split()
    assert out == ["0", os.readlink(f"/proc/{pid}/ns/user")]
    assert f"Uid:\t{100_000}\t" in Path(f"/proc/{pid}/status").read_text()


def test_time_namespace_offsets(runtime: Runtime, bundle: Bundle) -> None:
    bundle.namespace("time")
    bundle.linux["timeOffsets"] = {"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 500, "nanosecs": 7}}
    bundle.sh("cat /proc/uptime; cat /proc/self/timens_offsets")
    lines = runtime.run(bundle).out.splitlines()
    with open("/proc/uptime") as file:
        assert 0 <= float(file.read().split()[0]) + 1_000_000 - float(lines[0].split()[0]) < 60
    assert [line.split() for line in lines[1:]] == [["monotonic", "500", "7"], ["boottime", "1000000", "0"]]


# -- names and kernel parameters --

def test_hostname_domainname_and_sysctl(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config.update(hostname="jar", domainname="cellar")
    bundle.linux["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.msgmax": "4096", "net/ipv4/ping_group_range": "0 7"}
    before = Path("/proc/sys/kernel/msgmax").read_text()
    bundle.sh("hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax "
              "/proc/sys/net/ipv4/ping_group_range")
    assert runtime.run(bundle).out.split() == ["jar", "cellar", "1", "4096", "0", "7"]
    assert Path("/proc/sys/kernel/msgmax").read_text() == before and socket.gethostname() != "jar"


# -- the process --

def status_of(runtime: Runtime, bundle: Bundle) -> dict[str, str]:
    bundle.process["args"] = ["cat", "/proc/self/status"]
    lines = runtime.run(bundle).out.splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_user_groups_umask_limits(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o27}
    bundle.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128},
                                 {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]
    bundle.sh("id -u; id -g; id -G; umask; ulimit -S -n; ulimit -H -n; ulimit -c; echo $HOME")
    assert runtime.run(bundle).out.splitlines() == ["1000", "1001", "1001 5 6", "0027", "64", "128", "0", "/home"]


def test_capability_sets(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    bundle.process["capabilities"] = {"bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"],
                                      "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}
    status = status_of(runtime, bundle)
    kill = f"{1 << 5:016x}"
    assert [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [kill] * 4
    assert status["CapBnd"] == f"{1 << 5 | 1:016x}" and status["Uid"].split() == ["1000"] * 4


def test_without_capabilities_root_has_none(runtime: Runtime, bundle: Bundle) -> None:
    del bundle.process["capabilities"]
    bundle.process["noNewPrivileges"] = False
    status = status_of(runtime, bundle)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"] == "0"


def test_oom_score_is_set(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["oomScoreAdj"] = 700
    bundle.process["args"] = ["cat", "/proc/self/oom_score_adj"]
    assert runtime.run(bundle).out == "700\n"


def test_cwd_is_made_and_entered(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["cwd"] = "/new/folder"
    bundle.process["args"] = ["pwd"]
    assert runtime.run(bundle).out == "/new/folder\n"


def test_environment_is_only_what_was_asked_for(runtime: Runtime, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    bundle.process["env"] = ["PATH=/bin", "A=1", "HOME=/tmp"]
    bundle.process["args"] = ["env"]
    assert sorted(runtime.run(bundle).out.splitlines()) == ["A=1", "HOME=/tmp", "PATH=/bin"]


def test_a_program_that_is_missing_or_not_executable(runtime: Runtime, bundle: Bundle) -> None:
    for args, words in ((["nosuch"], 'exec: "nosuch": executable file not found in $PATH'),
                        (["/nosuch"], "no such file or directory"), (["/etc/passwd"], "permission denied"),
                        (["/etc"], "is a directory")):
        bundle.process["args"] = args
        assert words in runtime.run(bundle, code=1).err
    (bundle.rootfs / "etc/bad").write_text("no program")
    (bundle.rootfs / "etc/bad").chmod(0o755)
    bundle.process["args"] = ["/etc/bad"]
    assert "ENOEXEC" in runtime.run(bundle, code=1).err
    assert runtime.left() == [] and bundle.groups() == []


def test_session_keyring_is_new(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["maskedPaths"] = []
    bundle.process["args"] = ["cat", "/proc/keys"]
    assert "_ses.c" in runtime.run(bundle).out


# -- seccomp --

def machine_arch() -> str:
    return {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}[platform.machine()]


@pytest.mark.parametrize("no_new_privs", [True, False])
@pytest.mark.parametrize("user", [0, 1000])
def test_seccomp_errno_is_seen_and_exec_has_the_filter_too(runtime: Runtime, bundle: Bundle, no_new_privs: bool,
                                                           user: int) -> None:
    bundle.process["noNewPrivileges"] = no_new_privs
    bundle.process["user"] = {"uid": user, "gid": user}
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [machine_arch()], "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122},
        {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}
    script = "mkdir /tmp/x; chmod 700 /tmp/*; grep Seccomp: /proc/self/status; grep NoNewPrivs /proc/self/status"
    (bundle.rootfs / "tmp/file").touch()
    result = runtime.run(bundle.sh(script))
    assert "Disk quota exceeded" in result.err or "Quota exceeded" in result.err, result
    assert "Operation not permitted" in result.err
    assert result.out.split() == ["Seccomp:", "2", "NoNewPrivs:", str(int(no_new_privs))]
    assert len([name for name in os.listdir(runtime.root / ".cache") if name.endswith(".bpf")]) == 1
    runtime.started(bundle.sh("exec sleep 1000"), identity="d")
    again = runtime("exec", "d", "sh", "-c", script)
    assert again.out == result.out and again.err == result.err


def test_dockers_profile_loads(runtime: Runtime, bundle: Bundle) -> None:
    from dolium.linux.seccomp import resolve_profile

    path = Path("/usr/share/containers/seccomp.json")
    if not path.exists():
        pytest.skip("needs the package golang-github-containers-common")
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    bundle.linux["seccomp"] = resolve_profile(json.loads(path.read_text()), set(), arch, (6, 1))
    bundle.sh("unshare -r true; echo $?; echo ok")
    result = runtime.run(bundle)
    assert result.out.split() == ["1", "ok"] and "not permitted" in result.err


def test_seccomp_arguments_and_flags(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": [machine_arch()],
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"], "syscalls": [
            # SIGUSR1 may be sent, SIGUSR2 not; 0 is "does it live"
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122, "args": [{"index": 1, "value": 12, "op": "SCMP_CMP_EQ"}]}]}
    result = runtime.run(bundle.sh("trap 'echo one' USR1; kill -0 $$ && kill -USR1 $$; kill -USR2 $$; echo alive"))
    assert result.out.split() == ["one", "alive"] and "uota exceeded" in result.err


@pytest.mark.parametrize("damage", ["another's file", "others may write there"])
def test_a_kept_filter_that_others_may_have_written_is_not_loaded(runtime: Runtime, bundle: Bundle, damage: str) -> None:
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122}]}
    bundle.sh("mkdir /tmp/x")
    assert "uota exceeded" in runtime.run(bundle, code=None).err
    cache = runtime.root / ".cache"
    (kept,) = cache.glob("*.bpf")
    assert kept.stat().st_mode & 0o777 == 0o600 and cache.stat().st_mode & 0o777 == 0o700
    content = kept.read_bytes()
    kept.write_bytes(b"\x06\0\0\0\0\0\xff\x7f")  # allows everything
    assert runtime.run(bundle, code=None).err == ""  # the control: it is what is loaded
    (bundle.rootfs / "tmp/x").rmdir()
    os.chown(kept, 1000, 1000) if damage == "another's file" else cache.chmod(0o777)
    assert "uota exceeded" in runtime.run(bundle, code=None).err
    if damage == "another's file":
        assert kept.read_bytes() == content and kept.stat().st_uid == 0


# -- the root file system --

def test_readonly_root_masked_and_readonly_paths(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = True
    (bundle.rootfs / "secret").mkdir()
    (bundle.rootfs / "secret/file").write_text("x")
    (bundle.rootfs / "key").write_text("x")
    (bundle.rootfs / "var").mkdir()
    bundle.linux["maskedPaths"] += ["/secret", "/key", "/absent", "/key/below"]
    bundle.linux["readonlyPaths"] += ["/tmp", "/absent"]
    bundle.mount("/var", "tmpfs", "tmpfs", "size=64k")
    bundle.sh("touch /file; touch /tmp/file; echo 1 > /proc/sys/kernel/msgmax; ls /secret; cat /key; touch /secret/x;"
              "touch /var/fine && echo fine; cat /proc/kcore | head -c 1 | wc -c")
    result = runtime.run(bundle)
    assert result.out.split() == ["fine", "0"]
    assert result.err.count("Read-only file system") == 4, result.err
    assert not (bundle.rootfs / "tmp/file").exists()


def test_default_devices_and_links(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("for d in null zero full random urandom tty; do ls -ln /dev/$d; done; "
              "for l in fd stdin ptmx; do readlink /dev/$l; done;"
              "head -c 4 /dev/zero | wc -c; echo x > /dev/full")
    result = runtime.run(bundle, code=1)
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["crw-rw-rw-"] * 6
    assert lines[6:] == ["/proc/self/fd", "/proc/self/fd/0", "pts/ptmx", "4"]
    assert "No space left" in result.err


def test_devices_are_made_with_their_mode_and_only_allowed_ones_open(runtime: Runtime, bundle: Bundle) -> None:
    bundle.capabilities("CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYSLOG")
    bundle.linux["devices"] = [
        {"path": "/dev/kmsg2", "type": "c", "major": 1, "minor": 11, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/deep/fifo", "type": "p", "fileMode": 0o622}]
    bundle.sh("ls -ln /dev/kmsg2 /dev/deep/fifo; cat /dev/kmsg2; mknod /dev/own c 1 11; cat /dev/own")
    result = runtime.run(bundle, code=1)
    first, second = sorted(result.out.splitlines())
    assert first.split()[:6] == ["crw-r-----", "1", "5", "6", "1,", "11"] and second.split()[0] == "prw--w--w-"
    assert result.err.count("Operation not permitted") == 2, result
    bundle.linux["resources"]["devices"].append({"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"})
    bundle.sh("dd if=/dev/kmsg2 count=1 of=/dev/null 2> /dev/null && echo read; echo x > /dev/kmsg2")
    result = runtime.run(bundle, code=1)
    assert result.out == "read\n" and "Operation not permitted" in result.err


def test_tmpfs_options(runtime: Runtime, bundle: Bundle) -> None:
    bundle.mount("/nosuch/../data", "tmpfs", "tmpfs", "nosuid", "silent", "acl", "noexec", "size=100k,mode=1770", "uid=7")
    bundle.sh("grep ' /data ' /proc/mounts; stat -c '%a %u' /data; cp /bin/busybox /data/b 2>/dev/null || echo full")
    line, mode, full = runtime.run(bundle).out.splitlines()
    options = line.split()[3].split(",")
    assert {"nosuid", "noexec", "size=100k", "mode=1770"} <= set(options) and "nodev" not in options
    assert (mode, full) == ("1770 7", "full")


def test_tmpcopyup_keeps_what_was_there(runtime: Runtime, bundle: Bundle) -> None:
    deep = bundle.rootfs / "etc/deep/er"
    deep.mkdir(parents=True)
    (deep / "file").write_text("content\n")
    (deep / "file").chmod(0o4755)
    os.chown(deep / "file", 5, 6)
    os.chmod(deep / "file", 0o4755)
    (bundle.rootfs / "etc/out").symlink_to("/etc/passwd")
    bundle.mount("/etc", "tmpfs", "tmpfs", "tmpcopyup", "ro").mount("/new", "tmpfs", "tmpfs", "tmpcopyup")
    bundle.sh("cat /etc/deep/er/file; stat -c '%a %u %g' /etc/deep/er/file; readlink /etc/out; touch /etc/x || echo ro;"
              "touch /new/x && echo new")
    assert runtime.run(bundle).out.splitlines() == ["content", "4755 5 6", "/etc/passwd", "ro", "new"]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "volume"
    (folder / "below").mkdir(parents=True)
    (folder / "file").write_text("host\n")
    subprocess.run(["mount", "-t", "tmpfs", "below", str(folder / "below")], check=True)
    subprocess.run(["mount", "--make-private", str(folder / "below")], check=True)
    (folder / "below/deep").write_text("deep\n")
    yield folder
    subprocess.run(["umount", str(folder / "below")], check=True)


def test_bind_mounts_ro_rw_recursive_and_files(runtime: Runtime, bundle: Bundle, volume: Path) -> None:
    bundle.mount("/rw", "bind", str(volume), "bind")
    bundle.mount("/rec", "bind", str(volume), "rbind", "ro")
    bundle.mount("/allro", "bind", str(volume), "rbind", "rro")
    bundle.mount("/a/new/name", "bind", str(volume / "file"), "bind", "ro", "noexec")
    bundle.sh("echo w > /rw/written; ls /rw/below; cat /rec/below/deep; touch /rec/x; touch /rec/below/fine && echo fine;"
              "touch /allro/below/x; cat /a/new/name; echo x > /a/new/name; grep ' /a/new/name ' /proc/mounts")
    result = runtime.run(bundle)
    lines = result.out.splitlines()
    assert lines[:3] == ["deep", "fine", "host"] and {"ro", "noexec"} <= set(lines[3].split()[3].split(","))
    assert result.err.count("Read-only file system") == 3
    assert (volume / "written").read_text() == "w\n" and (volume / "file").read_text() == "host\n"


def test_options_of_a_file_system_as_a_whole(runtime: Runtime, bundle: Bundle) -> None:
    """What a mount of its own has, or the default is, is told to no file system: tmpfs would refuse it."""
    bundle.mount("/whole", "tmpfs", "tmpfs", "sync", "dirsync", "lazytime", "async", "nomand", "loud", "silent", "acl", "noiversion")
    shown = runtime.run(bundle.sh("grep ' /whole ' /proc/mounts")).out.split()[3].split(",")
    assert {"dirsync", "lazytime"} <= set(shown) and "sync" not in shown  # async came last


def test_a_file_on_a_folder_is_told(runtime: Runtime, bundle: Bundle) -> None:
    file = str(bundle.path / "config.json")
    result = runtime.run(bundle.mount("/tmp", "bind", file, "bind"), code=1)
    assert f"bind {file} on /tmp: EINVAL" in result.err and "one of the two is a folder, the other is not" in result.err


def test_relative_bind_source_is_in_the_bundle(runtime: Runtime, bundle: Bundle) -> None:
    (bundle.path / "data").mkdir()
    (bundle.path / "data/x").write_text("x")
    bundle.mount("/data", "bind", "data", "bind").sh("cat /data/x")
    assert runtime.run(bundle).out == "x"


@pytest.mark.parametrize(("propagation", "to_container", "to_host"),
                         [("rprivate", False, False), ("rslave", True, False), ("rshared", True, True)])
def test_propagation_of_a_bind_mount(runtime: Runtime, bundle: Bundle, tmp_path: Path, propagation: str,
                                     to_container: bool, to_host: bool) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "shared", str(folder)], check=True)
    subprocess.run(["mount", "--make-shared", str(folder)], check=True)
    try:
        (folder / "out").mkdir()
        (folder / "in").mkdir()
        bundle.capabilities("CAP_SYS_ADMIN").mount("/v", "bind", str(folder), "rbind", propagation)
        bundle.sh("mount -t tmpfs inside /v/in; echo mounted > /tmp/m; exec sleep 1000")
        runtime.started(bundle)
        until(lambda: (bundle.rootfs / "tmp/m").exists(), "the container has mounted")
        subprocess.run(["mount", "-t", "tmpfs", "outside", str(folder / "out")], check=True)
        inside = runtime("exec", "c", "cat", "/proc/mounts").out
        assert ("outside /v/out" in inside) is to_container
        assert (f"inside {folder}/in" in Path("/proc/mounts").read_text()) is to_host
    finally:
        runtime("delete", "--force", "c", code=None)
        for name in ("out", "in", "."):
            subprocess.run(["umount", "-l", str(folder / name)], check=False, stderr=subprocess.DEVNULL)


def test_nothing_the_container_mounts_reaches_the_host(runtime: Runtime, bundle: Bundle) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    bundle.capabilities("CAP_SYS_ADMIN").sh("mount -t tmpfs x /tmp && mount -t tmpfs x /home && echo ok; exec sleep 1000")
    started = runtime.popen("run", "--bundle", str(bundle.write()), "c")
    assert started.stdout is not None and started.stdout.readline() == "ok\n"
    assert Path("/proc/self/mountinfo").read_text() == before
    runtime("kill", "c", "KILL")
    started.communicate(timeout=30)


@pytest.mark.parametrize("link", ["/etc", "../../../../../../etc", "/../../etc", "/loop/../../etc"])
def test_mount_target_through_a_link_stays_inside(runtime: Runtime, bundle: Bundle, link: str) -> None:
    (bundle.rootfs / "link").symlink_to(link)
    (bundle.rootfs / "loop").mkdir()
    marker = f"marker-{os.getpid()}"
    bundle.mount("/link/made", "tmpfs", marker, "size=64k")
    bundle.sh("grep marker /proc/mounts | cut -d' ' -f2")
    assert runtime.run(bundle).out == "/etc/made\n"
    assert not os.path.exists("/etc/made") and (bundle.rootfs / "etc/made").is_dir()


def test_a_dangling_link_is_made_inside(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (bundle.rootfs / "dangling").symlink_to(f"{outside}/deep")
    bundle.mount("/dangling", "tmpfs", "tmpfs")
    bundle.sh(f"grep -c ' {outside}/deep ' /proc/mounts")
    assert runtime.run(bundle).out == "1\n"
    assert not outside.exists() and (bundle.rootfs / str(outside).lstrip("/") / "deep").is_dir()


def test_cgroup_mount_shows_the_containers_own_groups(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("for f in $(find /sys/fs/cgroup -maxdepth 2 -name cgroup.procs); do cat $f; done | sort -u;"
              "mkdir /sys/fs/cgroup/pids/x /sys/fs/cgroup/x; grep -c cgroup /proc/mounts")
    result = runtime.run(bundle)
    pids = result.out.split()
    assert "1" in pids and "0" not in pids[:-1] and int(pids[-1]) >= 1
    assert "Read-only file system" in result.err


def test_rootfs_propagation(runtime: Runtime, bundle: Bundle) -> None:
    for value, tag in (("private", ""), ("rslave", "master:"), ("shared", "shared:"), ("unbindable", "unbindable")):
        bundle.linux["rootfsPropagation"] = value
        bundle.sh("grep ' / / ' /proc/self/mountinfo || head -1 /proc/self/mountinfo")
        fields = runtime.run(bundle).out.split()
        optional = " ".join(fields[6:fields.index("-")])
        assert tag in optional if tag and value != "rslave" else "shared" not in optional, (value, fields)


def test_no_pivot(runtime: Runtime, bundle: Bundle) -> None:
    assert "busybox" in runtime.run(bundle.sh("ls /bin"), "--no-pivot").out


# -- bad bundles --

def broken(change: str, bundle: Bundle) -> None:
    config: dict[str, Any] = bundle.config
    if change == "no such root":
        config["root"]["path"] = "absent"
    elif change == "unknown file system":
        bundle.mount("/x", "nosuchfs", "x")
    elif change == "bad tmpfs option":
        bundle.mount("/x", "tmpfs", "x", "nosuch=1")
    elif change == "no such bind source":
        bundle.mount("/x", "bind", "/no/such", "bind")
    elif change == "file over folder":
        bundle.mount("/etc", "bind", "/etc/passwd", "bind")
    elif change == "bad memory limit":
        bundle.linux["resources"]["memory"] = {"limit": 1}
        bundle.linux["resources"]["pids"] = {"limit": 100}
    elif change == "bad cpuset":
        bundle.linux["resources"]["cpu"] = {"cpus": "nonsense"}
    elif change == "more rights than there are":
        bundle.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 1 << 40, "hard": 1 << 40}]
    elif change == "seccomp action":
        bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_NOSUCH"}
    elif change == "mapping of nothing":
        bundle.namespace("user")
        bundle.linux["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 0}]
        bundle.linux["gidMappings"] = IDS
    elif change == "cwd is a file":
        bundle.process["cwd"] = "/etc/passwd"
    elif change == "hook absent":
        bundle.hook("createRuntime", "/no/such/hook")


@pytest.mark.parametrize("change", [
    "no such root", "unknown file system", "bad tmpfs option", "no such bind source", "file over folder",
    "bad memory limit", "bad cpuset", "more rights than there are", "seccomp action", "mapping of nothing",
    "cwd is a file", "hook absent"])
def test_a_bad_bundle_is_refused_with_one_message_and_leaves_nothing(runtime: Runtime, bundle: Bundle,
                                                                     change: str) -> None:
    broken(change, bundle)
    for command in ("run", "create"):
        result = runtime(command, "--bundle", str(bundle.write()), "c", code=1)
        assert result.out == "" and result.err.startswith("dolium-runtime: ") and result.err.count("\n") == 1, result
        assert runtime.left() == [] and bundle.groups() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\"x\"", "{}", "[" * 100_000])
def test_config_that_is_no_configuration(runtime: Runtime, bundle: Bundle, text: str) -> None:
    (bundle.path / "config.json").write_text(text)
    assert "config.json" in runtime("run", "--bundle", str(bundle.path), "c", code=1).err
    assert runtime.left() == []


def test_no_bundle(runtime: Runtime, tmp_path: Path) -> None:
    assert "no such f" in runtime("run", "--bundle", str(tmp_path / "absent"), "c", code=1).err
    assert "config.json: no such file" in runtime("run", "--bundle", str(tmp_path), "c", code=1).err



def test_an_idmapped_mount_shows_other_owners(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").touch()
    os.chown(source / "file", 5, 6)
    maps = [{"containerID": 0, "hostID": 1000, "size": 100}]
    bundle.mount("/mnt", "bind", str(source), "rbind")
    bundle.config["mounts"][-1] |= {"uidMappings": maps, "gidMappings": maps}
    script = "stat -c %u:%g /mnt/file; touch /mnt/new; stat -c %u:%g /mnt/new"
    result = runtime.run(bundle.sh(script), code=None)
    assert result.out.splitlines()[0] == "1005:1006"
    assert os.stat(source / "file").st_uid == 5
    assert not (source / "new").exists()  # uid 0 is not mapped in this mount: EOVERFLOW


def test_scheduling_io_priority_and_personality(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["scheduler"] = {"policy": "SCHED_BATCH", "nice": 7}
    bundle.process["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 6}
    bundle.linux["personality"] = {"domain": "LINUX32"}
    out = runtime.run(bundle.sh("uname -m; ionice -p $$; cut -d' ' -f 19,41 /proc/self/stat")).out.splitlines()
    assert out == ["i686", "best-effort: prio 6", "7 3"]


def test_a_memory_policy_is_the_kernels_or_refused_by_name(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
    if os.path.exists("/proc/self/numa_maps"):
        assert "bind=static:0" in runtime.run(bundle.sh("cat /proc/self/numa_maps")).out
    else:
        assert "set linux.memoryPolicy MPOL_BIND: ENOSYS" in runtime.run(bundle.sh("true"), code=1).err


def test_exec_affinity(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    runtime.started(bundle.sh("sleep 100"))
    process = {**bundle.process, "args": ["sh", "-c", "grep Cpus_allowed_list /proc/self/status"],
               "execCPUAffinity": {"initial": "0", "final": "1"}}
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert runtime("exec", "--process", str(tmp_path / "process.json"), "c").out.split() == ["Cpus_allowed_list:", "1"]
