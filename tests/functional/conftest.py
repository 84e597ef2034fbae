"""Fixtures of the functional tests: a daemon that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemon import Daemon


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
