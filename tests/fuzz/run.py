"""Fuzzing: config.json and what registries say by atheris, the decoders of plans and archives by libFuzzer with sanitizers.

    python tests/fuzz/run.py [--seconds N] [config] [manifest] [plan] [untar]

Each target starts from a few inputs that are whole (``config/`` and what is made here). What fails is kept in the folder
that is named at the end. Exit code: 0 when nothing failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "src"))

from dolium.linux.cgroup import tree  # noqa: E402
from dolium.runtime import compile  # noqa: E402
from dolium.runtime.default_spec import default_spec  # noqa: E402
from dolium.runtime.facts import Facts  # noqa: E402
from dolium.runtime.wire import encode_fields  # noqa: E402

SOURCES = {"plan": ["native/executor/plan.c", "native/executor/fields.c"], "untar": []}
CLANG = ["clang", "-std=gnu11", "-D_GNU_SOURCE=", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
TARGETS = ("config", "manifest", "plan", "untar")
PYTHON = ("config", "manifest")

_BLOB = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": f"sha256:{'a' * 64}", "size": 5,
         "annotations": {"org.opencontainers.image.title": "x"}}
_CONFIG = {**_BLOB, "mediaType": "application/vnd.oci.image.config.v1+json"}
MANIFESTS: dict[str, object] = {
    "manifest": {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": _CONFIG, "layers": [_BLOB],
                 "subject": _BLOB, "artifactType": "a/b", "annotations": {"a": "b"}},
    "index": {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [
        {**_BLOB, "mediaType": "application/vnd.oci.image.manifest.v1+json",
         "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}}]},
    "image": {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [_BLOB["digest"]]},
              "config": {"Env": ["A=1"], "Cmd": ["x"], "Labels": {"a": "b"}, "ExposedPorts": {"80/tcp": {}},
                         "Healthcheck": {"Test": ["NONE"], "Interval": 5}}, "history": [{"created_by": "x", "empty_layer": True}]},
    "policy": {"default": [{"type": "reject"}], "transports": {"docker": {"a/b": [
        {"type": "sigstoreSigned", "keyData": "YQ==", "signedIdentity": {"type": "remapIdentity", "prefix": "a", "signedPrefix": "b"}}]}}},
    "registries": {"registry": [{"prefix": "a", "location": "b", "mirror": [{"location": "c", "insecure": True}]}]},
    "auth": {"username": "u", "auth": "dTpw", "token": "t", "expires_in": 5},
    "name": "registry.example:5000/team/app:1", "challenge": 'Bearer realm="https://a/t",scope="repository:a:pull,push"',
}


def seeds(target: str, folder: Path) -> None:
    """Inputs that are whole."""
    folder.mkdir()
    if target == "config":
        for path in (HERE / "config").iterdir():
            shutil.copy(path, folder)
        (folder / "default").write_text(json.dumps(default_spec()))
    elif target == "manifest":
        for name, value in MANIFESTS.items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    elif target == "plan":
        spec = default_spec()
        spec["process"]["terminal"] = False
        layout = tree.parse("1:memory:/\n0::/\n", ["memory", "unified"], False)
        (folder / "plan").write_bytes(compile.compile_container(spec, Facts(), compile.Launch("c", "/b", layout)).encode())
        (folder / "fields").write_bytes(encode_fields({"argv": ["a", "b"], "uid": "7", "request": 9}))
    else:
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w", format=form, pax_headers={"comment": "x"}) as tar:
                for name, kind, size in (("a/b", tarfile.REGTYPE, 700), ("l" * 120, tarfile.SYMTYPE, 0), ("d", tarfile.DIRTYPE, 0)):
                    entry = tarfile.TarInfo(name if form != tarfile.USTAR_FORMAT else name[:90])
                    entry.type, entry.size, entry.linkname, entry.mtime = kind, size, "target", 1.5 if form == tarfile.PAX_FORMAT else 1
                    entry.pax_headers = {"SCHILY.xattr.user.x": "v", "GNU.sparse.map": "0,1"} if form == tarfile.PAX_FORMAT else {}
                    tar.addfile(entry, io.BytesIO(bytes(size)))
            (folder / str(form)).write_bytes(made.getvalue())


def program(target: str, scratch: Path) -> list[str]:
    """What runs the target, built if need be."""
    if target in PYTHON:
        return [sys.executable, str(HERE / f"fuzz_{target}.py")]
    made = scratch / target
    subprocess.run([*CLANG, str(HERE / f"fuzz_{target}.c"), *(str(ROOT / name) for name in SOURCES[target]), "-o", str(made)],
                   check=True)
    return [str(made)]


def run(target: str, seconds: int, seed: int = 0) -> str:
    """"" when nothing failed, or what did, with the input's path. ``seed`` 0: another one each time."""
    kept = Path(tempfile.mkdtemp(prefix=f"dolium-fuzz-{target}-"))
    seeds(target, kept / "corpus")
    words = [*program(target, kept), f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=65536",
             f"-artifact_prefix={kept}/", "-print_final_stats=1", str(kept / "corpus")]
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0" if target == "untar" else "detect_leaks=1"}
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=env, check=False)
    counted = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    print(f"{target}: {seconds} s, {counted[0].split()[-1] if counted else '?'} inputs, exit {done.returncode}", flush=True)
    if done.returncode:
        return f"{target}: inputs and program in {kept}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    shutil.rmtree(kept)
    return ""


def missing(target: str) -> str:
    """What a target needs that is not here."""
    if target in PYTHON:
        return "" if importlib.util.find_spec("atheris") else "the Python package atheris"
    return "" if shutil.which("clang") else "the package clang"


def main() -> int:
    """Run the targets one after the other."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seconds", type=int, default=600)
    words.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    given = words.parse_args()
    failures = [f"{target} needs {missing(target)}" if missing(target) else run(target, given.seconds)
                for target in given.targets or TARGETS]
    print("\n".join(filter(None, failures)))
    return int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
