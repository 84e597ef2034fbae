"""The pure parts of the storage bench: what fio says, the image's libraries, ratios and their verdict. No figure is judged."""

import importlib
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).parent.parent.parent / "bench"


def load(name: str) -> ModuleType:
    """A module of bench/, which is no package, without its folders staying in sys.path."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before


storage, beside = load("storage"), load("beside")


def fio(**errors: int) -> dict[str, Any]:
    """fio's answer, with what is read of it."""
    side = {"bw_bytes": 3 << 20, "iops": 2000.0, "clat_ns": {"percentile": {"50.000000": 31500}}}
    return {"fio version": "fio-3.33", "jobs": [
        {"jobname": name, "error": errors.get(name, 0), "read": side, "write": {**side, "bw_bytes": 5 << 20, "iops": 4000.0}}
        for name in storage.JOBS]}


def test_what_fio_says_becomes_figures_in_their_units() -> None:
    found = storage.figures_of("fio: a note before\n" + json.dumps(fio()))
    assert list(found.values()) == [5, 3, 31.5, 250, 2000, 4000]
    assert [key.rpartition(", ")[2] for key in list(found)[:3]] == ["MiB/s", "MiB/s", "µs"]


@pytest.mark.parametrize("broken", [fio(reads=5), {**fio(), "jobs": fio()["jobs"][:-1]}])
def test_a_job_that_failed_or_is_not_there_is_no_figure(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fio's job (reads: 5|writes: not there)"):
        storage.figures_of(json.dumps(broken))


def test_every_job_is_asked_for_alone_on_a_new_file() -> None:
    words = storage.command("/volume", unbuffered=False)
    assert words[3] == "/volume/fio" and "--filename=/volume/fio" in words and "--direct=0" in words
    assert [word for word in words if word.startswith("--name")] == [f"--name={name}" for name in storage.JOBS]
    assert words.count("--stonewall") == len(storage.JOBS)


def test_libraries_of_a_program() -> None:
    listing = ("\tlinux-vdso.so.1 (0x00007ffd)\n\tlibaio.so.1 => /lib/x86_64-linux-gnu/libaio.so.1 (0x00007f)\n"
               "\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n")
    assert storage.libraries(listing) == ["/lib/x86_64-linux-gnu/libaio.so.1", "/lib64/ld-linux-x86-64.so.2"]
    with pytest.raises(ValueError, match=r"librbd\.so\.1 is not found"):
        storage.libraries("\tlibrbd.so.1 => not found\n")


values = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=12)


@given(values, st.floats(0.01, 100))
def test_the_ratio_lies_in_its_interval_and_pairs_stay_together(theirs: list[float], factor: float) -> None:
    ratio, low, high = beside.interval([value * factor for value in theirs], theirs, rounds=200)
    assert ratio == pytest.approx(factor) and low == pytest.approx(factor) and high == pytest.approx(factor)


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=1, max_size=12))
def test_an_interval_is_ordered_and_within_what_was_measured(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [our for our, _ in pairs], [their for _, their in pairs]
    ratio, low, high = beside.interval(ours, theirs, rounds=200)
    assert ratio == statistics.median(ours) / statistics.median(theirs)
    assert min(ours) / max(theirs) <= low <= high <= max(ours) / min(theirs)


@pytest.mark.parametrize(("ratio", "latency", "throughput"), [
    ((1.0, 0.9, 1.1), True, True), ((1.2, 1.1, 1.3), False, True), ((0.8, 0.7, 0.9), True, False), ((1.0, 1.0, 1.0), True, True)])
def test_not_slower_means_the_interval_holds_one_or_is_better(ratio: tuple[float, float, float], latency: bool, throughput: bool) -> None:
    assert beside.not_slower(ratio, less_is_better=True) is latency
    assert beside.not_slower(ratio, less_is_better=False) is throughput


def test_a_table_judges_each_line_by_its_own_direction(capsys: pytest.CaptureFixture[str]) -> None:
    report = beside.Report()
    beside.compared(report, "volume", {"latency, µs": {"dolium": [2.0, 2.0], "docker": [1.0, 1.0]},
                                       "IOPS": {"dolium": [2.0, 2.0], "docker": [1.0, 1.0]}}, ("latency",))
    assert report.lines[-2].endswith("| 2.000 (2.000 to 2.000) | not slower: **missed** |")
    assert report.lines[-1].endswith("| 2.000 (2.000 to 2.000) | not slower: **met** |")
    assert "n=2" in report.lines[-1] and report.lines[-1] in capsys.readouterr().out
