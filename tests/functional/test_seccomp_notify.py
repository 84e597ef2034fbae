"""SCMP_ACT_NOTIFY: the filter's listener goes to an agent, which answers, or does not."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, fail_with, go_on
from bundles import RUNC, Bundle, Runtime, alive, bundle, needs, runtime, until

from dolium.linux.syscall_numbers import NUMBERS

__all__ = ["bundle", "runtime"]
pytestmark = needs

CALLS = NUMBERS[os.uname().machine]
MAKERS = ["mkdir", "mkdirat"]


def notify(bundle: Bundle, path: Path | str, *names: str, flags: tuple[str, ...] = (), no_new_privs: bool = False) -> Bundle:
    """A profile that traps the calls."""
    bundle.process["noNewPrivileges"] = no_new_privs
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(path), "listenerMetadata": "meta \u0001 data",
                               "flags": [f"SECCOMP_FILTER_FLAG_{name}" for name in flags],
                               "syscalls": [{"names": list(names or MAKERS), "action": "SCMP_ACT_NOTIFY"}]}
    return bundle


def nothing_is_left(runtime: Runtime, bundle: Bundle) -> None:
    assert runtime.left() == [] and bundle.groups() == []


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_the_agent_answers_init(runtime: Runtime, bundle: Bundle, tmp_path: Path, no_new_privs: bool) -> None:
    bundle.config["annotations"] = {"a": "b"}
    with Agent(tmp_path / "agent", fail_with(errno.EUSERS)) as agent:
        result = runtime.run(notify(bundle, agent.path, no_new_privs=no_new_privs).sh("echo $$; mkdir /tmp/x; echo $?; ls /tmp"))
        assert result.out.split() == ["1", "1"] and "Too many users" in result.err
        assert set(agent.calls) <= {CALLS[name] for name in MAKERS} and agent.calls
        (state,) = agent.states
    assert state["fds"] == ["seccompFd"] and state["passed"] == 1 and state["metadata"] == "meta \u0001 data"
    assert state["ociVersion"] and state["pid"] == state["state"]["pid"] > 1
    inner = {"id": "c", "status": "creating", "bundle": str(bundle.path), "annotations": {"a": "b"}}
    assert {key: state["state"][key] for key in inner} == inner


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_the_listener_is_there_when_the_container_is_created(runtime: Runtime, bundle: Bundle, tmp_path: Path,
                                                              no_new_privs: bool) -> None:
    with Agent(tmp_path / "agent") as agent:
        runtime.create(notify(bundle, agent.path, no_new_privs=no_new_privs).sh("mkdir /tmp/x; exec sleep 1000"))
        pid = runtime.state()["pid"]
        assert [state["pid"] for state in agent.states] == [pid] and agent.calls == []
        runtime("start", "c")
        until((bundle.rootfs / "tmp/x").exists)
        assert sorted(os.listdir(f"/proc/{pid}/fd"), key=int) == ["0", "1", "2"] and os.listdir(f"/proc/{pid}/task") == [str(pid)]


def test_exec_has_a_listener_of_its_own(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", fail_with(errno.EUSERS)) as agent:
        runtime.started(notify(bundle, agent.path).sh("exec sleep 1000"))
        pid = runtime.state()["pid"]
        for more in ([], ["--no-new-privs"]):
            result = runtime("exec", *more, "c", "mkdir", "/tmp/x", code=1)
            assert "Too many users" in result.err
        first, *others = agent.states
        assert first["state"]["status"] == "creating" and len(others) == 2
        for state in others:
            assert state["state"] | {"status": "running", "id": "c", "pid": pid} == state["state"] and state["pid"] not in (0, pid)


ALL_OUR_CALLS = ["sendmsg", "recvmsg", "close", "close_range", "umask", "chdir", "getcwd", "prctl", "capset", "capget", "setgroups",
                 "setresuid", "setresgid", "fchown", "fstat", "stat", "newfstatat", "faccessat", "faccessat2", "access", "open",
                 "openat", "read", "accept4", "rt_sigprocmask", "execve", "sched_yield", "nanosleep", "futex", "wait4", "exit",
                 "munmap", "mmap", "brk", "madvise", "ioctl", "fcntl", "getuid", "dup2", "rt_sigaction", "writev"]


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_nothing_that_is_trapped_keeps_the_listener_back(runtime: Runtime, bundle: Bundle, tmp_path: Path,
                                                         no_new_privs: bool) -> None:
    """runc needs calls of the filtered process to hand over; here it makes none."""
    with Agent(tmp_path / "agent") as agent:
        notify(bundle, agent.path, *ALL_OUR_CALLS, no_new_privs=no_new_privs).sh("echo $((6*7))")
        assert runtime.run(bundle, timeout=60).out == "42\n"
        assert {CALLS["sendmsg"], CALLS["execve"], CALLS["close_range"]} <= set(agent.calls)
        runtime.started(bundle.sh("exec sleep 1000"), identity="d")
        assert runtime("exec", "d", "echo", "in").out == "in\n"


def test_an_agent_that_dies_answers_with_enosys(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", dies=True) as agent:
        result = runtime.run(notify(bundle, agent.path).sh("mkdir /tmp/x; echo $?"))
        assert result.out == "1\n" and "not implemented" in result.err and agent.calls == []


def test_an_agent_that_dies_ends_a_start_that_needs_it(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", dies=True) as agent:
        result = runtime.run(notify(bundle, agent.path, "sendmsg", "close", "umask").sh("echo never"), code=1, timeout=60)
        assert result.out == "" and result.err.startswith("dolium-runtime: ")
    nothing_is_left(runtime, bundle)


def test_an_agent_that_never_answers_holds_its_container_only(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", None) as agent:
        notify(bundle, agent.path, flags=("WAIT_KILLABLE_RECV", "TSYNC", "LOG"))
        runtime.started(bundle.sh("mkdir /tmp/x; echo never > /tmp/y"))
        pid = runtime.state()["pid"]
        assert select.select(agent.listeners, [], [], 30)[0]  # it waits there
        runtime("delete", "--force", "c")
        assert not alive(pid) and not (bundle.rootfs / "tmp/y").exists()
    nothing_is_left(runtime, bundle)


def test_a_start_that_waits_for_the_agent_dies_with_its_runtime(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", None) as agent:
        notify(bundle, agent.path, "umask").sh("echo never").write()
        runtime.ids.append("c")
        front = runtime.popen("run", "--bundle", str(bundle.path), "c")
        until(lambda: agent.states)
        pid = agent.states[0]["pid"]
        front.send_signal(signal.SIGKILL)
        until(lambda: not alive(pid), "the half-made init is gone")
        runtime("delete", "--force", "c")
    nothing_is_left(runtime, bundle)


@pytest.mark.parametrize("kind", ["absent", "a file", "nobody listens", "hangs up"])
def test_a_missing_agent_leaves_nothing(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    import socket
    import threading

    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if kind == "a file":
            path.touch()
        elif kind != "absent":
            listener.bind(str(path))
        if kind == "hangs up":
            listener.listen()
            hang_up = threading.Thread(target=lambda: listener.accept()[0].close())
            hang_up.start()
            # the slow part of a start comes between: the socket is closed before there is a listener
            bundle.hook("createRuntime", "/bin/sh", "-c", "sleep 0.3")
        result = runtime.run(notify(bundle, path).sh("echo never"), code=1)
        if kind == "hangs up":
            hang_up.join()
    assert result.out == "" and "listenerPath" in result.err
    expected = {"absent": "ENOENT", "a file": "ECONNREFUSED", "nobody listens": "ECONNREFUSED", "hangs up": "EPIPE"}[kind]
    assert expected in result.err, result
    nothing_is_left(runtime, bundle)


def test_what_runc_refuses_is_refused(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    for names, action, path, words in (
        (["write"], "SCMP_ACT_ALLOW", "/x", "SCMP_ACT_NOTIFY cannot be used for the write syscall"),
        (["mkdir"], "SCMP_ACT_NOTIFY", "/x", "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY"),
        (["mkdir"], "SCMP_ACT_ALLOW", "", "linux.seccomp.listener"),
    ):
        notify(bundle, path, *names).linux["seccomp"]["defaultAction"] = action
        result = runtime.run(bundle, code=1)
        assert words in result.err
        nothing_is_left(runtime, bundle)
    bundle.linux["seccomp"]["syscalls"][0]["action"] = "SCMP_ACT_LOG"  # then the path is not looked at
    bundle.linux["seccomp"] |= {"listenerPath": "/nobody", "defaultAction": "SCMP_ACT_ALLOW"}
    assert runtime.run(bundle.sh("echo ok")).out == "ok\n"


@pytest.mark.parametrize("kind", ["user", "time"])
def test_in_namespaces_of_its_own(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    bundle.namespace(kind, "")
    if kind == "user":
        bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    else:
        bundle.linux["timeOffsets"] = {"boottime": {"secs": 1_000_000_000}}
    with Agent(tmp_path / "agent", fail_with(errno.EUSERS)) as agent:
        result = runtime.run(notify(bundle, agent.path).sh("mkdir /tmp/x; cut -d. -f1 /proc/uptime"))
        assert "Too many users" in result.err and len(agent.states) == 1
    assert kind == "user" or int(result.out) > 1_000_000_000


def test_a_real_time_process_on_one_cpu(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """It waits for a thread of the ordinary kind, on the only CPU that both may use."""
    with Agent(tmp_path / "agent") as agent:
        notify(bundle, agent.path, *MAKERS, no_new_privs=True).sh("mkdir /tmp/x; echo $?")
        bundle.process["scheduler"] = {"policy": "SCHED_FIFO", "priority": 10}
        done = runtime.run(bundle, code=None, timeout=60, preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}))
        if "set process.scheduler" in done.err:
            pytest.skip(f"no real-time scheduling here: {done.err}")
        assert done.out == "0\n" and agent.calls


@pytest.mark.skipif(RUNC is None, reason="needs the package runc")
def test_runc_hands_over_the_same(bundle: Bundle, runtime: Runtime, tmp_path: Path) -> None:
    """The control: the state that runc sends has the same fields. (runc 1.1.5 leaves its connection open.)"""
    states = []
    for program in ("dolium", "runc"):
        with Agent(tmp_path / program, fail_with(errno.EUSERS), to_the_end=program == "dolium") as agent:
            notify(bundle, agent.path).sh("mkdir /tmp/x").write()
            bundle.config["ociVersion"] = "1.0.2"
            del bundle.linux["seccomp"]["flags"]
            bundle.write()
            if program == "runc":
                words = [RUNC or "", "--root", str(tmp_path / "runc-state"), "run", "--bundle", str(bundle.path), "c"]
                done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
                assert "Too many users" in done.stderr, done
            else:
                runtime.run(bundle, code=1)
            states.append(agent.states[0])
    ours, theirs = states
    assert set(ours) == set(theirs) and set(ours["state"]) == set(theirs["state"])
    for key in ("fds", "metadata", "passed"):
        assert ours[key] == theirs[key]
    assert {**ours["state"], "pid": 0, "ociVersion": ""} == {**theirs["state"], "pid": 0, "ociVersion": ""}


def test_features_name_it(runtime: Runtime) -> None:
    seccomp: dict[str, Any] = json.loads(runtime("features").out)["linux"]["seccomp"]
    assert "SCMP_ACT_NOTIFY" in seccomp["actions"] and "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" in seccomp["supportedFlags"]
    assert go_on(0) == (0, 0, 1)
