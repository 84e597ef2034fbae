"""The cold path's imports are a contract: a real request, answered by ``python -I -S -E``, brings in this list and no more."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import config

from dolium.runtime import seccomp_cache
from dolium.runtime.plan import decode
from dolium.runtime.wire import decode_fields, encode_fields, frame

SOURCE = Path(__file__).resolve().parents[2] / "src"

# What Python itself has in with -I -S -E before anything runs.
BARE = subprocess.run([sys.executable, "-I", "-S", "-E", "-c", "import sys;print(*sys.modules)"], capture_output=True, text=True,
                      check=True).stdout.split()
ALLOWED = {
    "__future__",  # the annotations; 0.1 ms
    # json, and what it needs
    "json", "json.decoder", "json.encoder", "json.scanner", "_json", "re", "re._casefix", "re._compiler", "re._constants",
    "re._parser", "enum", "types", "operator", "_operator", "functools", "_functools", "collections", "_collections",
    "itertools", "keyword", "reprlib", "copyreg", "_sre", "_collections_abc", "collections.abc", "abc", "_abc", "builtins",
    "_blake2",
    "dolium", "dolium.errors", "dolium.policy", "dolium.linux", "dolium.linux.capabilities", "dolium.linux.mounts",
    "dolium.linux.cgroup", "dolium.linux.cgroup.tree", "dolium.linux.cgroup.v1", "dolium.linux.cgroup.v2",
    "dolium.linux.cgroup.bpf_devices", "dolium.runtime", "dolium.runtime.cold", "dolium.runtime.cli", "dolium.runtime.lifecycle",
    "dolium.runtime.compile", "dolium.runtime.cgroups", "dolium.runtime.facts", "dolium.runtime.features",
    "dolium.runtime.plan", "dolium.runtime.seccomp_cache", "dolium.runtime.spec", "dolium.runtime.default_spec",
    "dolium.runtime.state", "dolium.runtime.wire",
}
NEVER = {"typing", "dataclasses", "pathlib", "argparse", "ctypes", "subprocess", "asyncio", "logging", "datetime", "hashlib",
         "os", "site", "inspect"}


def fact(query: str, bundle: Path) -> list[bytes]:
    """As the front answers, from this machine."""
    kind, _, path = query.partition(":")
    try:
        if kind == "read":
            return [b"0", Path(path).read_bytes()]
        if kind == "list":
            return [b"0", *(name.encode() for name in os.listdir(path))]
        if kind == "real":
            return [b"0", os.path.realpath(path, strict=True).encode()]
        if kind == "stat":
            info = os.stat(path)
            return [b"0", f"{info.st_mode} {info.st_uid} {info.st_gid} {info.st_rdev}".encode()]
    except OSError as error:
        return [str(error.errno).encode()]
    raise AssertionError(query)


def answer(argv: list[str], bundle: Path) -> tuple[bytes, set[str], int]:
    """The last answer's body, the modules that were in at the end, and the number of rounds."""
    near, far = socket.socketpair()
    code = (f"import sys;sys.path.insert(0,{str(SOURCE)!r});from dolium.runtime.cold import main;main({far.fileno()});"
            "print(*sys.modules)")
    process = subprocess.Popen([sys.executable, "-I", "-S", "-E", "-c", code], pass_fds=[far.fileno()], stdout=subprocess.PIPE,
                               text=True)
    far.close()
    near.settimeout(60)
    fields: dict[str, list[str | bytes]] = {"argv": ["dolium-runtime", *argv], "env": ["A=1"], "cwd": [str(bundle)], "uid": ["0"],
                                            "gid": ["0"], "umask": ["18"], "now": ["1700000000"], "machine": [platform.machine()]}
    with near, near.makefile("rwb") as stream:
        rounds = 0
        while rounds < 20:
            rounds += 1
            stream.write(frame(encode_fields(fields)))
            stream.flush()
            body = stream.read(int.from_bytes(stream.read(4), "little"))
            if body[:1] != b"N":
                break
            queries = list(decode_fields(b"\x01\0\0\0n\0" + _count(body[1:]).to_bytes(4, "little") + body[1:])["n"])
            fields = {query.decode(): list(fact(query.decode(), bundle)) for query in queries}
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return body, set(out.split()), rounds


def _count(strings: bytes) -> int:
    count = at = 0
    while at < len(strings):
        at += 5 + int.from_bytes(strings[at : at + 4], "little")
        count += 1
    return count


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "rootfs").mkdir(parents=True)
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}
    made = config(linux={"seccomp": profile}, hooks={"createRuntime": [{"path": "/bin/true"}]},
                  mounts=[{"destination": "/data", "type": "bind", "source": str(folder), "options": ["rbind", "ro"]}])
    (folder / "config.json").write_text(json.dumps(made))
    cache = tmp_path / "state/.cache"
    cache.mkdir(parents=True)
    (cache / f"{seccomp_cache.digest(profile, platform.machine(), platform.release())}.bpf").write_bytes(b"\0" * 16)
    return folder


def test_a_run_with_a_cached_filter_imports_only_what_is_listed(bundle: Path) -> None:
    root = str(bundle.parent / "state")
    body, modules, rounds = answer(["--root", root, "run", "--bundle", str(bundle), "c"], bundle)
    assert body[:1] == b"P", body
    plan = decode(body[1:])
    assert plan.named("seccomp")[0].args[1] == b"\0" * 16 and plan.named("mount_tree") and plan.ops[-1].name == "clone"
    extra = modules - set(BARE) - ALLOWED
    assert extra == set(), f"each costs every cold start about a millisecond: {sorted(extra)}"
    assert not (modules - set(BARE)) & (NEVER - {"os"})
    assert rounds <= 6  # each round is a message there and back


@pytest.mark.parametrize("argv", [["list"], ["state", "absent"], ["features"], ["--version"], ["--help"], ["kill", "absent"],
                                  ["delete", "--force", "absent"], ["nosuch"]])
def test_the_other_commands_too(bundle: Path, argv: list[str]) -> None:
    body, modules, _ = answer(["--root", str(bundle.parent / "state"), *argv], bundle)
    assert body[:1] in (b"P", b"E")
    told = {"dolium.runtime.attributes", "dolium.linux.cgroup.systemd"} if argv == ["features"] else set()
    assert modules - set(BARE) - ALLOWED == told


def test_a_miss_of_the_cache_compiles_and_keeps(bundle: Path) -> None:
    cache = bundle.parent / "state/.cache"
    for path in cache.iterdir():
        path.unlink()
    body, modules, _ = answer(["--root", str(bundle.parent / "state"), "run", "--bundle", str(bundle), "c"], bundle)
    plan = decode(body[1:])
    assert "dolium.linux.seccomp" in modules
    kept = next(op for op in plan.named("write_file") if str(op.args[0]).endswith(".bpf'"))
    program = plan.named("seccomp")[0].args[1]
    assert isinstance(program, bytes) and len(program) >= 8
    # the template's escape is undone when the front writes it
    assert isinstance(kept.args[1], bytes) and kept.args[1].replace(b"\x01\x01", b"\x01") == program
