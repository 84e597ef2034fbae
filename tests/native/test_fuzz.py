"""The fuzzing targets, briefly: that they build, and that nothing falls out in a few seconds (`make fuzz` for longer)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
SECONDS = 6


@pytest.fixture(scope="module")
def fuzz() -> object:
    spec = importlib.util.spec_from_file_location("dolium_fuzz_run", FUZZ / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["config", "manifest", "plan", "untar"])
def test_a_few_seconds_of_fuzzing(fuzz: object, target: str) -> None:
    if missing := fuzz.missing(target):  # type: ignore[attr-defined]
        pytest.skip(f"needs {missing}")
    assert fuzz.run(target, SECONDS, seed=1) == ""  # type: ignore[attr-defined]
