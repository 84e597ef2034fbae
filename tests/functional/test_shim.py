"""dolium-shim through its client, with plans made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_bench import (
    DEADLINE,
    MEMORY,
    Bench,
    Client,
    Run,
    attach,
    container,
    joined,
    log_lines,
    needs_root,
    rootfs,
    run,
    status,
    streams,
    until,
)

import dolium
from dolium.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from dolium.isolation.shim import Closed, Detached, Shim, Spawner, is_alive, list_shims, read_exit, read_state
from dolium.runtime import plan as p
from dolium.runtime.wire import decode_fields, encode_fields, frame

__all__ = ["rootfs", "run"]
pytestmark = needs_root


def test_output_exit_code_and_record(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", mux=True, exit_frame=True)
        launched = await shim.launch("init", it.sh("echo out; echo err >&2; exit 7"))
        assert launched.pid > 0 and launched.start_time > 0 and all(us > 0 for us in launched.microseconds[:2])
        record = await it.exited("init")
        assert (record.exit_code, record.signal, record.oom, record.pid) == (7, 0, False, launched.pid)
        assert record.started_at_ns <= record.exited_at_ns
        assert streams(await client.rest()) == {1: b"out\n", 2: b"err\n", 4: b"7"}
        assert read_exit(str(it.base / "s1"), "init") == record
        assert (await status(shim))["init"].state == "exited"
        await shim.forget("init")
        await shim.forget("init")
        assert read_exit(str(it.base / "s1"), "init") is None and await status(shim) == {}
        await shim.end()
        await it.event(lambda event: isinstance(event, Closed))
        assert os.listdir(it.base / "s1") == []

    run(body)


def test_raw_attach_and_stream_choice(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        out = await attach(shim, "init", stderr=False)
        err = await attach(shim, "init", stdout=False)
        await shim.launch("init", it.sh("echo out; echo err >&2"))
        assert await out.rest() == b"out\n"
        assert await err.rest() == b"err\n"

    run(body)


def test_signal_death_and_many_processes(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "a")
        await shim.launch("a", it.sh("trap 'echo got; exit 3' USR1; echo ready; while :; do read x; done", pidns=True),
                          stdin=True)
        await shim.launch("b", container(it.rootfs, ["sleep", "1000"], pidns=False).encode())
        await client.until(b"ready\n")
        await shim.signal("a", signal.SIGUSR1)
        await shim.signal("b", signal.SIGTERM)
        b = await it.exited("b")
        assert (b.exit_code, b.signal) == (128 + signal.SIGTERM, signal.SIGTERM)
        assert (await it.exited("a")).exit_code == 3
        with pytest.raises(FailedPrecondition):
            await shim.signal("a", 9)
        with pytest.raises(NotFound):
            await shim.signal("nobody", 9)

    run(body)


def test_program_starts_with_clean_signals_and_fds(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init")
        await attach(shim, "init")
        await shim.launch("init", it.sh("grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd | wc -l"))
        lines = (await client.rest()).split()
        assert lines == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16, b"4"]  # the fourth fd is ls's own

    run(body)


def test_half_close(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True, mux=True)
        await client.send(b"hi\n")
        client.half_close()
        await shim.launch("init", it.sh("cat; echo done"), stdin=True, stdin_once=1)
        assert streams(await client.rest()) == {1: b"hi\ndone\n"}
        assert (await it.exited("init")).exit_code == 0

    run(body)


def test_stdin_stays_open_without_once_and_no_stdin_is_empty(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        first = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("cat"), stdin=True)
        await first.send(b"one\n")
        await first.until(b"one\n")
        first.half_close()
        second = await attach(shim, "init", stdin=True)
        await second.send(b"two\n")
        await second.until(b"two\n")
        await first.until(b"two\n")
        await shim.signal("init", 9)
        assert (await it.exited("init")).signal == 9
        await shim.launch("none", it.sh("cat; exit 5"))
        assert (await it.exited("none")).exit_code == 5

    run(body)


def test_last_client_closes_stdin(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        one = await attach(shim, "init", stdin=True)
        two = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("cat; exit 4"), stdin=True, stdin_once=2)
        one.half_close()
        await two.send(b"still\n")
        await one.until(b"still\n")
        two.sock.close()
        assert (await it.exited("init")).exit_code == 4
        assert await one.rest() == b"still\n"

    run(body)


def test_large_input_is_not_lost_and_holds_up_nobody(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True)
        gate = await attach(shim, "other", stdin=True)
        data = os.urandom(1 << 20) * 4
        await shim.launch("init", it.sh("mkfifo /tmp/gate; read go < /tmp/gate; sha256sum"), stdin=True, stdin_once=1)
        await shim.launch("other", it.sh("until [ -p /tmp/gate ]; do :; done; cat > /tmp/gate"), stdin=True,
                          stdin_once=1)
        sending = asyncio.create_task(client.send(data))
        assert "init" in await status(shim)  # the shim answers while the pipe is full
        await gate.send(b"go\n")
        gate.half_close()
        await sending
        client.half_close()
        assert (await client.rest()).split()[0] == hashlib.sha256(data).hexdigest().encode()

    run(body)


def test_input_after_the_reader_closed_is_dropped(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("exec 0<&-; echo closed; while [ ! -e /proc/1/nothing ]; do sleep 1000; done"),
                          stdin=True)
        await client.until(b"closed\n")
        await client.send(b"x" * (1 << 20))
        assert (await status(shim))["init"].state == "running"
        await shim.signal("init", 9)
        assert (await it.exited("init")).signal == 9
        assert await client.rest() == b"closed\n"

    run(body)


def test_terminal_echo_resize_and_detach(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        keys = b"\x10\x11"  # ctrl-p ctrl-q
        client = await attach(shim, "init", stdin=True, detach_keys=keys)
        script = "stty size; read a; echo \"<$a>\"; stty size; read b; printf '%s' \"$b\" | od -An -tx1; read c; exit 9"
        await shim.launch("init", it.sh(script, tty=True), tty=True, stdin=True)
        await client.until(b"24 80\r\n")
        await client.send(b"hello\n")
        await client.until(b"hello\r\n<hello>\r\n24 80\r\n")
        await shim.resize("init", 50, 132)
        await client.send(b"a\x10\x10b\n")  # a broken sequence is passed on
        await client.until(b" 61 10 10 62\r\n")
        other = await attach(shim, "init", stdin=True)
        await client.send(b"\x10")
        await client.send(b"\x11never")
        await client.rest()
        detached = await it.event(lambda event: isinstance(event, Detached))
        assert detached == Detached("init", client.number)
        other.half_close()  # ignored by a terminal
        last = await attach(shim, "init", stdin=True)
        await last.send(b"\n")
        assert (await it.exited("init")).exit_code == 9
        assert b"never" not in await last.rest()

    run(body)


def test_resized_terminal_reports_its_size(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("echo up; read a; stty size", tty=True), tty=True, stdin=True)
        await client.until(b"up")
        await shim.resize("init", 50, 132)
        await client.send(b"\n")
        assert b"50 132" in await client.rest()
        await shim.launch("pipes", it.sh("cat"), stdin=True)
        with pytest.raises(FailedPrecondition):
            await shim.resize("pipes", 1, 1)

    run(body)


def test_stalled_client_loses_nothing_and_holds_up_nobody(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        stalled = await attach(shim, "init", mux=True, exit_frame=True)
        eager = await attach(shim, "init", mux=True, exit_frame=True)
        script = "i=0; while [ $i -lt 100 ]; do head -c 1048576 /dev/zero | tr '\\0' $((i % 10)); i=$((i + 1)); done"
        await shim.launch("init", it.sh(script))
        expected = hashlib.sha256(b"".join(str(i % 10).encode() * (1 << 20) for i in range(100))).digest()

        async def digest(client: Client) -> tuple[bytes, bytes]:
            total, rest, code = hashlib.sha256(), bytearray(), b""
            while data := await client.read():
                client.seen = b""
                rest += data
                while len(rest) >= 8 and len(rest) >= 8 + (size := int.from_bytes(rest[4:8], "big")):
                    if rest[0] == 1:
                        total.update(rest[8 : 8 + size])
                    else:
                        code += rest[8 : 8 + size]
                    del rest[: 8 + size]
            return total.digest(), code

        assert await digest(eager) == (expected, b"0")
        assert (await it.exited("init")).exit_code == 0
        await shim.forget("init")
        await shim.end()  # it lingers for the one who has not read
        assert await digest(stalled) == (expected, b"0")

    run(body)


def test_client_that_goes_away(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        gone = await attach(shim, "init", stdin=True)
        stays = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("read a; echo $a; read a; head -c 1000000 /dev/zero; read a"), stdin=True)
        await gone.send(b"first\n")
        gone.sock.close()
        await stays.until(b"first\n")
        await stays.send(b"\n")
        await stays.until(b"first\n" + bytes(1000000))
        await stays.send(b"\n")
        assert (await it.exited("init")).exit_code == 0

    run(body)


def test_exec_joins_the_container(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init")
        init = await shim.launch("init", it.sh("hostname inside; echo up; exec sleep 1000"))
        await client.until(b"up\n")
        out = await attach(shim, "exec-1", stdin=True)
        plan = joined(init.pid, ["sh", "-c", "hostname; tr '\\0' ' ' < /proc/1/cmdline; cat; exit 11"]).encode()
        await shim.launch("exec-1", plan, stdin=True, stdin_once=1)
        await out.send(b"typed")
        out.half_close()
        assert await out.rest() == b"inside\nsleep 1000 typed"
        assert (await it.exited("exec-1")).exit_code == 11
        assert (await status(shim))["init"].state == "running"
        await shim.signal("init", 9)
        assert (await it.exited("init")).signal == 9

    run(body)


def test_exec_with_a_terminal(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        init = await shim.launch("init", it.sh("exec sleep 1000"))
        client = await attach(shim, "exec", stdin=True)
        plan = joined(init.pid, ["sh", "-c", "tty; echo up; read a; stty size; exit 12"], tty=True)
        await shim.launch("exec", plan.encode(), tty=True, stdin=True)
        await client.until(b"/dev/pts/0\r\nup\r\n")
        await shim.resize("exec", 40, 100)
        await client.send(b"\n")
        assert (await it.exited("exec")).exit_code == 12
        assert (await client.rest()).endswith(b"40 100\r\n")
        await shim.signal("init", 9)
        await it.exited("init")

    run(body)


def test_tcp_client_with_unread_input_gets_all_output(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        with far:
            client = Client(near, await shim.attach("init", far.fileno(), stdin=True))
        await client.send(b"x" * 100000)
        await shim.launch("init", it.sh("head -c 500000 /dev/zero"), stdin=True, stdin_once=1)
        assert (await it.exited("init")).exit_code == 0
        await client.send(b"y" * 100000)
        assert await client.rest() == bytes(500000)
        client = await attach(shim, "half", stdin=True)
        await shim.launch("half", it.sh("cat"), stdin=True, stdin_once=1)
        await client.send(b"to the end")
        client.half_close()
        assert await client.rest() == b"to the end"

    run(body)


def test_exit_does_not_wait_for_grandchildren(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init")
        await shim.launch("init", it.sh("echo up; exec sleep 1000"))
        init = (await status(shim))["init"].record
        plan = joined(init.pid, ["sh", "-c", "sleep 1000 & echo parent; exit 6"]).encode()
        out = await attach(shim, "exec")
        await shim.launch("exec", plan)
        assert (await it.exited("exec")).exit_code == 6
        assert await out.rest() == b"parent\n"
        await shim.signal("init", 9)
        await client.rest()

    run(body)


def test_failed_launch_leaves_nothing(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True)
        with pytest.raises(NotFound) as caught:
            await shim.launch("init", container(it.rootfs, ["no-such-program"]).encode())
        assert "executable file not found" in str(caught.value)
        assert await client.rest() == b""
        assert await status(shim) == {}
        failing = container(it.rootfs, ["true"])
        failing.add(p.PARENT_STARTED, "open_path", "open what is not there", 9, "/nonexistent", 0)
        with pytest.raises(NotFound):
            await shim.launch("init", failing.encode())
        for bad in (b"", b"DOLM", container(it.rootfs, ["true"], tty=True).encode()):
            with pytest.raises(InvalidArgument):
                await shim.launch("init", bad)
        await shim.launch("init", it.sh("exit 0"))
        await it.exited("init")
        with pytest.raises(AlreadyExists):
            await shim.launch("init", it.sh("exit 0"))
        for name in ("", "../x", ".x", "a/b", "a" * 200):
            with pytest.raises(InvalidArgument):
                await shim.launch(name, it.sh("exit 0"))

    run(body)


def test_after_exit_operations(run: Run, tmp_path: Path) -> None:
    marker, hook = tmp_path / "marker", tmp_path / "hook"
    marker.write_text("")

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        after = p.Plan()
        after.add(p.AFTER_EXIT, "unlink", "remove the marker", str(marker))
        after.add(p.AFTER_EXIT, "hook", "poststop hook", "/bin/sh", ["sh", "-c", f"cat > {hook}"], [], 5000,
                  f'{{"pid":{p.PID}}}')
        after.add(p.AFTER_EXIT, "write_file", "write nowhere", "/nonexistent/x", "", 0o600, 0)
        launched = await shim.launch("init", container(it.rootfs, ["true"]).encode(), after_exit=after.encode())
        record = await it.exited("init")
        assert record.exit_code == 0 and "write nowhere" in (record.after_exit_error or "")
        assert not marker.exists() and hook.read_text() == f'{{"pid":{launched.pid}}}'

    run(body)


def test_passed_fds_fill_slots(run: Run, tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        plan = container(it.rootfs, ["sh", "-c", "echo through; echo err >&2"])
        stdio = plan.named("stdio")[0]
        stdio.args = (p.SLOT_STDIN, 20, p.SLOT_STDERR)
        client = await attach(shim, "init")
        with open(tmp_path / "file", "wb") as file:
            await shim.launch("init", plan.encode(), fds={20: file.fileno()})
        await it.exited("init")
        assert (tmp_path / "file").read_bytes() == b"through\n" and await client.rest() == b"err\n"
        with open(tmp_path / "file", "rb") as file, pytest.raises(InvalidArgument):
            await shim.launch("bad", plan.encode(), fds={p.SLOT_STDIN: file.fileno()})

    run(body)


def test_spawner_and_client_die_and_nothing_is_lost(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "c.log"

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("while read a; do echo \"$a\"; done; exit 21"), stdin=True, stdin_once=1,
                          log=str(log))
        await client.send(b"before\n")
        await client.until(b"before\n")
        os.kill(it.spawner.pid, signal.SIGKILL)
        await it.spawner.close()
        shim.close()
        with pytest.raises(Unavailable):
            await it.spawner.spawn("no", str(tmp_path))
        await client.send(b"between\n")  # an attach outlives the daemon
        await client.until(b"between\n")
        (handle,) = list_shims(str(it.base))
        assert is_alive(handle) and handle.id == "s1"
        again = await it.connect()
        assert again.processes["init"].state == "running"
        client.half_close()
        assert (await it.exited("init")).exit_code == 21
        again.close()
        third = await it.connect()
        assert third.processes["init"].record.exit_code == 21
        assert await client.rest() == b"before\nbetween\n"

    run(body)
    assert [line["log"] for line in log_lines(log)] == ["before\n", "between\n"]


DAEMON = """
import asyncio, os, signal, socket, sys
from dolium.isolation.shim import Shim, Spawner

async def main(base, plan, client):
    spawner = Spawner(os.environ.get("DOLIUM_SHIM"))
    await spawner.start()
    await spawner.spawn("s1", base)
    shim = await Shim.connect(base, print)
    await shim.attach("init", client, stdin=True)
    await shim.launch("init", open(plan, "rb").read(), stdin=True, stdin_once=1)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def test_daemon_killed_right_after_launch(run: Run, tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        folder = tmp_path / "s1"
        folder.mkdir()
        (tmp_path / "plan").write_bytes(it.sh("cat; exit 17"))
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-c", DAEMON, str(folder), str(tmp_path / "plan"), str(fd)]
            env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(dolium.__file__))}
            daemon = await asyncio.create_subprocess_exec(*command, pass_fds=[fd], env=env, start_new_session=True)
        assert await daemon.wait() == -signal.SIGKILL
        it.handles.append(read_state(str(folder)))
        client = Client(ours, 0)
        await client.send(b"still there\n")
        await client.until(b"still there\n")
        shim = await it.connect()
        assert shim.processes["init"].state == "running"
        client.half_close()
        assert (await it.exited("init")).exit_code == 17
        assert await client.rest() == b"still there\n"

    run(body)


def test_daemon_that_does_not_read_is_cut_off(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        await shim.launch("init", it.sh("cat"), stdin=True, stdin_once=1)
        hello = {"request": 1, "type": "hello", "version": 1, "nonce": shim.handle.nonce}
        flood = frame(encode_fields(hello)) * 1000
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, str(it.base / "s1/shim.sock"))
            async with asyncio.timeout(DEADLINE):
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    while True:
                        await loop.sock_sendall(deaf, flood)
        again = await it.connect()
        assert (await status(again))["init"].state == "running"
        await again.signal("init", 9)
        assert (await it.exited("init")).signal == 9

    run(body)


def test_exit_record_waits_for_room_on_the_disk(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "s1"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True)
        await shim.launch("init", it.sh("cat; exit 31"), stdin=True, stdin_once=1)
        await shim.launch("noise", container(it.rootfs, ["yes"]).encode())  # the shim is never without something to do
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        client.half_close()
        record = await it.exited("init")
        assert record.exit_code == 31 and read_exit(str(folder), "init") is None
        (folder / "filler").unlink()
        await until(lambda: read_exit(str(folder), "init") == record)
        await shim.signal("noise", signal.SIGKILL)
        await it.exited("noise")
        await shim.end()
        await it.event(lambda event: isinstance(event, Closed))

    try:
        run(body)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_orphans_are_reaped(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        script = (
            "mkfifo /tmp/orphan /tmp/up; sh -c 'echo $$ > /tmp/up; read x < /tmp/orphan' & "
            "read pid < /tmp/up; echo $pid; exit 0"
        )
        client = await attach(shim, "init")
        await shim.launch("init", it.sh(script, pidns=False))
        assert (await it.exited("init")).exit_code == 0
        orphan = int((await client.rest()).split()[0])
        children = Path(f"/proc/{shim.handle.pid}/task/{shim.handle.pid}/children")
        await until(lambda: children.read_text().split() == [str(orphan)])
        (it.rootfs / "tmp/orphan").write_text("go\n")
        await until(lambda: children.read_text() == "")
        many = "read x < /tmp/orphan; i=0; while [ $i -lt 100 ]; do (true &); i=$((i + 1)); done; exec sleep 1000"
        await shim.launch("many", it.sh(many, pidns=False))
        os.kill(shim.handle.pid, signal.SIGSTOP)  # their deaths become one signal
        (it.rootfs / "tmp/orphan").write_text("go\n")
        await until(lambda: len(children.read_text().split()) == 101)
        os.kill(shim.handle.pid, signal.SIGCONT)
        await until(lambda: len(children.read_text().split()) == 1)
        await shim.signal("many", signal.SIGKILL)
        await it.exited("many")

    run(body)


def test_a_grandchild_that_writes_on_does_not_hold_up_an_exit(run: Run, tmp_path: Path) -> None:
    """The largest pipe, a byte in each of its places, and someone who fills it again as fast as it is read."""
    script = """if True:
        import fcntl, os, struct, sys, termios
        fcntl.fcntl(1, 1031, 1 << 20)  # F_SETPIPE_SZ
        fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)  # each write is one read
        open(sys.argv[1]).read()
        if not os.fork():
            while True:
                os.write(1, b"\\n")
        while struct.unpack("i", fcntl.ioctl(1, termios.FIONREAD, bytes(4)))[0] < 200:
            pass
        os._exit(5)
    """
    go = tmp_path / "go"
    os.mkfifo(go)

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        out = await attach(shim, "init", stderr=False)
        plan = container(Path("/"), [sys.executable, "-I", "-S", "-c", script, str(go)], pidns=False)
        await shim.launch("init", plan.encode(), log=str(tmp_path / "log"))  # which takes longer than writing a byte
        pid = (await status(shim))["init"].record.pid
        os.kill(shim.handle.pid, signal.SIGSTOP)
        go.write_text("")
        await until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z")
        os.kill(shim.handle.pid, signal.SIGCONT)
        assert (await it.exited("init")).exit_code == 5
        assert 200 <= len(await out.rest()) <= 300  # 256 places

    run(body)


def test_complaints_do_not_fill_the_host(run: Run, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)], check=True)
    (small / "filler").write_bytes(bytes(4096))

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        complaints = it.base / "s1" / "shim.log"
        for number, before in enumerate((100, 300 << 10)):
            complaints.write_bytes(b"." * before)
            await shim.launch(f"p{number}", it.sh("echo lost"), log=f"{small}/{number}.log")
            assert (await it.exited(f"p{number}")).exit_code == 0
            assert (complaints.stat().st_size > before) is (number == 0)
        complaints.unlink()

    try:
        run(body)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_newer_connection_replaces_the_older(run: Run) -> None:
    async def body(it: Bench) -> None:
        old = await it.spawn()
        new = await it.connect()
        await it.event(lambda event: isinstance(event, Closed))
        assert not old.connected and new.connected
        with pytest.raises(Unavailable):
            await status(old)
        assert await status(new) == {}

    run(body)


def test_dead_shim_and_exit_record_of_a_dead_shim(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        await shim.launch("done", it.sh("exit 13"))
        await it.exited("done")
        os.kill(shim.handle.pid, signal.SIGKILL)
        await it.event(lambda event: isinstance(event, Closed))
        folder = str(it.base / "s1")
        with pytest.raises(Unavailable):
            await Shim.connect(folder, it.events.put_nowait)
        record = read_exit(folder, "done")
        assert record is not None and record.exit_code == 13
        assert read_exit(folder, "other") is None
        with pytest.raises(NotFound):
            read_state(str(it.base))

    run(body)


def test_wrong_hello_and_malformed_frames(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        await shim.launch("init", it.sh("exec sleep 1000"))
        loop = asyncio.get_running_loop()
        path = str(it.base / "s1/shim.sock")

        async def raw() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            await loop.sock_connect(sock, path)
            return sock

        async def ended(sock: socket.socket) -> bytes:
            async with asyncio.timeout(DEADLINE):
                try:
                    return await loop.sock_recv(sock, 65536)
                except ConnectionResetError:
                    return b""

        def hello(**fields: str | int) -> bytes:
            return frame(encode_fields({"request": 1, "type": "hello", "version": 1, "nonce": "x", **fields}))

        bad = [
            b"\xff\xff\xff\xff", frame(b"\x01"), frame(b"\xff\xff\xff\x7fabc"),
            frame(encode_fields({"type": "hello"})[:-2] + b"xx"),
        ]
        for data in bad:
            with await raw() as sock:
                await loop.sock_sendall(sock, data)
                assert await ended(sock) == b""
        half = await raw()
        await loop.sock_sendall(half, hello()[:9])  # holds up nobody
        for data, number in ((hello(), 13), (hello(version=9), 71), (hello(type="end"), 1)):
            with await raw() as sock:
                await loop.sock_sendall(sock, data)
                assert decode_fields((await ended(sock))[4:])["errno"] == [str(number).encode()]
        with await raw() as sock:  # empty frame: no type
            await loop.sock_sendall(sock, frame(b""))
            assert b"errno" in await ended(sock)
        crowd = [await raw() for _ in range(12)]
        assert (await status(shim))["init"].state == "running"
        for sock in [half, *crowd]:
            sock.close()
        with pytest.raises(Unimplemented):
            await shim._request("dance", {})
        with pytest.raises(InvalidArgument):
            await shim._request("attach", {"id": "init"})
        with open("/dev/null", "rb") as null, pytest.raises(InvalidArgument):
            await shim.attach("init", null.fileno())
        with pytest.raises(FailedPrecondition):
            await shim.end()
        with pytest.raises(FailedPrecondition):
            await shim.forget("init")
        await shim.signal("init", 9)
        await it.exited("init")

    run(body)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_requests_never_end_a_shim(run: Run, seed: int) -> None:
    source = random.Random(seed)

    def mutated(body: bytes) -> bytes:
        data = bytearray(body)
        for _ in range(source.choice((0, 1, 1, 2, 8))):
            at = source.randrange(len(data))
            data[at : at + source.choice((0, 1, 1, 4))] = source.randbytes(source.choice((0, 1, 1, 4)))
        return bytes(data)

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client, kept = socket.socketpair()
        await shim.attach("known", kept.fileno())  # a shim that knows no process ends with its daemon
        kept.close()
        loop = asyncio.get_running_loop()
        hello = frame(encode_fields({"request": 1, "type": "hello", "version": 1, "nonce": shim.handle.nonce}))
        # The plan itself stays whole: a mutated one would be run, as root, on this machine.
        plan = encode_fields({"plan": it.sh("exit 0")})
        requests: list[dict[str, str | bytes | int | list[str]]] = [
            {"type": "launch", "id": "a", "stdin": 1, "fd_slots": ["20"], "oom_files": ["/x"]},
            {"type": "launch", "id": "b", "tty": 1, "log": "/nonexistent/x"},
            {"type": "attach", "id": "a", "stdin": 1, "stdout": 1, "mux": 1, "detach_keys": b"\x10\x11"},
            {"type": "resize", "id": "a", "rows": 1, "columns": -1}, {"type": "signal", "id": "a", "signal": 15},
            {"type": "forget", "id": "a"},
        ]
        for _ in range(60):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, socket.socket() as spare:
                sock.setblocking(False)
                await loop.sock_connect(sock, str(it.base / "s1/shim.sock"))
                await loop.sock_sendall(sock, hello)
                for _ in range(5):
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
                        data = mutated(encode_fields({"request": 2, **source.choice(requests)})) + plan
                        socket.send_fds(sock, [frame(data)], [spare.fileno()] * source.choice((0, 0, 1, 1, 3)))
                sock.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(DEADLINE):
                    with contextlib.suppress(ConnectionResetError):
                        while await loop.sock_recv(sock, 65536):
                            pass
        again = await it.connect()
        for name, info in (await status(again)).items():
            if info.state in ("running", "exiting"):
                await it.exited(name)
        await again.end()
        client.close()

    run(body)


def test_a_shim_without_a_process_ends_with_its_daemon(run: Run) -> None:
    async def body(it: Bench) -> None:
        first = await it.spawn()
        again = await it.connect()  # another daemon takes over: the shim lives
        await until(lambda: not first.connected)
        assert is_alive(again.handle)
        again.close()
        await until(lambda: not is_alive(again.handle))
        assert os.listdir(again.handle.dir) == []

    run(body)


@pytest.fixture
def memory_cgroup() -> Iterator[str]:
    v1 = (MEMORY / "memory.limit_in_bytes").exists()
    controllers = MEMORY.parent / "cgroup.controllers"
    if not v1 and not (controllers.exists() and "memory" in controllers.read_text()):
        pytest.skip("needs the memory controller")
    group = (MEMORY if v1 else MEMORY.parent) / f"dolium-test-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(8 << 20))
    yield str(group)
    group.rmdir()


def test_oom_kill_is_recorded(run: Run, memory_cgroup: str) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        files = [f"{memory_cgroup}/memory.oom_control", f"{memory_cgroup}/memory.events"]
        await shim.launch("eats", it.sh("exec tail -c 100000000 /dev/zero", cgroup=memory_cgroup), oom_files=files)
        record = await it.exited("eats")
        assert (record.oom, record.signal) == (True, signal.SIGKILL)
        await shim.launch("fits", it.sh("exit 0", cgroup=memory_cgroup), oom_files=files)
        assert not (await it.exited("fits")).oom

    run(body)


def test_init_forwards_reaps_and_returns(run: Run) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()

        async def run_init(id: str, *argv: str) -> tuple[int, bytes]:
            client = await attach(shim, id)
            await shim.launch(id, container(it.rootfs, ["dolium-init", *argv]).encode())
            return (await it.exited(id)).exit_code, await client.rest()

        assert await run_init("a", "--", "sh", "-c", "exit 5") == (5, b"")
        assert await run_init("b", "sh", "-c", "kill -9 $$") == (137, b"")
        code, text = await run_init("c", "nope")
        assert code == 127 and b"dolium-init: exec nope: No such file or directory" in text
        code, text = await run_init("d", "/tmp")
        assert code == 126 and b"Permission denied" in text
        client = await attach(shim, "e")
        script = "trap 'echo term; exit 8' TERM; (sleep 0 &) ; echo up; while :; do sleep 1000 & wait $!; done"
        await shim.launch("e", container(it.rootfs, ["dolium-init", "sh", "-c", script]).encode())
        await client.until(b"up\n")
        await shim.signal("e", signal.SIGTERM)
        assert (await it.exited("e")).exit_code == 8
        tty = await attach(shim, "f", stdin=True)
        plan = container(it.rootfs, ["dolium-init", "sh", "-c", "echo up; sleep 1000"], tty=True)
        await shim.launch("f", plan.encode(), tty=True, stdin=True)
        await tty.until(b"up\r\n")
        await tty.send(b"\x03")  # ctrl-c reaches the foreground group
        assert (await it.exited("f")).exit_code == 130

    run(body)


def test_spawner_leaves_session_and_cgroup(tmp_path: Path, rootfs: Path) -> None:
    pids_v1 = Path("/sys/fs/cgroup/pids")
    parent = pids_v1 if pids_v1.exists() else Path("/sys/fs/cgroup")
    group = parent / f"dolium-test-{os.getpid()}"
    group.mkdir()

    async def main() -> None:
        it = Bench(tmp_path, rootfs)
        await it.spawner.start([str(group / "cgroup.procs")])
        try:
            shim = await it.spawn()
            pids = [it.spawner.pid, shim.handle.pid]
            assert sorted(map(int, (group / "cgroup.procs").read_text().split())) == sorted(pids)
            assert [os.getsid(pid) for pid in pids] == pids
            assert os.readlink(f"/proc/{pids[1]}/cwd") == str(it.base / "s1")
            links = [os.readlink(f"/proc/{pids[1]}/fd/{fd}") for fd in (0, 1, 2)]
            assert links == ["/dev/null"] * 3
            await shim.end()
            await it.event(lambda event: isinstance(event, Closed))
            with pytest.raises(NotFound):
                await it.spawner.spawn("x", str(tmp_path / "absent"))
        finally:
            await it.spawner.close()
        with pytest.raises(NotFound):
            await Spawner(os.environ.get("DOLIUM_SHIM")).start(["/nonexistent/cgroup.procs"])
        with pytest.raises(NotFound):
            await Spawner("/nonexistent/dolium-shim").start()

    try:
        asyncio.run(main())
    finally:
        group.rmdir()


def test_a_clean_up_that_cannot_run_is_no_success(tmp_path: Path, rootfs: Path) -> None:
    """The shim may fork no more when its process ends; then it does, and says so; without such operations nothing is said."""
    pids_v1 = Path("/sys/fs/cgroup/pids")
    group = (pids_v1 if pids_v1.exists() else Path("/sys/fs/cgroup")) / f"dolium-test-{os.getpid()}"
    group.mkdir()
    if not (group / "pids.max").exists():
        group.rmdir()
        pytest.skip("needs the pids controller")
    marker = tmp_path / "marker"
    after = p.Plan()
    after.add(p.AFTER_EXIT, "unlink", "remove the marker", str(marker))

    async def main() -> None:
        it = Bench(tmp_path, rootfs)
        await it.spawner.start([str(group / "cgroup.procs")])
        try:
            shim = await it.spawn()
            for most, error, left in (("0", "the clean-up did not run", True), ("max", "", False)):
                marker.touch()
                await shim.launch("init", container(it.rootfs, ["sleep", "1000"]).encode(), after_exit=after.encode())
                (group / "pids.max").write_text(most)
                await shim.signal("init", signal.SIGKILL)
                record = await it.exited("init")
                (group / "pids.max").write_text("max")
                assert (record.after_exit_error, marker.exists()) == (error, left)
                await shim.forget("init")
            await shim.launch("init", container(it.rootfs, ["true"]).encode())
            assert (await it.exited("init")).after_exit_error is None
            await shim.end()
            await it.event(lambda event: isinstance(event, Closed))
        finally:
            await it.spawner.close()

    try:
        asyncio.run(main())
    finally:
        group.rmdir()


def test_idle_memory_is_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    async def body(it: Bench) -> None:
        def pss(pid: int) -> int:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:")))

        shims = [await it.spawn(f"s{i}") for i in range(10)]
        for shim in shims:
            await shim.launch("init", it.sh("echo hello; exec sleep 1000"), log=str(it.base / f"{shim.handle.id}.log"))
        busy = [pss(shim.handle.pid) for shim in shims]
        if "DOLIUM_SHIM" not in os.environ:  # a sanitizer keeps what was freed
            await until(lambda: all(pss(shim.handle.pid) < least for shim, least in zip(shims, busy, strict=True)))
        idle = [pss(shim.handle.pid) for shim in shims]
        with capsys.disabled():
            print(f"\nPSS of 10 shims with one process each, KB: right after launch {busy}, idle {idle}")
        for shim in shims:
            await shim.signal("init", 9)
            await it.exited("init")

    run(body)
