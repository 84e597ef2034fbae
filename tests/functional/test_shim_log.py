"""The shim's log file: Docker's json-file format, rotation, a full disk, bytes of any kind."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_bench import Bench, Run, attach, log_lines, needs_root, rootfs, run, status

from dolium.errors import InvalidArgument, NotFound

__all__ = ["rootfs", "run"]
pytestmark = needs_root


def test_log_format(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "c-json.log"
    long = "é" * 10000

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        script = (
            r"""printf 'plain <b>&"\\\\\t\001\n'; """
            r"""printf 'bad \377\300\257 \355\240\200 \342\200\250\342\200\251 €𝄞\n'"""
            f"; echo oops >&2; printf '{long}\\n'; printf partial"
        )
        await shim.launch("init", it.sh(script), log=str(log))
        assert (await it.exited("init")).exit_code == 0

    run(body)
    raw = log.read_bytes().splitlines()
    assert raw[0].startswith(rb'{"log":"plain \u003cb\u003e\u0026\"\\\\\t\u0001\n","stream":"stdout","time":"2')
    lines = log_lines(log)
    out = [line["log"] for line in lines if line["stream"] == "stdout"]
    assert out[1] == "bad \ufffd\ufffd\ufffd \ufffd\ufffd\ufffd \u2028\u2029 €𝄞\n"
    assert rb"\u2028\u2029" in log.read_bytes() and rb"\ufffd" in log.read_bytes()
    assert [line["log"] for line in lines if line["stream"] == "stderr"] == ["oops\n"]
    assert len(out[2].encode()) == 16384 and out[2] + out[3] == long + "\n"
    assert out[4:] == ["partial"]
    for line in lines:
        assert len(line["time"]) == 30 and line["time"].endswith("Z")


def test_log_rotation(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "c-json.log"

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        script = "i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i + 1)); done"
        await shim.launch("init", it.sh(script), log=str(log), log_max_size=20000, log_max_files=3)
        await it.exited("init")
        await shim.launch("one", it.sh(script), log=str(log) + "-one", log_max_size=20000, log_max_files=1)
        await it.exited("one")

    run(body)
    names = sorted(path.name for path in tmp_path.glob("c-json.log*"))
    assert names == ["c-json.log", "c-json.log-one", "c-json.log.1", "c-json.log.2"]
    oldest_first = ("c-json.log.2", "c-json.log.1", "c-json.log")
    kept = [line["log"] for name in oldest_first for line in log_lines(tmp_path / name)]
    assert kept == [f"line {i}\n" for i in range(1000 - len(kept), 1000)] and len(kept) > 400
    assert all((tmp_path / name).stat().st_size <= 20000 for name in names)
    assert log_lines(tmp_path / "c-json.log-one")[-1]["log"] == "line 999\n"


def test_full_disk_is_told_in_the_log(run: Run, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    log = small / "c.log"
    try:

        async def body(it: Bench) -> None:
            (small / "filler").write_bytes(bytes(56 << 10))
            shim = await it.spawn()
            client = await attach(shim, "init", stdin=True)
            script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i + 1)); done; read a; echo after; exit 2"
            await shim.launch("init", it.sh(script), log=str(log), stdin=True)
            await client.until(b"line 1999\n")
            (small / "filler").unlink()
            await client.send(b"\n")
            assert (await it.exited("init")).exit_code == 2

        run(body)
        lines = [line["log"] for line in log_lines(log)]
        assert lines[-1] == "after\n"
        told = [line for line in lines if "lines were lost here" in line]
        assert told and sum(int(line.split()[1]) for line in told) + len(lines) - len(told) == 2001
    finally:
        subprocess.run(["umount", str(small)], check=True)


def chunks(seed: int, size: int) -> Iterator[bytes]:
    """Text, characters of all lengths, cut ones, overlong ones, surrogates, noise; short and very long lines."""
    source = random.Random(seed)
    kinds = [b"plain text ", "é€𝄞\u2028".encode(), b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80", b"\xe2\x82",
             b"\xf0\x9f\x92", b"\xf4\x90\x80\x80", b"<&>\"\\\r\t\x00\x7f", b"\n"]
    while size > 0:
        chunk = source.choice(kinds) if source.random() < 0.9 else source.randbytes(40)
        chunk *= source.choice((1, 1, 1, 3, 7000))
        yield chunk
        size -= len(chunk)


def as_go_reads(data: bytes) -> str:
    """Each byte that is not part of a valid sequence is one U+FFFD; Python's own handler makes one of several."""
    out, at = [], 0
    while at < len(data):
        try:
            out.append(data[at:].decode())
            break
        except UnicodeDecodeError as error:
            out.append(data[at : at + error.start].decode())
            out.append("\ufffd" * (error.end - error.start))
            at += error.end
    return "".join(out)


@pytest.mark.parametrize("seed", range(3))
def test_log_is_complete_for_any_bytes(run: Run, tmp_path: Path, seed: int) -> None:
    log = tmp_path / "c.log"
    data = b"".join(chunks(seed, 300_000))

    async def body(it: Bench) -> None:
        shim = await it.spawn()
        client = await attach(shim, "init", stdin=True, stdout=False, stderr=False)
        await shim.launch("init", it.sh("cat"), stdin=True, stdin_once=1, log=str(log), log_max_size=0)
        await client.send(data)
        client.half_close()
        assert (await it.exited("init")).exit_code == 0

    run(body)
    lines = [line["log"] for line in log_lines(log)]
    expected = "".join(as_go_reads(line + b"\n") for line in data.split(b"\n"))[:-1]
    assert "".join(lines) == expected
    # a split comes at 16 KiB or up to three bytes before
    assert all(line.endswith("\n") or len(line) >= (16384 - 3) // 4 for line in lines[:-1])


def test_log_that_cannot_be_opened_fails_the_launch(run: Run, tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        shim = await it.spawn()
        for path, error in ((str(tmp_path / "none" / "c.log"), NotFound), ("relative", InvalidArgument)):
            with pytest.raises(error):
                await shim.launch("init", it.sh("exit 0"), log=path)
        assert await status(shim) == {}

    run(body)
