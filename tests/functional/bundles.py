"""What the runtime's tests share: busybox bundles, the runtime as a function, waiting for a condition."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dolium.native import program
from dolium.runtime.default_spec import default_spec

# `make control` puts another runtime in our place, to see that a test asks for what any does (conftest.py)
CONTROL = os.environ.get("DOLIUM_TEST_RUNTIME", "")
FRONT = CONTROL or program("dolium-front")
DEADLINE = 30.0
CGROUPS = "/sys/fs/cgroup"
# Controls; conftest.py takes both off the PATH before the first test.
RUNC, CRUN = shutil.which("runc"), shutil.which("crun")
BUSYBOX = "/bin/busybox"

needs = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces, mounts and cgroups"),
    pytest.mark.skipif(not os.path.exists(BUSYBOX), reason="needs the package busybox-static"),
]

_APPLETS: list[str] = []
_counter = itertools.count(1)


def fill_rootfs(root: Path) -> Path:
    """A root file system with busybox and a few files; about 4 ms."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "home", "root"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path(BUSYBOX).read_bytes())
    (root / "bin/busybox").chmod(0o755)
    if not _APPLETS:
        listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
        _APPLETS.extend(name for name in listed if name != "busybox")
    for name in _APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    return root


def until(what: Callable[[], Any], message: str = "condition", deadline: float = DEADLINE) -> Any:
    """The first true value of ``what()``; fails at the deadline."""
    end, pause = time.monotonic() + deadline, 0.002
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {message}")
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


def alive(pid: int) -> bool:
    """Is there such a process, and is it no zombie?"""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class Result:
    """What a command gave."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.out = done.stdout
        self.err = done.stderr

    def __repr__(self) -> str:
        return f"<exit {self.code}, out {self.out!r}, err {self.err!r}>"


class Runtime:
    """dolium-runtime with a state folder of its own."""

    def __init__(self, base: Path) -> None:
        self.root = base / "state"
        self.base = base
        self.ids: list[str] = []
        self.background: list[subprocess.Popen[str]] = []

    def __call__(self, *words: str, code: int | None = 0, stdin: str | None = None, timeout: float = 60,
                 **more: Any) -> Result:
        """Run a command; ``code`` None takes any exit code."""
        if stdin is not None:
            more["input"] = stdin
        elif "stdin_file" in more:
            more["stdin"] = more.pop("stdin_file")
        else:
            more["stdin"] = subprocess.DEVNULL
        result = Result(subprocess.run([FRONT, "--root", str(self.root), *words], capture_output=True, text=True,
                                       timeout=timeout, check=False, **more))
        if code is not None:
            assert result.code == code, result
        return result

    def popen(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """The same in the background, with pipes."""
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
        started = subprocess.Popen([FRONT, "--root", str(self.root), *words], **more)
        self.background.append(started)
        return started

    def create(self, bundle: Bundle, *words: str, identity: str = "c", **more: Any) -> str:
        """Create a container with its standard streams on /dev/null; it must be deleted by the test."""
        self.ids.append(identity)
        bundle.write()
        errors = self.base / "create.err"  # not a pipe: init keeps it open
        with open(os.devnull, "r+") as null, open(errors, "w") as err:
            done = subprocess.run([FRONT, "--root", str(self.root), "create", "--bundle", str(bundle.path), *words,
                                   identity], **{"stdin": null, "stdout": null, "stderr": err, "timeout": 60, **more})
        assert done.returncode == 0, errors.read_text()
        return identity

    def started(self, bundle: Bundle, *words: str, identity: str = "c") -> str:
        """Create and start."""
        self.create(bundle, *words, identity=identity)
        self("start", identity)
        return identity

    def run(self, bundle: Bundle, *words: str, identity: str = "c", code: int | None = 0, **more: Any) -> Result:
        """``run`` in the foreground."""
        bundle.write()
        self.ids.append(identity)
        return self("run", "--bundle", str(bundle.path), *words, identity, code=code, **more)

    def state(self, identity: str = "c") -> dict[str, Any]:
        """The ``state`` command's object."""
        value: dict[str, Any] = json.loads(self("state", identity).out)
        return value

    def wait_status(self, status: str, identity: str = "c") -> None:
        """Until ``state`` says so."""
        until(lambda: self.state(identity)["status"] == status, f"{identity} becomes {status}")

    def left(self) -> list[str]:
        """What is in the state folder, the cache aside."""
        return sorted(name for name in os.listdir(self.root) if name != ".cache") if self.root.exists() else []

    def close(self) -> None:
        """Delete by force whatever the test made."""
        for identity in {*self.ids, *self.left()}:
            self("delete", "--force", identity, code=None)
        for started in self.background:
            started.kill()
            with contextlib.suppress(ValueError):  # its pipes were read to the end already
                started.communicate()


class Bundle:
    """A folder with ``config`` (an object to change before it is written) and a rootfs."""

    def __init__(self, path: Path, *args: str) -> None:
        self.path = path
        self.rootfs = fill_rootfs(path / "rootfs")
        self.config = default_spec()
        self.process["terminal"] = False
        self.process["args"] = list(args) or ["sh"]
        self.config["root"]["readonly"] = False
        self.linux["cgroupsPath"] = f"/dolium/t{os.getpid()}-{next(_counter)}"

    @property
    def process(self) -> dict[str, Any]:
        value: dict[str, Any] = self.config["process"]
        return value

    @property
    def linux(self) -> dict[str, Any]:
        value: dict[str, Any] = self.config["linux"]
        return value

    def sh(self, script: str) -> Bundle:
        """Run a shell script."""
        self.process["args"] = ["sh", "-c", script]
        return self

    def mount(self, destination: str, kind: str, source: str, *options: str) -> Bundle:
        """One more mount."""
        self.config["mounts"].append({"destination": destination, "type": kind, "source": source,
                                      "options": list(options)})
        return self

    def capabilities(self, *names: str) -> Bundle:
        """The same set of capabilities everywhere but ambient."""
        self.process["capabilities"] = {kind: list(names) for kind in ("bounding", "effective", "permitted")}
        return self

    def namespace(self, kind: str, path: str | None = None, *, absent: bool = False) -> Bundle:
        """A namespace new, joined by path, or not in the list."""
        entries = [entry for entry in self.linux["namespaces"] if entry["type"] != kind]
        if not absent:
            entries.append({"type": kind, **({"path": path} if path else {})})
        self.linux["namespaces"] = entries
        return self

    def hook(self, kind: str, *argv: str, timeout: int | None = None, env: list[str] | None = None) -> Bundle:
        """One more hook; ``argv[0]`` is the path."""
        hook: dict[str, Any] = {"path": argv[0], "args": list(argv)}
        if timeout is not None:
            hook["timeout"] = timeout
        if env is not None:
            hook["env"] = env
        self.config.setdefault("hooks", {}).setdefault(kind, []).append(hook)
        return self

    def group(self, controller: str) -> str:
        """The container's folder in one hierarchy of v1, or in v2's."""
        path = self.linux["cgroupsPath"]
        for candidate in (f"{CGROUPS}/{controller}", f"{CGROUPS}/unified", CGROUPS):
            if os.path.isdir(candidate):
                return f"{candidate}{path}"
        raise AssertionError("no cgroup hierarchy")

    def groups(self) -> list[str]:
        """The container's groups that exist."""
        path = self.linux["cgroupsPath"]
        every = [f"{CGROUPS}{path}", *(f"{CGROUPS}/{name}{path}" for name in os.listdir(CGROUPS))]
        return [folder for folder in every if os.path.isdir(folder)]

    def write(self) -> Path:
        """Write config.json."""
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self.path

    def copy_config(self) -> dict[str, Any]:
        """A deep copy, to put back later."""
        return copy.deepcopy(self.config)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    """dolium-runtime; its containers are deleted at the end."""
    one = Runtime(tmp_path)
    yield one
    one.close()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A busybox bundle."""
    return Bundle(tmp_path / "bundle")
