"""Platform matching by properties: what is chosen suits, and nothing that suits better was there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.images.platform import Platform, choose, describe

_names = st.sampled_from(["amd64", "x86_64", "arm64", "aarch64", "arm", "armhf", "armel", "386", "i686", "riscv64", "s390x", "ppc64le"])
_variants = st.sampled_from(["", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "8", "v9", "weird"])
_platforms = st.builds(lambda os, name, variant: Platform(os, name, variant).normalized(), st.sampled_from(["linux", "windows"]), _names, _variants)
_offers = st.lists(st.none() | _platforms, max_size=8)


@given(_platforms)
def test_a_platform_is_what_it_says(platform: Platform) -> None:
    assert platform.normalized() == platform == Platform.parse(str(platform))


@given(_platforms)
def test_a_machine_runs_its_own_first(platform: Platform) -> None:
    accepted = platform.accepts()
    assert accepted[0] == platform and len(set(accepted)) == len(accepted)
    assert all(each == each.normalized() and each.os == platform.os for each in accepted)
    assert {each.architecture for each in accepted} <= {platform.architecture, *(["arm"] if platform.architecture == "arm64" else [])}


@given(_platforms, _offers)
def test_the_best_offer_is_chosen(wanted: Platform, offers: list[Platform | None]) -> None:
    found = choose(wanted, [(offer, place) for place, offer in enumerate(offers)])
    accepted = wanted.accepts()
    ranks = [accepted.index(offer) if offer in accepted else None for offer in offers]
    suiting = [rank for rank in ranks if rank is not None]
    if suiting:
        assert found is not None and ranks[found] == min(suiting) and found == ranks.index(min(suiting))
    elif None in offers:
        assert found == offers.index(None)
    else:
        assert found is None
    assert all(str(offer) in describe(offers) for offer in offers if offer is not None)


@given(_platforms, _offers, st.integers(0, 8))
def test_more_offers_never_make_it_worse(wanted: Platform, offers: list[Platform | None], more: int) -> None:
    accepted = wanted.accepts()

    def rank(some: list[Platform | None]) -> int:
        found = choose(wanted, [(offer, offer) for offer in some])
        return accepted.index(found) if found in accepted else len(accepted)

    assert rank(offers) <= rank(offers[:more])


@given(_platforms)
def test_a_newer_variant_accepts_all_an_older_one_does(platform: Platform) -> None:
    for older in platform.accepts():
        if older.architecture == platform.architecture:
            assert set(older.accepts()) <= set(platform.accepts())


@given(st.text(max_size=20))
def test_any_text_is_a_platform_or_refused(text: str) -> None:
    try:
        platform = Platform.parse(text)
    except InvalidArgument:
        return
    assert platform.os and platform.architecture
