"""`docker run` and its flags, by the real docker command line."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from agent import Agent, fail_with
from daemon import DOCKER, Daemon, eventually

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background


def out(engine: Daemon, *words: str, **options: object) -> str:
    return engine.docker("run", "--rm", *words, **options).stdout


def test_output_error_and_exit_code(engine: Daemon) -> None:
    done = engine.docker("run", "--rm", "base:1", "sh", "-c", "echo out; echo err >&2; exit 3", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_standard_input_half_close(engine: Daemon) -> None:
    data = "".join(f"{number}\n" for number in range(100_000))
    assert out(engine, "-i", "base:1", "cat", input=data) == data


def test_without_i_standard_input_is_empty(engine: Daemon) -> None:
    assert out(engine, "base:1", "cat", input="not seen") == ""


@pytest.mark.parametrize(("command", "code", "text"), [
    ("nope", 127, "executable file not found in $PATH"),
    ("/no/such", 127, "no such file or directory"),
    ("/etc/passwd", 126, "permission denied"),
    ("/etc", 126, "is a directory"),
])
def test_a_program_that_cannot_run(engine: Daemon, command: str, code: int, text: str) -> None:
    done = engine.docker("run", "--rm", "base:1", command, check=False)
    assert done.returncode == code
    assert text in done.stderr


def test_killed_by_a_signal(engine: Daemon) -> None:
    done = engine.docker("run", "--rm", "--init", "base:1", "sh", "-c", "kill -9 $$", check=False)
    assert done.returncode == 137
    done = engine.docker("run", "--rm", "--init", "base:1", "sh", "-c", "kill -TERM $$", check=False)
    assert done.returncode == 143


def test_a_missing_image_is_named(engine: Daemon) -> None:
    done = engine.docker("run", "--rm", "--pull", "never", "nothing:here", check=False)
    assert done.returncode == 125
    assert "No such image: nothing:here" in done.stderr


@pytest.mark.parametrize(("words", "text"), [
    (["--memory", "1m"], "Minimum memory limit allowed is 6MB"),
    (["--cap-add", "NOSUCH"], "unknown capability"),
    (["-v", "/a:/b", "-v", "/c:/b"], "Duplicate mount point: /b"),
    (["-w", "relative"], "needs to be an absolute path"),
    (["--network", "nowhere"], "network nowhere not found"),
    (["--log-driver", "syslog"], "no log driver named 'syslog'"),
    (["-u", "ghost"], "unable to find user ghost"),
    (["--name", "a/b"], "Invalid container name"),
    (["--mount", "type=bind,src=/no/such/place,dst=/x"], "bind source path does not exist"),
])
def test_bad_flags_say_what_is_wrong_and_leave_nothing(engine: Daemon, words: list[str], text: str) -> None:
    before = engine.docker("ps", "-aq").stdout
    done = engine.docker("run", "--rm", *words, "base:1", "true", check=False)
    assert done.returncode != 0
    assert text in done.stderr
    eventually(lambda: engine.docker("ps", "-aq").stdout == before, "the failed container is removed")


def test_users_groups_and_home(engine: Daemon) -> None:
    assert out(engine, "-u", "app", "base:1", "sh", "-c", "id; echo $HOME").splitlines() == [
        "uid=1000(app) gid=1000(app) groups=2000(extra)", "/home/app"]
    assert out(engine, "-u", "1234:5678", "--group-add", "extra", "base:1", "id").strip() == \
        "uid=1234 gid=5678 groups=2000(extra)"
    assert out(engine, "base:1", "sh", "-c", "echo $HOME $PATH").strip().startswith("/root /usr/local/sbin:")


def test_environment_workdir_hostname_labels(engine: Daemon) -> None:
    text = out(engine, "-e", "A=1", "-e", "B=two words", "-w", "/new/dir", "-h", "box", "-t", "base:1", "sh", "-c",
               "echo $A/$B/$TERM; pwd; hostname; cat /etc/hostname")
    assert text.splitlines()[:4] == ["1/two words/xterm", "/new/dir", "box", "box"]
    assert out(engine, "--entrypoint", "echo", "base:1", "x").strip() == "x"


def test_names_and_hosts(engine: Daemon) -> None:
    text = out(engine, "--add-host", "there:10.1.2.3", "--dns", "10.9.9.9", "--dns-search", "lan", "base:1", "sh", "-c",
               "cat /etc/hosts /etc/resolv.conf")
    assert re.search(r"^10\.1\.2\.3\s+there$", text, re.MULTILINE)
    assert "nameserver 10.9.9.9\nsearch lan\n" in text


def test_what_docker_injects(engine: Daemon) -> None:
    text = out(engine, "base:1", "sh", "-c",
               "df -k /dev/shm | tail -1; cat /proc/sys/net/ipv4/ip_unprivileged_port_start "
               "/proc/sys/net/ipv4/ping_group_range; mount")
    lines = text.splitlines()
    assert lines[0].split()[1] == "65536"
    assert lines[1] == "0"
    assert lines[2].split() == ["0", "2147483647"]
    for place in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/mqueue", "/sys/fs/cgroup"):
        assert any(f" on {place} " in line for line in lines)


def test_limits_reach_the_cgroup(engine: Daemon) -> None:
    text = out(engine, "-m", "64m", "--cpus", "0.5", "--pids-limit", "33", "-c", "512", "base:1", "sh", "-c",
               "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max cpu/cpu.shares "
               "2>/dev/null || cat memory.max cpu.max pids.max")
    assert text.split()[0] == str(64 << 20)
    assert "50000" in text
    assert "33" in text.split()


def test_out_of_memory_is_told(engine: Daemon) -> None:
    done = engine.docker("run", "--name", "oom", "-m", "16m", "base:1", "sh", "-c", "exec tail /dev/zero", check=False)
    try:
        assert done.returncode == 137
        assert engine.inspect("oom")["State"]["OOMKilled"] is True
    finally:
        engine.docker("rm", "oom")


def _caps(text: str, name: str) -> int:
    match = re.search(rf"^{name}:\s*([0-9a-f]+)$", text, re.MULTILINE)
    assert match
    return int(match.group(1), 16)


def test_capabilities_seccomp_and_no_new_privileges(engine: Daemon) -> None:
    text = out(engine, "base:1", "cat", "/proc/self/status")
    assert _caps(text, "CapBnd") == 0xA80425FB
    assert "Seccomp:\t2" in text
    assert "NoNewPrivs:\t0" in text
    assert _caps(out(engine, "--cap-drop", "ALL", "--cap-add", "CHOWN", "base:1", "cat", "/proc/self/status"), "CapEff") == 1
    text = out(engine, "-u", "app", "--security-opt", "no-new-privileges", "--security-opt", "seccomp=unconfined", "base:1",
               "cat", "/proc/self/status")
    assert _caps(text, "CapEff") == 0
    assert "Seccomp:\t0" in text
    assert "NoNewPrivs:\t1" in text
    with open("/proc/self/status") as file:
        own = _caps(file.read(), "CapPrm")
    assert _caps(out(engine, "--privileged", "base:1", "cat", "/proc/self/status"), "CapEff") == own


@pytest.mark.parametrize("more", [(), ("--security-opt", "no-new-privileges")])
def test_a_seccomp_agent_answers_run_and_exec(engine: Daemon, tmp_path: Path, more: tuple[str, ...]) -> None:
    profile = tmp_path / "profile.json"
    content = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(tmp_path / "agent"), "listenerMetadata": "told",
               "flags": ["SECCOMP_FILTER_FLAG_LOG"],
               "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]}
    profile.write_text(json.dumps(content))
    words = ("-d", "--name", "asked", *more, "--security-opt", f"seccomp={profile}", "base:1", "sh", "-c",
             "mkdir /x; exec sleep 1000")
    refused = engine.docker("run", *words, check=False)
    assert refused.returncode != 0 and f"linux.seccomp.listenerPath {tmp_path}/agent" in refused.stderr
    engine.docker("rm", "asked")
    with Agent(tmp_path / "agent", fail_with(errno.EUSERS)) as agent:
        try:
            engine.docker("run", *words)
            eventually(lambda: "Too many users" in engine.docker("logs", "asked").stderr, "the agent's answer")
            assert "Too many users" in engine.docker("exec", "asked", "mkdir", "/y", check=False).stderr
            first, second = agent.states
            pid = engine.inspect("asked")["State"]["Pid"]
            assert first["metadata"] == second["metadata"] == "told" and first["pid"] == second["state"]["pid"] == pid
            assert (first["state"]["status"], second["state"]["status"]) == ("creating", "running") and second["pid"] != pid
        finally:
            engine.docker("rm", "-f", "asked")


def test_a_filter_of_ones_own(engine: Daemon) -> None:
    profile = engine.folder / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}))
    done = engine.docker("run", "--rm", "--security-opt", f"seccomp={profile}", "base:1", "mkdir", "/x", check=False)
    assert "Function not implemented" in done.stderr


def test_masked_and_read_only_paths(engine: Daemon) -> None:
    text = out(engine, "base:1", "sh", "-c", "cat /proc/kcore | wc -c; echo x > /proc/sys/kernel/hostname; "
               "echo b > /proc/sysrq-trigger; ls /sys/firmware | wc -l", check=False)
    assert text.split() == ["0", "0"]


def test_read_only_root_with_tmpfs(engine: Daemon) -> None:
    done = engine.docker("run", "--rm", "--read-only", "--tmpfs", "/scratch:size=1m,mode=1700", "base:1", "sh", "-c",
                         "touch /x; touch /scratch/x && stat -c %a /scratch; dd if=/dev/zero of=/scratch/y bs=1M count=2", check=False)
    assert "Read-only file system" in done.stderr
    assert "No space left on device" in done.stderr
    assert done.stdout == "1700\n"


def test_bind_mounts(engine: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bind")
    (folder / "file").write_text("from the host\n")
    assert out(engine, "-v", f"{folder}:/mnt:ro", "base:1", "cat", "/mnt/file") == "from the host\n"
    done = engine.docker("run", "--rm", "-v", f"{folder}:/mnt:ro", "base:1", "touch", "/mnt/new", check=False)
    assert "Read-only file system" in done.stderr
    out(engine, "--mount", f"type=bind,src={folder},dst=/deep/er", "base:1", "sh", "-c", "echo in > /deep/er/new")
    assert (folder / "new").read_text() == "in\n"
    assert out(engine, "-v", f"{folder}/file:/etc/motd", "base:1", "cat", "/etc/motd") == "from the host\n"
    assert out(engine, "-v", f"{folder}/made:/m", "base:1", "ls", "/m") == ""
    assert (folder / "made").is_dir()


def test_mounts_inside_do_not_reach_the_host(engine: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bind")
    (folder / "sub").mkdir()
    out(engine, "--privileged", "-v", f"{folder}:/mnt", "base:1", "mount", "-t", "tmpfs", "none", "/mnt/sub")
    with open("/proc/self/mountinfo") as file:
        assert str(folder) not in file.read()


def test_volumes_take_the_images_content_once(engine: Daemon) -> None:
    try:
        assert out(engine, "-v", "named:/data", "base:1", "sh", "-c", "cat /data/seed; stat -c '%u %a' /data/seed; "
                   "echo more > /data/more") == "seed\n1000 640\n"
        assert out(engine, "-v", "named:/data", "base:1", "ls", "/data").split() == ["more", "seed"]
        assert out(engine, "-v", "named:/other:ro", "base:1", "cat", "/other/more") == "more\n"
        engine.docker("create", "--name", "user", "-v", "named:/data", "base:1")
        done = engine.docker("volume", "rm", "named", check=False)
        assert "volume is in use" in done.stderr
        engine.docker("rm", "user")
    finally:
        engine.docker("volume", "rm", "-f", "named", check=False)
    assert engine.docker("volume", "ls", "-q").stdout == ""


def test_anonymous_volumes_go_with_rm(engine: Daemon) -> None:
    engine.import_base("vol:1", "VOLUME /data")
    try:
        assert out(engine, "vol:1", "cat", "/data/seed") == "seed\n"
        eventually(lambda: engine.docker("volume", "ls", "-q").stdout == "", "the anonymous volume is gone")
        engine.docker("run", "--name", "keeper", "vol:1", "true")
        assert len(engine.docker("volume", "ls", "-q").stdout.split()) == 1
        engine.docker("rm", "-v", "keeper")
        assert engine.docker("volume", "ls", "-q").stdout == ""
    finally:
        engine.docker("rmi", "-f", "vol:1")


def test_devices_ulimits_init_and_cgroup_device_rules(engine: Daemon) -> None:
    assert out(engine, "--device", "/dev/null:/dev/other:r", "base:1", "stat", "-c", "%F %t:%T", "/dev/other").strip() == \
        "character special file 1:3"
    done = engine.docker("run", "--rm", "base:1", "sh", "-c", "busybox mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg", check=False)
    assert "Operation not permitted" in done.stderr
    assert out(engine, "--ulimit", "nofile=100:200", "base:1", "sh", "-c", "ulimit -n; ulimit -Hn").split() == ["100", "200"]
    twice = [{"Name": "nofile", "Soft": soft, "Hard": 90} for soft in (70, 80)]
    made = engine.api("POST", "/containers/create?name=twice", {"Image": "base:1", "Cmd": ["sh", "-c", "ulimit -n"],
                                                                "HostConfig": {"Ulimits": twice}})
    assert made[0] == 201, made
    assert engine.docker("start", "-a", "twice").stdout == "80\n"  # the last holds
    engine.docker("rm", "twice")
    assert "docker-init" in out(engine, "--init", "base:1", "ps")


def test_namespaces_of_the_host_and_of_another(engine: Daemon) -> None:
    assert out(engine, "--network", "host", "base:1", "ls", "/sys/class/net").split() == sorted(os.listdir("/sys/class/net"))
    assert out(engine, "--uts", "host", "base:1", "hostname").strip() == os.uname().nodename
    assert int(out(engine, "--pid", "host", "base:1", "sh", "-c", "echo $$")) > 1
    assert out(engine, "--network", "none", "base:1", "ls", "/sys/class/net").split() == ["lo"]
    engine.docker("run", "-d", "--name", "owner", "--network", "none", "base:1", "nc", "-l", "-p", "7000", "-e", "echo", "hi")
    try:
        eventually(lambda: ":1B58" in out(engine, "--network", "container:owner", "base:1", "cat", "/proc/net/tcp6",
                                          "/proc/net/tcp"), "the listener is seen")
        assert out(engine, "--network", "container:owner", "base:1", "nc", "127.0.0.1", "7000") == "hi\n"
    finally:
        engine.docker("rm", "-f", "owner")


def test_detached_with_cidfile_and_wait(engine: Daemon) -> None:
    identity = engine.docker("run", "-d", "base:1", "sh", "-c", "exit 4").stdout.strip()
    assert engine.docker("wait", identity).stdout == "4\n"
    engine.docker("rm", identity)


def test_a_hundred_megabytes_arrive_whole(engine: Daemon) -> None:
    write = "yes 0123456789abcde | head -c 104857600"
    done = subprocess.run(["bash", "-c", f"{DOCKER} run --rm base:1 sh -c '{write}' | md5sum"],
                          capture_output=True, text=True, env=engine.env, timeout=120, check=True)
    here = subprocess.run(["bash", "-c", f"{write} | md5sum"], capture_output=True, text=True, check=True)
    assert done.stdout == here.stdout


def test_log_rotation_options(engine: Daemon) -> None:
    engine.docker("run", "--name", "rot", "--log-opt", "max-size=20k", "--log-opt", "max-file=3", "base:1", "sh", "-c",
                  "seq 1 2000")
    try:
        path = engine.inspect("rot")["LogPath"]
        files = sorted(name for name in os.listdir(os.path.dirname(path)) if "json.log" in name)
        assert len(files) == 3
        assert engine.docker("logs", "--tail", "2", "rot").stdout == "1999\n2000\n"
    finally:
        engine.docker("rm", "rot")


def test_rootfs_of_the_machine(engine: Daemon) -> None:
    marker = "/etc/dolium-test-marker"
    done = engine.dolium("run", "--rm", "--rootfs", "/:O", "sh", "-c",
                         f"echo $$; touch {marker} && ls {marker}; ls -A {engine.folder}/data {engine.folder}/run")
    lines = done.stdout.splitlines()
    assert lines[0] == "1"
    assert lines[1] == marker
    assert not os.path.exists(marker)
    assert [line for line in lines[2:] if line and not line.endswith(":")] == []
    done = engine.dolium("run", "--rm", "--rootfs", "/", "true", check=False)
    assert done.returncode == 125
    assert "PATH:O" in done.stderr
