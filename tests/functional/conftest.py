"""Fixtures of the functional tests: a daemon that a module's tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import bundles
import pytest
from daemon import DOLIUM, WARM, Daemon, eventually


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon with the image ``base:1``. Tests remove their containers; the fixture removes the rest."""
    daemon = Daemon(tmp_path_factory.mktemp("dolium"))
    daemon.start()
    try:
        daemon.import_base("base:1", 'CMD ["sh"]')
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="session", autouse=True)
def warm_compiler() -> Iterator[None]:
    """The warm compiler that `dolium` uses in all tests; it is there before the first leak check looks."""
    subprocess.run([DOLIUM, "--help"], env={**os.environ, "DOLIUM_WARM": WARM}, check=True, capture_output=True)
    eventually(lambda: list(Path(WARM).iterdir()), "a warm compiler listens")
    yield
    for place in Path(WARM).iterdir():
        place.unlink()
    os.rmdir(WARM)


@pytest.fixture(scope="session", autouse=True)
def no_other_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """runc and crun are off the PATH: whoever gets dolium-runtime cannot have got another. Controls know where they lie."""
    before, folder = os.environ["PATH"], tmp_path_factory.mktemp("path")
    for place in before.split(os.pathsep):
        for name in os.listdir(place) if os.path.isdir(place) else ():
            if name not in ("runc", "crun", "docker-runc", "kata-runtime", "runsc", "youki") and not os.path.lexists(folder / name):
                os.symlink(os.path.join(place, name), folder / name)
    os.environ["PATH"] = str(folder)
    assert bundles.RUNC is None or shutil.which("runc") is None
    yield
    os.environ["PATH"] = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make control`: what is known of the other runtime, test by test, in control.txt."""
    if not bundles.CONTROL:
        return
    known: dict[str, str] = {}
    for line in (Path(__file__).parent / "control.txt").read_text().splitlines():
        name, _, why = line.partition(" ")
        if name and not name.startswith("#"):
            known[name] = why
    for item in items:
        why = known.get(item.name) or known.get(item.name.partition("[")[0])
        if why:
            item.add_marker(pytest.mark.xfail(reason=why, strict=item.name in known, run=not why.startswith("hangs")))
