"""The signature policy: the file's grammar, scopes, identities, and signatures made here."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dolium.errors import FailedPrecondition, NotFound, PermissionDenied, Unimplemented
from dolium.images.content import digest_of
from dolium.images.manifest import OCI_CONFIG, OCI_MANIFEST, Descriptor
from dolium.images.reference import Reference
from dolium.images.trust import (
    ACCEPT,
    REFERRER_TYPE,
    SIGNATURE,
    SIGNATURE_TYPE,
    Identity,
    enforce,
    enforce_file,
    parse_policy,
    read_policy,
    scopes_of,
)

KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
PEM, OTHER_PEM = (key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in (KEY, OTHER))
NAME = Reference.parse("registry.example/team/app:1")
TOP, INNER = digest_of(b"index"), digest_of(b"manifest")


def payload(digest: str = TOP, name: str = str(NAME), kind: str = "cosign container image signature") -> bytes:
    return json.dumps({"critical": {"identity": {"docker-reference": name}, "image": {"docker-manifest-digest": digest},
                                    "type": kind}, "optional": None}).encode()


class Signed:
    """A registry with signatures: by tag, or as referrers."""

    def __init__(self, signatures: dict[str, list[tuple[bytes, bytes]]], referrers: bool = False) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.referring: dict[str, list[dict[str, Any]]] = {}
        for digest, made in signatures.items():
            layers = []
            for text, signature in made:
                self.blobs[digest_of(text)] = text
                layers.append({"mediaType": SIGNATURE_TYPE, "digest": digest_of(text), "size": len(text),
                               "annotations": {SIGNATURE: base64.b64encode(signature).decode()}})
            data = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": layers,
                               "config": {"mediaType": OCI_CONFIG, "digest": digest_of(b"{}"), "size": 2}}).encode()
            if referrers:
                self.manifests[digest_of(data)] = data
                self.referring[digest] = [{"digest": digest_of(data), "artifactType": REFERRER_TYPE}]
            else:
                self.manifests[digest.replace(":", "-") + ".sig"] = data

    async def manifest(self, name: str) -> tuple[bytes, str, str]:
        if name not in self.manifests:
            raise NotFound(name)
        return self.manifests[name], OCI_MANIFEST, digest_of(self.manifests[name])

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        return self.blobs[descriptor.digest]

    async def referrers(self, digest: str, artifact_type: str = "") -> list[dict[str, Any]]:
        return self.referring.get(digest, [])


def sign(data: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> tuple[bytes, bytes]:
    return data, key.sign(data, ec.ECDSA(hashes.SHA256()))


def requirement(**more: object) -> dict[str, object]:
    return {"type": "sigstoreSigned", "keyData": base64.b64encode(PEM).decode(), **more}


def check(registry: Signed, *requirements: dict[str, object], name: Reference = NAME) -> None:
    policy = parse_policy({"default": [{"type": "reject"}], "transports": {"docker": {"registry.example": list(requirements)}}})
    asyncio.run(enforce(policy, name, (TOP, INNER), registry))


@pytest.mark.parametrize("referrers", [False, True])
@pytest.mark.parametrize("digest", [TOP, INNER])
def test_a_good_signature(digest: str, referrers: bool) -> None:
    check(Signed({digest: [sign(payload(digest), OTHER), sign(payload(digest))]}, referrers), requirement())


@pytest.mark.parametrize(("signed", "words"), [
    ([], "no signature"), ([sign(payload(), OTHER)], "none of the keys"), ([(payload(), b"nonsense")], "none of the keys"),
    ([(payload() + b" ", sign(payload())[1])], "none of the keys"), ([sign(payload(digest_of(b"another")))], "is for sha256"),
    ([sign(payload(name="registry.example/team/other:1"))], "for the name"), ([sign(payload(name="registry.example/team/app:2"))], "for the name"),
    ([sign(payload(kind="a poem"))], "a poem"), ([sign(b"{}")], "no sense"), ([sign(b"[")], "no sense"), ([sign(payload(name="!"))], "for the name"),
])
def test_bad_signatures(signed: list[tuple[bytes, bytes]], words: str) -> None:
    registry = Signed({TOP: signed} if signed else {})
    with pytest.raises(PermissionDenied, match=words):
        check(registry, requirement())
    with pytest.raises(PermissionDenied):  # all requirements, not any
        check(registry, {"type": "insecureAcceptAnything"}, requirement())


def test_reject_accept_and_what_cannot_be_checked() -> None:
    check(Signed({}), {"type": "insecureAcceptAnything"})
    with pytest.raises(PermissionDenied, match=r"refused by containers/policy\.json, scope 'registry\.example'"):
        check(Signed({}), {"type": "reject"})
    with pytest.raises(PermissionDenied, match="'default'"):
        check(Signed({}), {"type": "insecureAcceptAnything"}, name=Reference.parse("debian:12"))
    for wish in ({"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}, requirement(rekorPublicKeyPath="/k"),
                 {"type": "sigstoreSigned", "fulcio": {}}):
        with pytest.raises(Unimplemented, match="cannot check"):
            check(Signed({TOP: [sign(payload())]}), wish)


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_bytes(OTHER_PEM)
    (tmp_path / "b.pub").write_bytes(PEM)
    good = Signed({TOP: [sign(payload())]})
    check(good, {"type": "sigstoreSigned", "keyPaths": [str(tmp_path / "a.pub"), str(tmp_path / "b.pub")]})
    with pytest.raises(PermissionDenied):
        check(good, {"type": "sigstoreSigned", "keyPath": str(tmp_path / "a.pub")})
    (tmp_path / "rsa.pub").write_bytes(rsa.generate_private_key(65537, 2048).public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for path, words in (("absent", "No such file"), ("rsa.pub", "not for ECDSA")):
        with pytest.raises(FailedPrecondition, match=words):
            check(good, {"type": "sigstoreSigned", "keyPath": str(tmp_path / path)})


DIGESTED = Reference.parse(f"registry.example/team/app@{TOP}")


@pytest.mark.parametrize(("identity", "pulled", "signed", "accepted"), [
    (Identity(), NAME, str(NAME), True), (Identity(), NAME, "registry.example/team/app", False),
    (Identity(), DIGESTED, "registry.example/team/app:9", True), (Identity("matchExact"), DIGESTED, "registry.example/team/app:9", False),
    (Identity("matchExact"), DIGESTED, str(DIGESTED), True), (Identity("matchRepository"), NAME, "registry.example/team/app:9", True),
    (Identity("matchRepository"), NAME, "registry.example/team/app", True), (Identity("matchRepository"), NAME, "registry.example/team", False),
    (Identity("exactReference", "a.example/x:1"), NAME, "a.example/x:1", True), (Identity("exactReference", "a.example/x:1"), NAME, "a.example/x:2", False),
    (Identity("exactRepository", "a.example/x"), NAME, "a.example/x:7", True), (Identity("exactRepository", "a.example/x"), NAME, str(NAME), False),
    (Identity("remapIdentity", "", "registry.example/team", "vendor.example"), NAME, "vendor.example/app:1", True),
    (Identity("remapIdentity", "", "registry.example/tea", "vendor.example"), NAME, "vendor.examplem/app:1", False),
    (Identity("remapIdentity", "", "registry.example", "vendor.example"), NAME, str(NAME), False), (Identity(), NAME, "!", False),
])
def test_identities(identity: Identity, pulled: Reference, signed: str, accepted: bool) -> None:
    assert identity.accepts(pulled, signed) is accepted


def test_scopes() -> None:
    assert scopes_of(Reference.parse("a.b.example:5000/team/app:1")) == [
        "a.b.example:5000/team/app:1", "a.b.example:5000/team/app", "a.b.example:5000/team", "a.b.example:5000",
        "*.b.example:5000", "*.example:5000", ""]
    assert scopes_of(Reference.parse("debian")) == ["docker.io/library/debian", "docker.io/library", "docker.io", "*.io", ""]


@pytest.mark.parametrize("text", [
    "{}", "[]", "{", '{"default": []}', '{"default": [{"type": "x"}]}', '{"default": [{"type": "reject"}], "more": 1}',
    '{"default": [{"type": "reject", "x": 1}]}', '{"default": [{"type": "reject"}], "default": [{"type": "reject"}]}',
    '{"default": [{"type": "sigstoreSigned"}]}', '{"default": [{"type": "sigstoreSigned", "keyPath": "a", "keyData": "YQ=="}]}',
    '{"default": [{"type": "sigstoreSigned", "keyData": "!"}]}', '{"default": [{"type": "sigstoreSigned", "keyPaths": []}]}',
    '{"default": [{"type": "sigstoreSigned", "keyPath": "a", "signedIdentity": {"type": "x"}}]}',
    '{"default": [{"type": "sigstoreSigned", "keyPath": "a", "signedIdentity": {"type": "remapIdentity", "prefix": "x"}}]}',
    *(f'{{"default": [{{"type": "reject"}}], "transports": {{"{transport}": {{"{scope}": [{{"type": "reject"}}]}}}}}}'
      for transport, scope in [("docker-archive", "/x"), ("tarball", "x"), ("oci", "x"), ("oci", "/"), ("oci-archive", "/x/../y"), ("dir", "/x/")]),
    '{"default": [{"type": "reject"}], "transports": {"docker": {"x": []}}}', '{"default": [{"type": "reject"}], "transports": 5}',
])
def test_a_file_that_makes_no_sense_lets_nothing_through(tmp_path: Path, text: str) -> None:
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers/policy.json").write_text(text)
    with pytest.raises(FailedPrecondition, match=r"policy\.json"):
        read_policy(tmp_path)


YES, NO, SIGNED = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}], [requirement()]


@pytest.mark.parametrize(("transports", "transport", "path", "label", "said"), [
    ({}, "tarball", None, "", "import (tarball) is refused by containers/policy.json, scope 'default'"),
    ({"tarball": {"": YES}}, "tarball", None, "", ""), ({"docker": {"": YES}}, "docker-archive", None, "", "'default'"),
    ({"docker-archive": {"": YES}}, "docker-archive", "/a/b", "", ""), ({"docker-archive": {"": YES}}, "oci-archive", None, "", "load (oci-archive)"),
    ({"oci-archive": {"": SIGNED}}, "oci-archive", None, "", "asks for sigstoreSigned, and there is no signature"),
    ({"oci-archive": {"": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}]}}, "oci-archive", None, "", "asks for signedBy"),
    ({"oci-archive": {"": NO, "/a": YES}}, "oci-archive", None, "", "'oci-archive'"),  # a stream has no path
    ({"oci-archive": {"": NO, "/a": YES}}, "oci-archive", "/a/b/c", "", ""), ({"oci": {"/a": YES, "/a/b": NO}}, "oci", "/a/b/c", "1", "'/a/b'"),
    ({"oci": {"/a/b:1": YES, "/a": NO}}, "oci", "/a/b", "1", ""), ({"oci": {"/a/b:1": YES, "/a": NO}}, "oci", "/a/b", "2", "'/a'"),
    ({"oci": {"/a/b": YES, "/a/b:1": NO}}, "oci", "/a/b", "1", "'/a/b:1'"),
])
def test_archives(transports: dict[str, object], transport: str, path: str | None, label: str, said: str) -> None:
    policy = parse_policy({"default": NO, "transports": transports})
    if not said:
        enforce_file(policy, transport, Path(path) if path else None, label)
        return
    with pytest.raises(PermissionDenied) as caught:
        enforce_file(policy, transport, Path(path) if path else None, label)
    assert said in str(caught.value)


def test_no_file_accepts(tmp_path: Path) -> None:
    assert read_policy(tmp_path) == ACCEPT
