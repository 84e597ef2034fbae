from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import DoliumError, InvalidArgument, Unimplemented
from dolium.images import manifest as m
from dolium.images.manifest import Index, Manifest, chain_ids, parse_config, parse_manifest
from dolium.images.platform import Platform, choose, describe, host

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def image(**changes: Any) -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": 2, "mediaType": m.OCI_MANIFEST,
        "config": {"mediaType": m.OCI_CONFIG, "digest": A, "size": 10},
        "layers": [{"mediaType": m.OCI_LAYER + "+gzip", "digest": B, "size": 20}],
    }
    document.update(changes)
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


def test_manifests_of_both_kinds() -> None:
    for kind in (m.OCI_MANIFEST, m.DOCKER_MANIFEST):
        parsed = parse_manifest(image(mediaType=kind))
        assert isinstance(parsed, Manifest)
        assert (parsed.media_type, parsed.config.digest, parsed.layers[0].size) == (kind, A, 20)


def test_the_media_type_field_may_be_missing() -> None:
    assert isinstance(parse_manifest(image(mediaType=...), m.DOCKER_MANIFEST), Manifest)
    assert isinstance(parse_manifest(image(mediaType=...), "application/json"), Manifest)
    index = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    assert isinstance(parse_manifest(index), Index)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "not JSON"), (b"[]", "not a JSON object"), (b"[" * 100_000, "not JSON"),
    (image(schemaVersion=3), "schemaVersion 3"), (image(schemaVersion="2"), "not of type int"),
    (image(mediaType="text/plain", layers=...), "unknown media type"),
    (image(manifests=[]), "both layers and manifests"),
    (image(config=None), "config: not a JSON object"),
    (image(config={"mediaType": m.OCI_CONFIG, "digest": "md5:1", "size": 1}), "invalid digest"),
    (image(config={"mediaType": m.OCI_CONFIG, "digest": "sha256:../../etc", "size": 1}), "invalid digest"),
    (image(config={"mediaType": m.OCI_CONFIG, "digest": A, "size": -1}), "invalid size"),
    (image(config={"mediaType": m.OCI_CONFIG, "digest": A, "size": True}), "not of type int"),
    (image(config={"mediaType": m.OCI_CONFIG, "digest": A, "size": 1 << 60}), "invalid size"),
    (image(config={"mediaType": m.OCI_CONFIG, "digest": A, "size": 1 << 30}), "longer than"),
    (image(config={"mediaType": "application/vnd.helm", "digest": A, "size": 1}), "not a container image"),
    (image(layers=[{"mediaType": "text/html", "digest": B, "size": 1}]), "unknown media type 'text/html'"),
    (image(layers=[{"mediaType": m.OCI_LAYER, "digest": B, "size": 1}] * 501), "501 layers"),
    (image(layers={}), "not of type list"),
    (b" " * (m.MANIFEST_MAX + 1), "longer than"),
])
def test_refused_manifests(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason.replace("(", r"\(")):
        parse_manifest(data)


def test_schema_1_is_named() -> None:
    with pytest.raises(Unimplemented, match="schema 1"):
        parse_manifest(b'{"schemaVersion": 1, "fsLayers": []}')


def test_attestations_are_not_images() -> None:
    entry = {"mediaType": m.OCI_MANIFEST, "digest": A, "size": 1}
    data = json.dumps({"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": [
        {**entry, "platform": {"os": "linux", "architecture": "arm64"}},
        {**entry, "platform": {"os": "unknown", "architecture": "unknown"}},
        {**entry, "annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
        {**entry, "mediaType": "application/vnd.other"},
    ]}).encode()
    index = parse_manifest(data)
    assert isinstance(index, Index)
    assert [str(entry.platform) for entry in index.images] == ["linux/arm64"]


def test_chain_ids_of_the_specification() -> None:
    import hashlib
    assert chain_ids([A]) == (A,)
    expected = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    assert chain_ids([A, B]) == (A, expected)
    assert chain_ids([]) == ()


CONFIG = {
    "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z",
    "config": {
        "User": "www:www", "Env": ["A=1"], "Cmd": ["x"], "Entrypoint": [], "WorkingDir": "/w",
        "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}}, "Labels": {"a": "b"}, "StopSignal": "SIGINT",
        "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5_000_000_000, "Retries": 3},
    },
    "rootfs": {"type": "layers", "diff_ids": [A]},
    "history": [{"created_by": "ADD"}, {"created_by": "CMD", "empty_layer": True}],
}


def test_config_fields() -> None:
    config = parse_config(json.dumps(CONFIG).encode())
    assert str(config.platform) == "linux/amd64"
    assert (config.user, config.env, config.cmd, config.entrypoint) == ("www:www", ("A=1",), ("x",), ())
    assert (config.working_dir, config.volumes, config.exposed_ports) == ("/w", ("/v",), ("80/tcp",))
    assert (config.labels, config.stop_signal) == ({"a": "b"}, "SIGINT")
    assert config.healthcheck is not None and config.healthcheck.interval == 5_000_000_000
    assert [entry.empty_layer for entry in config.history] == [False, True]
    assert config.raw["architecture"] == "amd64" and config.chain_ids == (A,)


def test_a_bare_config_has_defaults() -> None:
    config = parse_config(json.dumps({"rootfs": {"diff_ids": []}, "config": None}).encode())
    assert (config.cmd, config.entrypoint, config.env, config.healthcheck) == (None, None, (), None)


@pytest.mark.parametrize("change", [
    {"rootfs": None}, {"rootfs": {"type": "zip", "diff_ids": []}}, {"rootfs": {"diff_ids": ["x"]}},
    {"config": {"Env": "A=1"}}, {"config": {"Env": [1]}}, {"config": {"Labels": {"a": 1}}}, {"config": []},
    {"config": {"Volumes": ["/v"]}}, {"history": [3]}, {"architecture": 5},
    {"architecture": "a/b/c/d"}, {"os": "\x1b[2J"}, {"variant": "v 8"},
])
def test_refused_configs(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        parse_config(json.dumps({**CONFIG, **change}).encode())


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["config", "layers", "manifests", "digest", "size", "rootfs", "diff_ids", "platform", "Env"]),
        inner, max_size=4),
    max_leaves=12,
)


@given(_json)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    for document in (value, {"schemaVersion": 2, "manifests": value}, {"schemaVersion": 2, "layers": value},
                     {"rootfs": value, "config": value}):
        for parse in (parse_manifest, parse_config):
            try:
                parse(json.dumps(document).encode())
            except DoliumError:
                continue


# Platforms


@pytest.mark.parametrize(("text", "expected"), [
    ("linux/amd64", "linux/amd64"), ("x86_64", "linux/amd64"), ("linux/aarch64", "linux/arm64"),
    ("linux/arm64/v8", "linux/arm64"), ("linux/arm", "linux/arm/v7"), ("armhf", "linux/arm/v7"),
    ("linux/arm/6", "linux/arm/v6"), ("armel", "linux/arm/v6"), ("i386", "linux/386"),
    ("linux/amd64/v1", "linux/amd64"),
])
def test_platform_names(text: str, expected: str) -> None:
    assert str(Platform.parse(text)) == expected
    assert Platform.parse(expected) == Platform.parse(text)


@pytest.mark.parametrize("text", ["", "/", "linux/", "a/b/c/d"])
def test_refused_platforms(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Platform.parse(text)


@pytest.mark.parametrize(("wanted", "offers", "expected"), [
    ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
    ("linux/amd64", ["linux/arm64"], None),
    ("linux/amd64", ["windows/amd64"], None),
    ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], "linux/arm64"),
    ("linux/arm64", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
    ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"),
    ("linux/arm/v6", ["linux/arm/v7"], None),
    ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], "linux/amd64/v2"),
    ("linux/amd64", ["linux/amd64/v2"], None),
])
def test_choice(wanted: str, offers: list[str], expected: str | None) -> None:
    listed = [(Platform.parse(offer), str(Platform.parse(offer))) for offer in offers]
    assert choose(Platform.parse(wanted), listed) == expected


def test_an_offer_without_platform_is_the_last_resort() -> None:
    wanted = Platform.parse("linux/amd64")
    assert choose(wanted, [(None, "any"), (wanted, "exact")]) == "exact"
    assert choose(wanted, [(Platform.parse("arm64"), "arm"), (None, "any")]) == "any"
    assert describe([wanted, None, wanted]) == "linux/amd64"
    assert describe([]) == "none"
    assert host().os == "linux"
