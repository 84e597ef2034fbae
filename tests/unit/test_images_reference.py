from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.images.reference import Reference, check_digest, is_digest

HEX = "ab" * 32


@pytest.mark.parametrize(("text", "canonical", "familiar"), [
    ("debian", "docker.io/library/debian", "debian"),
    ("debian:12", "docker.io/library/debian:12", "debian:12"),
    ("library/debian", "docker.io/library/debian", "debian"),
    ("me/app", "docker.io/me/app", "me/app"),
    ("docker.io/debian", "docker.io/library/debian", "debian"),
    ("index.docker.io/me/app:1", "docker.io/me/app:1", "me/app:1"),
    ("localhost/app", "localhost/app", "localhost/app"),
    ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000/app:1"),
    ("quay.io/a/b/c", "quay.io/a/b/c", "quay.io/a/b/c"),
    ("[::1]:5000/app", "[::1]:5000/app", "[::1]:5000/app"),
    (f"debian@sha256:{HEX}", f"docker.io/library/debian@sha256:{HEX}", f"debian@sha256:{HEX}"),
    (f"debian:12@sha256:{HEX}", f"docker.io/library/debian:12@sha256:{HEX}", f"debian:12@sha256:{HEX}"),
    ("a__b/c-d.e", "docker.io/a__b/c-d.e", "a__b/c-d.e"),
])
def test_forms(text: str, canonical: str, familiar: str) -> None:
    reference = Reference.parse(text)
    assert (str(reference), reference.familiar()) == (canonical, familiar)


@pytest.mark.parametrize("text", [
    "", ":", "@", "a:", "a@", "a@sha256:12", "-a", "a-", "a..b", "a/", "/a", "a//b", "a:b:c", "a b", "a:" + "x" * 129,
    "Debian", "me/App", HEX, f"a@sha512:{HEX}", "a/" * 130 + "a", "a:é", "é", "localhost:port/a", "ex_ample.com:1/a",
    "http://example.com/a", "a\n", "a:1\n",
])
def test_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Reference.parse(text)


def test_uppercase_is_explained() -> None:
    with pytest.raises(InvalidArgument, match="must be lowercase"):
        Reference.parse("Debian:12")


def test_default_tag_and_parts() -> None:
    assert str(Reference.parse("a").with_default_tag()) == "docker.io/library/a:latest"
    digested = Reference.parse(f"a@sha256:{HEX}")
    assert digested.with_default_tag() == digested
    assert digested.tagged() is None
    assert str(Reference.parse("a:1").digested(f"sha256:{HEX}")) == f"docker.io/library/a@sha256:{HEX}"


def test_names_that_look_like_domains_keep_theirs() -> None:
    for path in ("foo.bar/x", "localhost/x", f"library/{HEX}"):
        reference = Reference("docker.io", path)
        assert Reference.parse(reference.familiar()) == reference


_component = st.from_regex(r"[a-z0-9]+(?:[._-][a-z0-9]+)?", fullmatch=True)
_domain = st.sampled_from(["docker.io", "localhost", "localhost:5000", "quay.io", "127.0.0.1:80", "Upper", "[::1]:1"])
_tag = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
_digest = st.none() | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)


@given(_domain, st.lists(_component, min_size=1, max_size=4), _tag, _digest)
def test_round_trips(domain: str, parts: list[str], tag: str | None, digest: str | None) -> None:
    path = "/".join(parts)
    if domain == "docker.io" and len(parts) == 1:
        path = f"library/{path}"
    reference = Reference(domain, path, tag, digest)
    assert Reference.parse(str(reference)) == reference
    assert Reference.parse(reference.familiar()) == reference
    assert len(reference.familiar()) <= len(str(reference))


@given(st.text(max_size=40))
def test_never_anything_but_a_reference_or_invalid_argument(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidArgument:
        return
    assert Reference.parse(str(reference)) == reference


def test_digests() -> None:
    assert is_digest(f"sha256:{HEX}")
    for text in (HEX, "sha256:", f"sha256:{HEX.upper()}", f"sha256:{HEX}\n", "sha256:../../etc/passwd" + "0" * 40):
        assert not is_digest(text)
        with pytest.raises(InvalidArgument):
            check_digest(text)
