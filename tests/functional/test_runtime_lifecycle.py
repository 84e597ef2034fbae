"""dolium-runtime's commands on real bundles: states, exit codes, streams, what a wrong order is answered with."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from bundles import FRONT, Bundle, Runtime, alive, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs

PR_SET_CHILD_SUBREAPER = 36


def test_run_passes_streams_and_exit_code(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("cat; echo err >&2; exit 7")
    result = runtime.run(bundle, stdin="in\n", code=7)
    assert (result.out, result.err) == ("in\n", "err\n")
    assert runtime.left() == [] and bundle.groups() == []


def test_run_of_a_program_killed_by_a_signal_gives_128_and_the_signal(runtime: Runtime, bundle: Bundle) -> None:
    # pid 1 ignores its own signals: the shell's child dies by it and the shell passes the status on
    bundle.sh("sh -c 'kill -9 $$'; exit $?")
    runtime.run(bundle, code=137)
    started = runtime.popen("run", "--bundle", str(bundle.sh("echo up; while :; do sleep 1; done").write()), "k")
    assert started.stdout is not None and started.stdout.readline() == "up\n"
    runtime("kill", "k", "KILL")
    assert started.wait(30) == 137
    started.communicate()


def test_run_forwards_signals_to_init(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("trap 'echo got; exit 5' TERM; echo up; while :; do sleep 0.01; done")
    started = runtime.popen("run", "--bundle", str(bundle.write()), "c")
    assert started.stdout is not None and started.stdout.readline() == "up\n"
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=30)
    assert (out, started.returncode) == ("got\n", 5)


def test_delete_force_of_a_container_that_runs_in_the_foreground(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.hook("poststop", "/bin/sh", "-c", f"echo once >> {tmp_path}/stopped").sh("echo up; exec sleep 1000")
    started = runtime.popen("run", "--bundle", str(bundle.write()), "c")
    assert started.stdout is not None and started.stdout.readline() == "up\n"
    runtime("delete", "--force", "c")
    assert started.communicate(timeout=30) == ("", "") and started.returncode == 137
    assert (tmp_path / "stopped").read_text() == "once\n" and runtime.left() == []


def test_large_input_and_output_pass_unchanged(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["args"] = ["cat"]
    text = "".join(f"{number:07d}\n" for number in range(200_000))
    assert runtime.run(bundle, stdin=text).out == text


def test_create_start_kill_delete(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("exec sleep 1000")
    bundle.config["annotations"] = {"org.example": "1"}
    runtime.create(bundle)
    state = runtime.state()
    assert state["status"] == "created" and state["id"] == "c" and state["bundle"] == str(bundle.path)
    assert state["annotations"] == {"org.example": "1"} and state["ociVersion"].startswith("1.")
    assert alive(state["pid"])
    runtime("start", "c")
    assert runtime.state()["status"] == "running"
    until(lambda: b"sleep" in Path(f"/proc/{state['pid']}/cmdline").read_bytes(), "it runs")  # runc does not wait for exec
    assert "cannot delete container c that is not stopped" in runtime("delete", "c", code=1).err
    assert alive(state["pid"])
    runtime("kill", "c", "SIGKILL")
    runtime.wait_status("stopped")
    assert runtime.state()["pid"] == 0
    runtime("delete", "c")
    assert "does not exist" in runtime("state", "c", code=1).err
    assert runtime.left() == [] and bundle.groups() == []


def test_init_belongs_to_the_callers_subreaper_after_create(runtime: Runtime, bundle: Bundle) -> None:
    assert ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        runtime.create(bundle.sh("exit 3"))
        pid = runtime.state()["pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" in status
        runtime("start", "c")
        found, code = os.waitpid(pid, 0)
        assert (found, os.waitstatus_to_exitcode(code)) == (pid, 3)
        assert runtime.state()["status"] == "stopped"
        runtime("delete", "c")
    finally:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_a_created_init_survives_the_runtime_and_shows_nothing_of_it(runtime: Runtime, bundle: Bundle) -> None:
    runtime.create(bundle.sh("sleep 1000"))
    pid = runtime.state()["pid"]
    assert os.readlink(f"/proc/{pid}/exe").startswith("/memfd:")  # never the file on the host
    inside = os.listdir(f"/proc/{pid}/root/")
    assert "busybox" not in inside and "bin" in inside
    runtime("delete", "--force", "c")
    until(lambda: not alive(pid), "init dies")


def test_wrong_orders_are_refused_and_change_nothing(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("exec sleep 1000")
    runtime.started(bundle)
    pid = runtime.state()["pid"]
    for command, words in (("start", "already running"), ("resume", "not paused")):
        assert words in runtime(command, "c", code=1).err
    assert "already exists" in runtime("create", "--bundle", str(bundle.path), "c", code=1).err
    assert "already exists" in runtime("run", "--bundle", str(bundle.path), "c", code=1).err
    assert runtime.state() | {"status": "running"} == runtime.state() and runtime.state()["pid"] == pid
    runtime("kill", "c", "9")
    runtime.wait_status("stopped")
    assert "not running" in runtime("kill", "c", code=1).err
    assert "has stopped" in runtime("start", "c", code=1).err
    assert "stopped" in runtime("exec", "c", "true", code=255).err
    assert "not running" in runtime("pause", "c", code=1).err
    runtime("kill", "--all", "c", "9")  # engines sweep so after init's death
    runtime("delete", "c")
    for words in (["start", "c"], ["kill", "c"], ["delete", "c"], ["exec", "c", "true"], ["pause", "c"]):
        assert "does not exist" in runtime(*words, code=255 if words[0] == "exec" else 1).err
    runtime("delete", "--force", "c")  # idempotent


def test_delete_force_of_a_created_a_running_and_a_paused_container(runtime: Runtime, bundle: Bundle) -> None:
    for prepare in ("create", "start", "pause"):
        runtime.create(bundle.sh("sleep 1000 & sleep 1000"), identity=prepare)
        if prepare != "create":
            runtime("start", prepare)
        if prepare == "pause":
            runtime("pause", prepare)
        pid = runtime.state(prepare)["pid"]
        runtime("delete", "--force", prepare)
        assert not alive(pid) and bundle.groups() == [] and runtime.left() == []


def test_a_created_container_is_paused_and_resumed(runtime: Runtime, bundle: Bundle) -> None:
    runtime.create(bundle.sh("touch /tmp/started; exec sleep 1000"))
    runtime("pause", "c")
    assert runtime.state()["status"] == "paused"
    assert "in the paused state" in runtime("start", "c", code=1).err
    assert "that is not stopped: paused" in runtime("delete", "c", code=1).err
    runtime("resume", "c")
    assert runtime.state()["status"] == "created"
    runtime("start", "c")
    until(lambda: (bundle.rootfs / "tmp/started").exists(), "it runs")


def test_kill_all_reaches_everyone(runtime: Runtime, bundle: Bundle) -> None:
    """Its children too, with any signal."""
    script = "trap 'echo %s >> /tmp/got' USR1; echo > /tmp/ready-%s; while :; do sleep 0.02; done"
    runtime.started(bundle.sh(f"({script % (('child',) * 2)}) & {script % (('init',) * 2)}"))
    until(lambda: len(list((bundle.rootfs / "tmp").glob("ready-*"))) == 2, "both listen")
    runtime("kill", "c", "USR1")
    got = bundle.rootfs / "tmp/got"
    until(lambda: got.exists() and got.read_text() == "init\n", "init alone")
    runtime("kill", "--all", "c", "USR1")
    until(lambda: sorted(got.read_text().split()) == ["child", "init", "init"], "both")


def test_kill_all_misses_nobody_who_is_made_meanwhile(runtime: Runtime, bundle: Bundle) -> None:
    """A chain: each process starts the next and ends, so that who was listed is gone when its signal comes."""
    chain = bundle.rootfs / "bin/chain"
    chain.write_text("#!/bin/sh\n: > /tmp/up\nchain &\n")
    chain.chmod(0o755)
    runtime.started(bundle.sh("trap : TERM; chain; while :; do wait; sleep 1000 & wait $!; done"))
    until(lambda: (bundle.rootfs / "tmp/up").exists(), "it goes from one to the next")

    def links() -> int:
        runtime("pause", "c")
        pids = json.loads(runtime("ps", "-f", "json", "c").out)
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
        runtime("resume", "c")
        return names.count("chain")

    assert links() > 0
    runtime("kill", "--all", "c", "TERM")
    until(lambda: links() == 0, "the chain has ended")
    assert runtime.state()["status"] == "running", "init, which the signal does not end, was let go on"


def test_delete_of_a_created_container_needs_no_force(runtime: Runtime, bundle: Bundle) -> None:
    runtime.create(bundle)
    pid = runtime.state()["pid"]
    runtime("delete", "c")
    assert not alive(pid) and bundle.groups() == []


def test_a_paused_container_can_be_killed(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    runtime("pause", "c")
    runtime("kill", "c", "TERM")
    assert runtime.state()["status"] == "paused", "any other signal waits"
    runtime("kill", "c", "KILL")
    runtime.wait_status("stopped")


def test_kill_takes_names_and_numbers(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("for s in TERM USR1 HUP; do trap \"echo $s >> /tmp/got\" $s; done; echo up > /tmp/got;"
              "while :; do sleep 0.01; done")
    runtime.started(bundle)
    got = bundle.rootfs / "tmp/got"
    until(lambda: got.exists() and got.read_text() == "up\n", "the traps are set")
    for signal_name, name in (("TERM", "TERM"), ("SIGUSR1", "USR1"), ("1", "HUP")):
        before = got.read_text()
        runtime("kill", "c", signal_name)
        until(lambda before=before, name=name: got.read_text() == f"{before}{name}\n", f"{name} arrives")
    assert "unknown signal" in runtime("kill", "c", "NOSUCH", code=1).err


def test_kill_all_ends_every_process(runtime: Runtime, bundle: Bundle) -> None:
    bundle.namespace("pid", absent=True).sh("sleep 1000 & sleep 1000 & echo up > /tmp/up; wait")
    runtime.started(bundle)
    until(lambda: (bundle.rootfs / "tmp/up").exists(), "it runs")
    procs = Path(bundle.group("pids"), "cgroup.procs")
    pids = [int(line) for line in procs.read_text().split()]
    assert len(pids) == 3
    runtime("kill", "--all", "c", "KILL")
    until(lambda: not any(alive(pid) for pid in pids), "the signal has ended them all")
    runtime("delete", "c")


def test_list(runtime: Runtime, bundle: Bundle) -> None:
    assert runtime("list", "-q").out == "" and runtime("list", "--format", "json").out == "null\n"
    bundle.config["annotations"] = {"a": "b"}
    runtime.create(bundle, identity="one")
    pid = runtime.state("one")["pid"]
    assert runtime("list", "-q").out == "one\n"
    (row,) = json.loads(runtime("list", "--format", "json").out)
    assert (row["id"], row["pid"], row["status"], row["owner"]) == ("one", pid, "created", "root")
    assert row["annotations"] == {"a": "b"}
    head, line = runtime("list").out.splitlines()
    assert head.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert line.startswith(f"{'one':12}{pid:<12}{'created':12}{bundle.path}   2")
    assert line.split()[:4] == ["one", str(pid), "created", str(bundle.path)]


def test_ps(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("sleep 1001 & echo up > /tmp/up; wait"))
    until(lambda: (bundle.rootfs / "tmp/up").exists(), "it runs")
    pids = json.loads(runtime("ps", "--format", "json", "c").out)
    assert runtime.state()["pid"] in pids and len(pids) == 2
    table = runtime("ps", "c").out.splitlines()
    assert table[0].split()[:3] == ["UID", "PID", "PPID"] and len(table) == 3 and table[2].endswith("sleep 1001")
    assert runtime("ps", "c", "-o", "args,pid").out.splitlines()[0].split() == ["COMMAND", "PID"]
    assert "couldn't find PID field" in runtime("ps", "c", "-o", "args", code=1).err
    assert "exit status 1: error: unknown gnu" in runtime("ps", "c", "--nosuch", code=1).err
    assert f"{pids[1]:>10} sleep 1001" in runtime("ps", "c", env={"PATH": "/nosuch"}).out
    assert "not installed" in runtime("ps", "c", "-ef", code=1, env={"PATH": "/nosuch"}).err
    assert sorted(os.listdir(runtime.root / "c")) == ["config.json", "state.json"]
    runtime("kill", "--all", "c", "KILL")
    assert runtime("ps", "-f", "json", "c").out == "null\n"


def test_features(runtime: Runtime) -> None:
    features = json.loads(runtime("features").out)
    assert {"user", "time"} <= set(features["linux"]["namespaces"])
    assert "SCMP_ACT_ERRNO" in features["linux"]["seccomp"]["actions"]
    assert set(features["hooks"]) == {"prestart", "createRuntime", "createContainer", "startContainer", "poststart",
                                      "poststop"}
    assert features["potentiallyUnsafeConfigAnnotations"] == ["org.systemd.property."]
    # every option that runc knows; remount has nothing to change in a container that is made
    known = {"acl", "async", "dirsync", "iversion", "lazytime", "loud", "mand", "noacl", "noiversion", "nolazytime", "nomand", "silent",
             "sync", "defaults", "bind", "rro", "tmpcopyup", "rnosymfollow"}
    assert known <= set(features["mountOptions"]) and "remount" not in features["mountOptions"]
    # features-linux.md: of the runtime, whatever the host has
    told = [features["linux"][name] for name in ("cgroup", "apparmor", "selinux", "intelRdt")]
    assert all(value is True for room in told for value in room.values()) and set(told[0]) == {"v1", "v2", "systemd", "systemdUser", "rdma"}


def test_pause_stops_and_resume_goes_on(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("n=0; while :; do n=$((n+1)); echo $n > /tmp/n; sleep 0.001; done")
    runtime.started(bundle)
    counter = bundle.rootfs / "tmp/n"
    until(lambda: counter.exists() and counter.read_text(), "it counts")
    runtime("pause", "c")
    assert runtime.state()["status"] == "paused"
    pid = runtime.state()["pid"]
    before = Path(f"/proc/{pid}/schedstat").read_text().split()[2]
    assert "paused" in runtime("exec", "c", "true", code=255).err
    assert Path(f"/proc/{pid}/schedstat").read_text().split()[2] == before  # it was not scheduled once
    runtime("resume", "c")
    assert runtime.state()["status"] == "running"
    until(lambda: Path(f"/proc/{pid}/schedstat").read_text().split()[2] != before, "it runs again")


def test_exec_joins_everything_and_gives_the_exit_code(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    pid = runtime.state()["pid"]
    links = runtime("exec", "c", "sh", "-c", "for n in mnt pid net ipc uts cgroup; do readlink /proc/self/ns/$n; done")
    assert links.out.split() == [os.readlink(f"/proc/{pid}/ns/{name}")
                                 for name in ("mnt", "pid", "net", "ipc", "uts", "cgroup")]
    assert runtime("exec", "c", "sh", "-c", "cat; exit 9", stdin="in", code=9).out == "in"
    inside = runtime("exec", "c", "cat", "/proc/self/cgroup").out
    assert all(line.endswith(":/") for line in inside.splitlines()), inside  # the container's own group is the root
    assert runtime("exec", "c", "sh", "-c", "ls /proc/self/fd | wc -l").out.strip() == "4"  # the fourth is ls's own
    result = runtime("exec", "c", "nosuch", code=None)
    assert result.code != 0 and "executable file not found in $PATH" in result.err


def test_exec_takes_the_containers_limits_and_the_flags_changes(runtime: Runtime, bundle: Bundle) -> None:
    bundle.capabilities("CAP_KILL", "CAP_SETUID", "CAP_SETGID")
    bundle.sh("exec sleep 1000")
    runtime.started(bundle)
    status = runtime("exec", "c", "cat", "/proc/self/status").out
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    mask = f"{1 << 5 | 1 << 7 | 1 << 6:016x}"
    assert fields["CapEff"].strip() == fields["CapBnd"].strip() == mask and fields["NoNewPrivs"].strip() == "1"
    out = runtime("exec", "--cwd", "/tmp", "--user", "1000:1000", "-g", "5", "-e", "A=b c", "c", "sh", "-c",
                  "pwd; id -u; id -g; id -G; echo $A; echo $HOME").out
    assert out.splitlines() == ["/tmp", "1000", "1000", "1000 5", "b c", "/home"]
    raised = runtime("exec", "--cap", "CAP_CHOWN", "c", "grep", "CapEff", "/proc/self/status").out
    assert int(raised.split()[1], 16) == int(mask, 16) | 1
    process = {"args": ["sh", "-c", "ulimit -n; umask"], "cwd": "/", "env": ["PATH=/bin"],
               "user": {"uid": 0, "gid": 0, "umask": 0o77}, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 78}]}
    path = bundle.path / "process.json"
    path.write_text(json.dumps(process))
    assert runtime("exec", "--process", str(path), "c").out.split() == ["77", "0077"]


def test_what_keeps_an_exec_from_running_is_no_exit_code_of_a_program(runtime: Runtime, bundle: Bundle) -> None:
    """255, as runc's. Docker's and podman's clients tell 126 and 127 from the text."""
    runtime.started(bundle.sh("exec sleep 1000"))
    for words in (["c", "nosuch"], ["--detach", "c", "/bin"], ["--cwd", "/nosuch", "c", "true"], ["-e", "BAD", "c", "true"],
                  ["nope", "true"], ["c"]):
        assert runtime("exec", *words, code=255).err.startswith("dolium-runtime: ")
    assert runtime("exec", "--detach", "c", "true").err == ""


def test_detached_exec_writes_its_pid_and_lives_on(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    pid_file = tmp_path / "exec.pid"
    with open(os.devnull, "r+") as null:
        subprocess.run([FRONT, "--root", str(runtime.root), "exec", "--detach", "--pid-file", str(pid_file), "c", "sleep",
                        "1001"], stdin=null, stdout=null, check=True, timeout=60)
    pid = int(pid_file.read_text())
    assert b"1001" in Path(f"/proc/{pid}/cmdline").read_bytes()
    runtime("delete", "--force", "c")
    assert not alive(pid)


def test_exec_into_a_paused_container_when_asked(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    runtime("pause", "c")
    started = runtime.popen("exec", "--ignore-paused", "c", "echo", "thawed")
    until(lambda: len(Path(bundle.group("pids"), "cgroup.procs").read_text().split()) == 2, "the exec is in the group")
    runtime("resume", "c")
    out, err = started.communicate(timeout=30)
    assert (out, started.returncode) == ("thawed\n", 0), err


def test_pid_file_holds_inits_pid_before_start(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    pid_file = tmp_path / "init.pid"
    runtime.create(bundle, "--pid-file", str(pid_file))
    assert pid_file.read_text() == str(runtime.state()["pid"])


def test_relative_paths_are_seen_from_the_callers_cwd(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("echo ok").write()
    done = runtime("run", "--pid-file", "p", "c", cwd=bundle.path)
    assert done.out == "ok\n" and (bundle.path / "p").exists()


def test_preserved_fds_arrive_and_no_others(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "three").write_text("three\n")
    with open(tmp_path / "three") as three, open(tmp_path / "three") as other:
        os.set_inheritable(other.fileno(), True)
        fds = [os.dup2(three.fileno(), number) for number in (20, 21)]
        for fd in fds:
            os.set_inheritable(fd, True)
        script = f'exec 3<&20 4<&21; exec {FRONT} --root {runtime.root} run --preserve-fds 2 --bundle {bundle.path} c'
        bundle.sh("ls /proc/self/fd; cat <&3; cat <&4").write()
        runtime.ids.append("c")
        done = subprocess.run(["bash", "-c", script], pass_fds=[*fds, other.fileno()], capture_output=True, text=True,
                              timeout=60, check=False)
        for fd in fds:
            os.close(fd)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    # one open file: the second reader finds it at its end. The last of the fds listed is ls's own.
    assert lines[:5] == ["0", "1", "2", "3", "4"] and lines[-1] == "three" and len(lines) == 7


def test_bad_ids_and_flags_are_refused(runtime: Runtime, bundle: Bundle) -> None:
    bundle.write()
    for identity in ("..", "a/b", "a b", "ä", "x" * 1025):
        assert runtime("run", "--bundle", str(bundle.path), "--", identity, code=1).out == ""
    for words in (["--nosuch", "list"], ["nosuch"], ["create"], ["run", "a", "b"], ["kill"], ["exec", "c"],
                  ["list", "--format", "xml"], ["--log-format", "xml", "list"], ["run", "--preserve-fds", "x", "c"],
                  ["exec", "--preserve-fds", "x", "c", "true"], ["kill", "c", "9" * 5000], ["--root"]):
        result = runtime(*words, code=None)
        assert result.code == (255 if "exec" in words else 1) and result.err.startswith("dolium-runtime: "), (words, result)
    assert runtime.left() == []


def test_errors_go_to_the_log_file_too(runtime: Runtime, tmp_path: Path) -> None:
    for form in ("json", "text"):
        log = tmp_path / f"log.{form}"
        runtime("--log", str(log), "--log-format", form, "start", "absent", code=1)
        line = log.read_text()
        if form == "json":
            assert json.loads(line)["level"] == "error" and "absent does not exist" in json.loads(line)["msg"]
        else:
            assert 'level=error msg="container absent does not exist"' in line


def test_debug_tells_each_operation_and_its_time(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    result = runtime.run(bundle.sh("echo out"), "--keep", code=None)
    runtime("delete", "c")
    log = tmp_path / "log"
    runtime("--debug", "--log", str(log), "--log-format", "json", "run", "--bundle", str(bundle.path), "c")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["level"] for line in lines} == {"debug"} and result.err == ""
    said = [line["msg"].split(" ", 3) for line in lines]
    assert all(int(words[0]) > 0 and words[1] == "us" for words in said)
    assert {"cg_mkdir:", "clone:", "mount_fs:", "pivot:", "cg_rmdir:"} <= {words[2] for words in said}  # the child's are among them
    assert "us lock: lock" in runtime("--debug", "delete", "--force", "nope", code=None).err or runtime.left() == []


def test_spec_writes_a_bundle_that_runs(runtime: Runtime, bundle: Bundle) -> None:
    runtime("spec", "--bundle", str(bundle.path))
    config = json.loads((bundle.path / "config.json").read_text())
    assert "exists" in runtime("spec", "--bundle", str(bundle.path), code=1).err
    config["process"].update(terminal=False, args=["hostname"])
    bundle.config = config
    assert runtime.run(bundle).out == "dolium\n"


@pytest.mark.parametrize("command", ["", "help", "--help", "run --help"])
def test_help(runtime: Runtime, command: str) -> None:
    assert runtime(*command.split()).out.startswith("usage: dolium-runtime")
