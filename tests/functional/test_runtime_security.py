"""What a container can reach of the runtime: no fd, no file of the host, nothing by a changed image."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundles import FRONT, Bundle, Runtime, bundle, needs, runtime

__all__ = ["bundle", "runtime"]
pytestmark = needs


def digest() -> str:
    return hashlib.sha256(Path(FRONT).read_bytes()).hexdigest()


def test_no_fd_leaks_into_init_and_exec(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("ls -l /proc/self/fd | tail -n +2 | wc -l")
    assert runtime.run(bundle).out == "4\n"  # the fourth is ls's own folder
    runtime.started(bundle.sh("exec sleep 1000"), identity="d")
    assert runtime("exec", "d", *bundle.process["args"][:2], "ls -l /proc/self/fd | tail -n +2 | wc -l").out == "4\n"
    pid = runtime.state("d")["pid"]
    assert sorted(os.listdir(f"/proc/{pid}/fd"), key=int) == ["0", "1", "2"]


def test_fds_of_the_caller_do_not_pass(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w+") as secret:
        os.set_inheritable(secret.fileno(), True)
        bundle.sh("ls -l /proc/self/fd | tail -n +2 | wc -l")
        assert runtime.run(bundle, pass_fds=[secret.fileno()]).out == "4\n"
        runtime.started(bundle.sh("exec sleep 1000"), identity="d")
        out = runtime("exec", "d", "sh", "-c", "ls -l /proc/self/fd | tail -n +2 | wc -l", pass_fds=[secret.fileno()]).out
        assert out == "4\n"


def test_a_waiting_init_is_a_sealed_copy(runtime: Runtime, bundle: Bundle) -> None:
    runtime.create(bundle)
    pid = runtime.state()["pid"]
    link = os.readlink(f"/proc/{pid}/exe")
    assert link.startswith("/memfd:") and os.stat(f"/proc/{pid}/exe").st_ino != os.stat(FRONT).st_ino
    with open(f"/proc/{pid}/exe", "rb") as image:
        seals = fcntl.fcntl(image, fcntl.F_GET_SEALS)
        wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        assert seals & wanted == wanted and hashlib.sha256(image.read()).hexdigest() == digest()
    with pytest.raises(OSError):
        open(f"/proc/{pid}/exe", "r+b").close()


def test_a_front_is_not_dumpable(runtime: Runtime, bundle: Bundle) -> None:
    """Looked into by the same user with the same capabilities, of which CAP_SYS_PTRACE is none: an ordinary process can be."""
    plain = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
    bundle.sh("echo up; read end").write()
    runtime.ids.append("c")
    look = lambda pid: subprocess.run([*plain, "readlink", f"/proc/{pid}/exe"], capture_output=True).returncode  # noqa: E731
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*plain, FRONT, "--root", str(runtime.root), "run", "--bundle", str(bundle.path), "c"],
                          **pipes) as front, subprocess.Popen([*plain, "cat"], **pipes) as ordinary:
        try:
            assert front.stdout.readline() == "up\n"
            assert ordinary.stdin.write("up\n") and not ordinary.stdin.flush() and ordinary.stdout.readline() == "up\n"
            assert look(ordinary.pid) == 0
            assert look(front.pid) == 1
        finally:
            front.stdin.close()
            ordinary.stdin.close()


def test_a_waiting_init_cannot_be_looked_into_from_inside(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """Not dumpable: its /proc files belong to the host's root, and ptrace of the container's own is refused."""
    runtime.started(bundle.capabilities("CAP_KILL").sh("exec sleep 1000"), identity="first")
    pid = runtime.state("first")["pid"]
    second = Bundle(tmp_path / "second").namespace("pid", f"/proc/{pid}/ns/pid")
    runtime.create(second, identity="second")
    script = ("for p in /proc/[0-9]*; do case $(readlink $p/exe) in /bin/busybox|'') ;; *) echo seen $p;; esac;"
              " for f in $(ls $p/fd 2>/dev/null); do case $(readlink $p/fd/$f) in /dev/null|pipe*|/proc*|'') ;;"
              " *) echo fd $p $f $(readlink $p/fd/$f);; esac; done; done; echo end")
    assert runtime("exec", "first", "sh", "-c", script).out.splitlines()[-1] == "end"
    inside = runtime("exec", "first", "sh", "-c", script).out
    assert "seen" not in inside, inside


def test_exec_into_an_image_that_points_at_the_runtime(runtime: Runtime, bundle: Bundle) -> None:
    """CVE-2019-5736: /bin/evil is /proc/self/exe; what runs, and what can be opened, is never the host's file."""
    before = digest()
    (bundle.rootfs / "bin/evil").symlink_to("/proc/self/exe")
    runtime.started(bundle.capabilities("CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE").sh("exec sleep 1000"))
    for _ in range(3):
        runtime("exec", "c", "/bin/evil", "--version", code=None)
        runtime("exec", "c", "sh", "-c", "for p in /proc/[0-9]*; do echo x > $p/exe; done", code=None)
    assert digest() == before


@pytest.mark.parametrize("cwd", [f"/proc/self/fd/{number}" for number in (3, 5, 7, 9)])
def test_cwd_through_a_leaked_fd(runtime: Runtime, bundle: Bundle, cwd: str) -> None:
    """CVE-2024-21626: a working folder that is a fd of the host's file system."""
    bundle.process["cwd"] = cwd
    bundle.sh("cat ../../../../../../../../etc/hostname; pwd; ls ..")
    (bundle.rootfs / "etc/hostname").write_text("inside\n")
    result = runtime.run(bundle, code=None)
    host = Path("/etc/hostname").read_text() if os.path.exists("/etc/hostname") else "\0"
    assert result.code != 0 or result.out.startswith("inside\n"), result
    assert not host.strip() or host.strip() not in result.out
    runtime.started(Bundle(bundle.path.parent / "other").sh("exec sleep 1000"), identity="d")
    result = runtime("exec", "--cwd", cwd, "d", "sh", "-c", "cat ../../../../../../../../etc/hostname", code=None)
    assert result.code != 0 and host not in result.out


def test_cwd_link_swapped_for_proc(runtime: Runtime, bundle: Bundle) -> None:
    (bundle.rootfs / "work").symlink_to("/proc/1/cwd")
    bundle.process["cwd"] = "/work"
    bundle.process["args"] = ["pwd"]
    result = runtime.run(bundle, code=None)
    assert result.code != 0 or result.out.startswith("/"), result


def test_proc_and_dev_as_links_in_the_image(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2019-19921 and its kin: what the runtime mounts goes where the links lead inside the root, never outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("proc", "sys", "dev"):
        (bundle.rootfs / name).rmdir()
        (bundle.rootfs / name).symlink_to(f"../../../..{outside}/{name}")
    result = runtime.run(bundle.sh("echo ok"), code=None)
    assert list(outside.iterdir()) == []
    assert (result.code, "/proc must be an ordinary folder" in result.err) == (1, True), result


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_proc_is_not_mounted_into_a_volume(runtime: Runtime, bundle: Bundle, tmp_path: Path, name: str) -> None:
    """Who shares the volume would move it from under the link, and what is hidden in it would be bare (CVE-2019-19921)."""
    volume = tmp_path / "volume"
    (volume / "deep").mkdir(parents=True)
    (bundle.rootfs / name).rmdir()
    (bundle.rootfs / name).symlink_to("/volume/deep")
    bundle.config["mounts"].insert(0, {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["bind"]})
    result = runtime.run(bundle.sh("echo ok"), code=1)
    assert f"mount {'proc' if name == 'proc' else 'sysfs'} on /{name}: ELOOP" in result.err, result


def test_masked_path_that_is_a_link_out(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("host")
    (bundle.rootfs / "leak").symlink_to(target)
    bundle.linux["maskedPaths"] += ["/leak"]
    runtime.run(bundle.sh("true"))
    assert target.read_text() == "host"


def test_environment_cannot_name_another_program(runtime: Runtime, bundle: Bundle) -> None:
    """The variable that tells the sealed copy where it came from is believed only in a sealed copy."""
    env = {**os.environ, "_DOLIUM_FRONT": "/tmp/evil/dolium-front"}
    assert runtime.run(bundle.sh("env"), env=env).out.count("_DOLIUM_FRONT") == 0



def on_a_shared_host(runtime: Runtime, bundle: Bundle) -> tuple[str, str]:
    """Run it where all mounts of the host are shared, as systemd has them. (output, mounts that reached the host)"""
    runtime.ids.append("c")
    script = ('mount --make-rshared / && cut -d" " -f5 /proc/self/mountinfo | sort > "$0" && "$@";'
              ' echo "code $?"; cut -d" " -f5 /proc/self/mountinfo | sort | diff "$0" - | sed "s/^/HOST /"')
    done = subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(runtime.base / "before"),
                           FRONT, "--root", str(runtime.root), "run", "--bundle", str(bundle.write()), "c"],
                          capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    return ("\n".join(line for line in lines if not line.startswith("HOST ")) + done.stderr,
            "\n".join(line for line in lines if line.startswith("HOST ")))


@pytest.mark.parametrize("user", [False, True])
def test_what_is_mounted_over_a_mask_does_not_reach_the_host(runtime: Runtime, bundle: Bundle, user: bool) -> None:
    """A mask is the host's /dev/null: as a peer of the host's mount it would take what covers it to the host's /dev/null."""
    if user:
        bundle.namespace("user", "")
        bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    bundle.capabilities("CAP_SYS_ADMIN").sh("echo evil > /tmp/evil; mount --bind /tmp/evil /proc/interrupts && "
                                            "mount --bind /tmp/evil /dev/zero; cat /proc/interrupts")
    out, reached = on_a_shared_host(runtime, bundle)
    assert out == "evil\ncode 0" and reached == ""


def test_a_shared_root_is_not_mounted_on_the_hosts(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["rootfsPropagation"] = "shared"
    out, reached = on_a_shared_host(runtime, bundle.sh("grep -c ' / / .* shared:\\| / .* shared:' /proc/self/mountinfo"))
    assert out.endswith("code 0") and not out.startswith("0") and reached == ""


def test_own_fds_are_not_preserved(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """--preserve-fds above what the caller passed would hand the runtime's own to the container: /proc of the host."""
    bundle.sh("ls -l /proc/self/fd")
    refused = runtime.run(bundle, "--preserve-fds", "2", code=1)
    assert "preserve 2 file descriptors: EBADF" in refused.err and refused.out == ""
    with open(tmp_path / "given", "w") as given:
        script = f'exec 3<&{given.fileno()} {given.fileno()}<&- && exec "$0" "$@"'
        done = subprocess.run(["bash", "-c", script, FRONT, "--root", str(runtime.root), "run", "--preserve-fds", "1",
                               "--bundle", str(bundle.path), "c"], capture_output=True, text=True, timeout=60, check=True,
                              pass_fds=[given.fileno()] if given.fileno() != 3 else [3], stdin=subprocess.DEVNULL)
    assert "/given" in done.stdout


# -- what the runtime opens, mounts and writes while somebody exchanges names under its hands --

RENAME_EXCHANGE, AT_FDCWD = 2, -100


@contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """Two names change places all the time."""
    libc, end = ctypes.CDLL(None, use_errno=True), threading.Event()

    def work() -> None:
        names = os.fsencode(one), os.fsencode(other)
        while not end.is_set():
            libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def attempts(most: int, seconds: float = 6.0) -> Iterator[int]:
    """At least one, and no more once the time is over: a virtual machine is slow."""
    begun = time.monotonic()
    for number in range(most):
        if number and time.monotonic() - begun > seconds:
            return
        yield number


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_links_exchanged_in_a_volume(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    """CVE-2021-30465: the target of a mount is in a volume where another container swaps a folder for a link to the host."""
    volume, outside, data = tmp_path / "volume", tmp_path / "outside", tmp_path / "data"
    for folder in (volume / "target", outside, data):
        folder.mkdir(parents=True)
    (volume / "link").symlink_to(outside)
    bundle.mount("/vol", "bind", str(volume), "rbind")
    if kind == "bind":
        bundle.mount("/vol/target/sub", "bind", str(data), "bind")
    else:
        bundle.mount("/vol/target/sub", "tmpfs", "tmpfs")
    bundle.sh("for f in /vol/*/sub; do echo x > $f/inside; done; ls /vol")
    ends = set()
    with exchanging(volume / "target", volume / "link"):
        for _ in attempts(12):
            ends.add(runtime.run(bundle, code=None).code)
    assert list(outside.iterdir()) == [] and ends <= {0, 1}


def test_masks_with_a_null_device_of_the_images(runtime: Runtime, bundle: Bundle) -> None:
    """CVE-2025-31133: a mask is the host's /dev/null, opened by the runtime, whatever the container's /dev/null is."""
    bundle.config["mounts"] = [entry for entry in bundle.config["mounts"] if not entry["destination"].startswith("/dev")]
    (bundle.rootfs / "dev/null").symlink_to("/proc/sys/kernel/core_pattern")
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    result = runtime.run(bundle.sh("stat -L -c %t:%T:%F /proc/kcore; echo pwned > /proc/kcore"), code=None)
    assert result.code != 0 or result.out == "1:3:character special file\n", result
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_masks_while_the_null_device_is_exchanged(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    volume = tmp_path / "dev"
    volume.mkdir()
    for name, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
        os.mknod(volume / name, 0o20666, os.makedev(1, minor))
    (volume / "link").symlink_to("/proc/sys/kernel/core_pattern")
    bundle.config["mounts"] = [entry for entry in bundle.config["mounts"] if not entry["destination"].startswith("/dev")]
    bundle.mount("/dev", "bind", str(volume), "rbind")
    bundle.sh("stat -L -c %t:%T:%F /proc/kcore")
    with exchanging(volume / "null", volume / "link"):
        for _ in attempts(8):
            result = runtime.run(bundle, code=None)
            assert result.code != 0 or result.out == "1:3:character special file\n", result


@pytest.mark.parametrize("link", ["/proc/sys/kernel/core_pattern", "/proc/self/fd/0", "../../../../../outside/file"])
def test_a_console_that_is_a_link(runtime: Runtime, bundle: Bundle, tmp_path: Path, link: str) -> None:
    """CVE-2025-52565: what is bound on /dev/console is the pty itself, and it is bound inside the root."""
    outside = tmp_path / "outside"
    outside.mkdir()
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    bundle.config["mounts"] = [entry for entry in bundle.config["mounts"] if entry["destination"] not in ("/dev", "/dev/shm", "/dev/mqueue")]
    (bundle.rootfs / "dev/console").symlink_to(link)
    (bundle.rootfs / "dev/pts").mkdir()
    bundle.process["terminal"] = True
    done = subprocess.run(["script", "-qec", f"{FRONT} --root {runtime.root} run --bundle {bundle.sh('tty; echo end').write()} c",
                           "/dev/null"], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert "/dev/pts/0" in done.stdout or "dolium-runtime: " in done.stdout, done
    assert list(outside.iterdir()) == [] and Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_a_terminal_comes_from_a_true_devpts_alone(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2025-52565, the other side: a folder of the attacker's with a ptmx that is no pty."""
    false = tmp_path / "pts"
    false.mkdir()
    (false / "ptmx").symlink_to("/dev/zero")
    bundle.config["mounts"] = [entry for entry in bundle.config["mounts"] if entry["destination"] != "/dev/pts"]
    bundle.mount("/dev/pts", "bind", str(false), "bind")
    bundle.process["terminal"] = True
    result = runtime.run(bundle.sh("echo never"), code=1)
    assert result.out == "" and "/dev/pts/ptmx" in result.err and runtime.left() == []


def test_sysctls_are_not_written_to_what_lies_on_proc(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2025-52881: a volume over /proc/sys, with links where the runtime writes."""
    false, victim = tmp_path / "sys", tmp_path / "victim"
    (false / "net/ipv4").mkdir(parents=True)
    victim.write_text("untouched")
    (false / "net/ipv4/ip_forward").symlink_to("/tmp/victim")
    bundle.mount("/proc/sys", "bind", str(false), "bind")
    bundle.mount("/tmp/victim", "bind", str(victim), "bind")
    bundle.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    runtime.started(bundle.sh("exec sleep 1000"))
    pid = runtime.state()["pid"]
    real = subprocess.run(["nsenter", "-t", str(pid), "-n", "cat", "/proc/sys/net/ipv4/ip_forward"], capture_output=True, text=True,
                          check=True)
    assert real.stdout == "1\n" and victim.read_text() == "untouched"


def test_a_false_proc_gets_nothing_written(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2025-52881: no proc at all inside but files of the image with its names."""
    bundle.config["mounts"] = [entry for entry in bundle.config["mounts"] if entry["destination"] != "/proc"]
    bundle.linux.update(maskedPaths=[], readonlyPaths=[], sysctl={"net.ipv4.ip_forward": "1"})
    names = ("sys/net/ipv4/ip_forward", "self/attr/exec", "self/attr/apparmor/exec", "self/oom_score_adj", "self/setgroups")
    for name in names:
        (bundle.rootfs / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle.rootfs / "proc" / name).write_text("untouched")
    bundle.process["oomScoreAdj"] = 500
    runtime.started(bundle.sh("exec sleep 1000"))
    runtime("exec", "c", "true")
    runtime("exec", "--apparmor", "whatever", "c", "true", code=None)
    assert all((bundle.rootfs / "proc" / name).read_text() == "untouched" for name in names)


SPY = ("while [ ! -e /tmp/end ]; do for p in /proc/[0-9]*; do e=$(readlink $p/exe) || { [ -e $p ] && echo hidden >> /tmp/seen; continue; };"
       " case $e in /bin/busybox) ;; *) echo exe $e >> /tmp/seen; echo x > $p/exe; head -c 1 $p/mem; esac; done; done 2> /dev/null")


def test_with_sys_ptrace_nothing_of_the_runtime_is_reached(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """A process with every right in its user namespace watches what comes in: execs, and inits that wait for their start."""
    bundle.namespace("user", "")
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    bundle.capabilities("CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN", "CAP_KILL")
    before = digest()
    runtime.started(bundle.sh(SPY), identity="spy")
    pid = runtime.state("spy")["pid"]
    second = Bundle(tmp_path / "second").namespace("pid", f"/proc/{pid}/ns/pid").namespace("user", f"/proc/{pid}/ns/user")
    runtime.create(second, identity="waiting")
    waiting = runtime.state("waiting")["pid"]
    for _ in attempts(20):
        runtime("exec", "spy", "true")
    state = runtime.state("waiting")
    (bundle.rootfs / "tmp/end").touch()
    seen = (bundle.rootfs / "tmp/seen").read_text().splitlines()
    assert "hidden" in seen and set(seen) == {"hidden"}, set(seen)  # it met them, and could look into none
    assert digest() == before and (state["status"], state["pid"]) == ("created", waiting)


def test_a_pipe_in_the_place_of_passwd_holds_nobody_up(runtime: Runtime, bundle: Bundle) -> None:
    """HOME comes from it where the environment has none: for init from the image's, for an exec from what is there by then."""
    bundle.process["env"] = ["PATH=/bin"]
    (bundle.rootfs / "etc/passwd").unlink()
    os.mkfifo(bundle.rootfs / "etc/passwd")
    assert runtime.run(bundle.sh("echo $HOME"), timeout=20).out == "/\n"
    runtime.started(bundle.sh("exec sleep 1000"), identity="d")
    assert runtime("exec", "d", "sh", "-c", "echo $HOME", timeout=20).out == "/\n"
    (bundle.rootfs / "etc/passwd").unlink()
    (bundle.rootfs / "etc/passwd").write_text("half\n\nroot:x:0:0:root:/elsewhere:/bin/sh\n")
    assert runtime("exec", "d", "sh", "-c", "echo $HOME", timeout=20).out == "/elsewhere\n"
