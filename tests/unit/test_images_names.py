from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dolium.errors import FailedPrecondition, InvalidArgument, NotFound
from dolium.images.changes import apply_changes
from dolium.images.flight import SingleFlight
from dolium.images.names import Names, RemovalPlan, Use, plan_removal
from dolium.images.reference import Reference

ONE, TWO = "sha256:" + "a1" * 32, "sha256:" + "a2" * 32
DIGEST = "sha256:" + "d" * 64
HUB = "docker.io/library"
NAMES = {
    f"{HUB}/debian:12": ONE, f"{HUB}/debian:latest": ONE, f"{HUB}/debian@{DIGEST}": ONE, "quay.io/x/y:1": TWO,
    f"{HUB}/beef:latest": TWO,
}


def resolve(text: str, images: Sequence[str] = (ONE, TWO)) -> str:
    return Names(NAMES).resolve(text, images)[0]


@pytest.mark.parametrize(("text", "expected"), [
    ("debian", ONE), ("debian:12", ONE), ("library/debian:12", ONE), (f"debian@{DIGEST}", ONE),
    (f"debian:other@{DIGEST}", ONE), ("quay.io/x/y:1", TWO), (ONE, ONE), (ONE[7:], ONE), ("a1", ONE), ("a2a2", TWO),
    ("sha256:a2", TWO), ("beef", TWO),
])
def test_resolving(text: str, expected: str) -> None:
    assert resolve(text) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("nothing", "No such image: nothing:latest"), ("debian:13", "No such image: debian:13"),
    ("b1", "No such image: b1:latest"), (f"sha256:{'0' * 64}", f"No such image: sha256:{'0' * 64}"),
    (f"debian@sha256:{'0' * 64}", f"No such image: debian@sha256:{'0' * 64}"),
])
def test_unknown_names_in_dockers_words(text: str, message: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve(text)
    assert str(caught.value) == message


def test_ambiguous_prefixes_and_nonsense() -> None:
    with pytest.raises(InvalidArgument, match="ambiguous"):
        resolve("a")
    with pytest.raises(InvalidArgument, match="lowercase"):
        resolve("Debian")


def refs(*texts: str) -> list[Reference]:
    return [Reference.parse(text) for text in texts]


def plan(names: Sequence[str], by: str | None, *, uses: Sequence[Use] = (), force: bool = False) -> RemovalPlan:
    return plan_removal(refs(*names), ONE, Reference.parse(by) if by else None, uses, force)


def test_a_name_of_several_goes_alone() -> None:
    assert plan(["a:1", "b:1"], "a:1") == RemovalPlan((f"{HUB}/a:1",), False)
    assert plan(["a:1", "a:2", f"a@{DIGEST}"], "a:1") == RemovalPlan((f"{HUB}/a:1",), False)


def test_digests_go_with_the_last_tag_of_their_repository() -> None:
    assert plan(["a:1", f"a@{DIGEST}"], "a:1") == RemovalPlan((f"{HUB}/a:1", f"{HUB}/a@{DIGEST}"), True)
    assert plan(["a:1", f"a@{DIGEST}", "b:1"], "a:1") == RemovalPlan((f"{HUB}/a:1", f"{HUB}/a@{DIGEST}"), False)


def test_by_id() -> None:
    assert plan([], None) == RemovalPlan((), True)
    assert plan(["a:1", f"a@{DIGEST}"], None).delete
    for several in (["a:1", "b:1"], ["a:1", "a:2"]):  # dockerd's words for both
        with pytest.raises(FailedPrecondition, match="multiple repositories"):
            plan(several, None)
    assert plan(["a:1", "b:1"], None, force=True) == RemovalPlan((f"{HUB}/a:1", f"{HUB}/b:1"), True)


def test_images_of_containers_stay() -> None:
    stopped, running = [Use("c" * 64, False)], [Use("c" * 64, True)]
    for uses in (stopped, running):
        assert plan(["a:1", "b:1"], "a:1", uses=uses) == RemovalPlan((f"{HUB}/a:1",), False)
        with pytest.raises(FailedPrecondition, match=r"using its referenced image a1a1a1a1a1a1"):
            plan(["a:1"], "a:1", uses=uses)
        assert plan(["a:1"], "a:1", uses=uses, force=True) == RemovalPlan((f"{HUB}/a:1",), False)
    with pytest.raises(FailedPrecondition, match=r"cannot be forced.*running container cccccccccccc"):
        plan(["a:1"], None, uses=running, force=True)
    with pytest.raises(FailedPrecondition, match=r"must be forced.*stopped container"):
        plan(["a:1"], None, uses=stopped)
    assert not plan(["a:1"], None, uses=stopped, force=True).delete


# Changes


def test_changes() -> None:
    before = {"Env": ["A=1", "B=2"], "Labels": {"x": "y"}, "User": "root"}
    after = apply_changes(before, [
        'CMD ["a", "b"]', "entrypoint run it", "ENV A=3 C='4 5'", "ENV D six seven", "EXPOSE 80 53/udp",
        "LABEL k=v", "WORKDIR /w", "VOLUME /a /b", 'VOLUME ["/c d"]', "STOPSIGNAL SIGINT", "ONBUILD RUN x",
    ])
    assert before["Env"] == ["A=1", "B=2"]
    assert after == {
        "Env": ["B=2", "A=3", "C=4 5", "D=six seven"], "Labels": {"x": "y", "k": "v"}, "User": "root",
        "Cmd": ["a", "b"], "Entrypoint": ["/bin/sh", "-c", "run it"], "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "WorkingDir": "/w", "Volumes": {"/a": {}, "/b": {}, "/c d": {}}, "StopSignal": "SIGINT", "OnBuild": ["RUN x"],
    }


@pytest.mark.parametrize("change", ["", "CMD", "RUN x", "ENV A", "ENV ='x", "LABEL a=b c", "ENV A='"])
def test_refused_changes(change: str) -> None:
    with pytest.raises(InvalidArgument):
        apply_changes({}, [change])


# Single flight


def test_single_flight_shares_results_and_errors() -> None:
    async def main() -> None:
        flight: SingleFlight[int] = SingleFlight()
        gate, calls = asyncio.Event(), 0

        async def work() -> int:
            nonlocal calls
            calls += 1
            await gate.wait()
            if calls == 2:
                raise NotFound("x")
            return calls

        first = [asyncio.create_task(flight.do("k", work)) for _ in range(3)]
        await asyncio.sleep(0)
        first[0].cancel()
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*first, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError) and results[1:] == [1, 1]
        again = await asyncio.gather(*(flight.do("k", work) for _ in range(2)), return_exceptions=True)
        assert all(isinstance(error, NotFound) for error in again) and calls == 2

    asyncio.run(main())


def test_single_flight_cancels_when_nobody_waits() -> None:
    async def main() -> None:
        flight: SingleFlight[None] = SingleFlight()
        started, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        callers = [asyncio.create_task(flight.do("k", work)) for _ in range(2)]
        await started.wait()
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert ended.is_set()

    asyncio.run(main())
