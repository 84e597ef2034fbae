"""Which images may come in: ``containers/policy.json``, containers-policy.json(5), enforced before a blob is fetched or a
layer of an archive unpacked.

    insecureAcceptAnything   yes
    reject                   no
    sigstoreSigned           when a cosign signature by one of the keys says so (``keyPath``, ``keyPaths``, ``keyData``,
                             ``keyDatas``), for the identity ``signedIdentity`` asks for

As strict as its other readers: an unknown field makes the whole file invalid, and then nothing is pulled. What this
version cannot check (``signedBy``, Fulcio, Rekor) is refused, never passed over. Without a file everything is accepted.

A signature is a manifest beside the image, under the tag ``sha256-HEX.sig`` or as its referrer. It may be of the index a
name stands for, which names the image by its digest, or of the image itself.
"""

from __future__ import annotations

import base64
import binascii
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dolium.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from dolium.images.manifest import INDEXES, Descriptor, parse_artifact
from dolium.images.reference import Reference

SIGNATURE_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
REFERRER_TYPE = "application/vnd.dev.cosign.artifact.sig.v1+json"
PAYLOAD_MAX = 1 << 20
SIGNATURES_MAX = 64  # of one image that are looked at
_PAYLOAD_TYPES = ("cosign container image signature", "atomic container signature")
_KEYS = ("keyPath", "keyPaths", "keyData", "keyDatas")
_UNSUPPORTED = ("fulcio", "rekorPublicKeyPath", "rekorPublicKeyPaths", "rekorPublicKeyData", "rekorPublicKeyDatas", "pki")
_TRANSPORT = "docker"
DOCKER_ARCHIVE, OCI_ARCHIVE, OCI_FOLDER, TARBALL = "docker-archive", "oci-archive", "oci", "tarball"
_BY_PATH = (OCI_ARCHIVE, OCI_FOLDER, "dir")
_WITHOUT_SCOPES = (DOCKER_ARCHIVE, TARBALL)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a signature must say it is for: one of the manual's ``signedIdentity`` types with its fields."""

    kind: str = "matchRepoDigestOrExact"
    reference: str = ""
    prefix: str = ""
    signed_prefix: str = ""

    def accepts(self, pulled: Reference, signed: str) -> bool:
        """Is a signature whose docker-reference is ``signed`` one for the name that is pulled?"""
        try:
            claimed = Reference.parse(signed)
            wanted = Reference.parse(self.reference) if self.reference else pulled
        except InvalidArgument:
            return False
        if self.kind == "exactReference":
            return claimed == wanted
        if self.kind in ("matchRepository", "exactRepository"):
            return claimed.name == wanted.name
        if self.kind == "remapIdentity":
            name = pulled.name
            if name == self.prefix or name.startswith(f"{self.prefix}/"):
                name = self.signed_prefix + name[len(self.prefix):]
            wanted = Reference.parse(name + pulled.suffix)
        if wanted.digest is not None and self.kind != "matchExact":
            return claimed.name == wanted.name
        return claimed == wanted and (claimed.tag is not None or claimed.digest is not None)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One entry of a list of requirements. ``keys`` are PEM files or their content; ``refused`` says why this version
    cannot check it, or is "".
    """

    kind: str
    keys: tuple[Path | bytes, ...] = ()
    identity: Identity = Identity()
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the file says: requirements by transport and scope, and those for all else."""

    default: tuple[Requirement, ...]
    transports: Mapping[str, Mapping[str, tuple[Requirement, ...]]]

    def requirements(self, reference: Reference) -> tuple[str, tuple[Requirement, ...]]:
        """The scope that decides about a registry's name, the most special one, and what it asks for."""
        return self.of(_TRANSPORT, scopes_of(reference))

    def of(self, transport: str, scopes: Iterable[str]) -> tuple[str, tuple[Requirement, ...]]:
        """The first of the scopes that the file knows of a transport, and what it asks for."""
        known = self.transports.get(transport, {})
        for scope in scopes:
            if scope in known:
                return scope or transport, known[scope]
        return "default", self.default

    def open_to(self, reference: Reference) -> bool:
        """Is everything under this name let through unseen?"""
        return all(requirement.kind == "insecureAcceptAnything" for requirement in self.requirements(reference)[1])


ACCEPT = Policy((Requirement("insecureAcceptAnything"),), {})


def scopes_of(reference: Reference) -> list[str]:
    """The scopes that speak of a name, most special first; the last is the transport's own default, ""."""
    found = [str(reference)] if reference.suffix else []
    name = reference.name
    while name:
        found.append(name)
        name = name.rpartition("/")[0]
    domain = reference.domain
    while "." in domain:
        domain = domain.partition(".")[2]
        found.append(f"*.{domain}")
    return [*found, ""]


def read_policy(etc: Path) -> Policy:
    """The file, read anew for each pull. Raises FailedPrecondition naming what is wrong with it."""
    path = etc / "containers/policy.json"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return ACCEPT
    except OSError as error:
        raise FailedPrecondition(f"{path}: {error.strerror}") from None
    try:
        return parse_policy(json.loads(text, object_pairs_hook=_no_doubles))
    except (ValueError, RecursionError) as error:
        raise FailedPrecondition(f"{path}: {error}", hint="nothing is pulled before it is put right") from None


class _Wrong(ValueError):
    pass


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Wrong("a key is there twice")
    return found


def parse_policy(value: object) -> Policy:
    """The policy of a parsed file. Raises ValueError saying what is wrong."""
    document = _object("the policy", value, ("default", "transports"))
    if "default" not in document:
        raise _Wrong("default is missing")
    transports = _object("transports", document.get("transports") or {}, None)
    parsed: dict[str, dict[str, tuple[Requirement, ...]]] = {}
    for transport, entries in transports.items():
        for scope, requirements in _object(f"transport {transport}", entries, None).items():
            _check_scope(transport, scope)
            parsed.setdefault(transport, {})[scope] = _requirements(f"scope {scope!r} of {transport}", requirements)
    return Policy(_requirements("default", document["default"]), parsed)


def _check_scope(transport: str, scope: str) -> None:
    """Transports that know no names have one scope; those that are files have absolute paths, written one way."""
    if scope and transport in _WITHOUT_SCOPES:
        raise _Wrong(f"transport {transport} has no scope but \"\", not {scope!r}")
    if scope and transport in _BY_PATH and (not scope.startswith("/") or scope == "/" or posixpath.normpath(scope) != scope):
        raise _Wrong(f"scope {scope!r} of {transport} is no absolute path")


def _object(what: str, value: object, keys: Iterable[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{what} is not an object")
    unknown = set(value) - set(keys) if keys is not None else set()
    if unknown:
        raise _Wrong(f"{what} has an unknown field {sorted(unknown)[0]!r}")
    return value


def _requirements(what: str, value: object) -> tuple[Requirement, ...]:
    if not isinstance(value, list) or not value:
        raise _Wrong(f"{what} needs a list of at least one requirement")
    return tuple(_requirement(what, entry) for entry in value)


def _requirement(what: str, value: object) -> Requirement:
    kind = str(value.get("type")) if isinstance(value, dict) else None
    if kind in ("insecureAcceptAnything", "reject"):
        _object(what, value, ("type",))
        return Requirement(kind)
    if kind == "signedBy":
        return Requirement(kind, refused="signedBy (GPG)")
    if kind != "sigstoreSigned":
        raise _Wrong(f"{what}: unknown requirement {kind!r}")
    entry = _object(what, value, ("type", "signedIdentity", *_KEYS, *_UNSUPPORTED))
    given = [key for key in (*_KEYS, "fulcio", "pki") if key in entry]
    if len(given) != 1:
        raise _Wrong(f"{what}: exactly one of {', '.join((*_KEYS, 'fulcio', 'pki'))} is needed")
    refused = next((key for key in _UNSUPPORTED if key in entry), "")
    return Requirement(kind, () if refused else _keys(what, given[0], entry[given[0]]),
                       _identity(what, entry.get("signedIdentity")), refused)


def _keys(what: str, key: str, value: object) -> tuple[Path | bytes, ...]:
    values = value if key.endswith("s") else [value]
    if not isinstance(values, list) or not values or not all(isinstance(one, str) and one for one in values):
        raise _Wrong(f"{what}: {key} is not what it should be")
    if key.startswith("keyPath"):
        return tuple(Path(one) for one in values)
    try:
        return tuple(base64.b64decode(one, validate=True) for one in values)
    except binascii.Error as error:
        raise _Wrong(f"{what}: {key}: {error}") from None


_IDENTITIES: dict[str, tuple[str, ...]] = {
    "matchExact": (), "matchRepoDigestOrExact": (), "matchRepository": (), "exactReference": ("dockerReference",),
    "exactRepository": ("dockerRepository",), "remapIdentity": ("prefix", "signedPrefix"),
}


def _identity(what: str, value: object) -> Identity:
    if value is None:
        return Identity()
    kind = str(value.get("type")) if isinstance(value, dict) else None
    if kind not in _IDENTITIES:
        raise _Wrong(f"{what}: unknown signedIdentity {kind!r}")
    entry = _object(f"{what}: signedIdentity", value, ("type", *_IDENTITIES[kind]))
    for field in _IDENTITIES[kind]:
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise _Wrong(f"{what}: signedIdentity needs {field}")
    return Identity(kind, entry.get("dockerReference") or entry.get("dockerRepository") or "", entry.get("prefix", ""),
                    entry.get("signedPrefix", ""))


# Checking


class Registry(Protocol):
    """Who has the image, and its signatures."""

    async def manifest(self, name: str) -> tuple[bytes, str, str]:
        """Bytes, media type and digest of a tag or digest."""

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """A blob in memory, its digest compared."""

    async def referrers(self, digest: str, artifact_type: str = "") -> list[dict[str, Any]]:
        """Descriptors of what refers to a manifest."""


@dataclass(frozen=True, slots=True)
class Signature:
    """A payload and what is said to be its signature; nothing is checked yet."""

    payload: bytes
    signature: bytes


async def enforce(policy: Policy, reference: Reference, digests: Sequence[str], registry: Registry) -> None:
    """Let an image through, or raise PermissionDenied saying which scope asks for what and why that is not so.

    ``digests``: of what the name stands for, and of the image chosen from it. Raises Unimplemented for a requirement that
    this version cannot check, and what the registry raises.
    """
    scope, requirements = policy.requirements(reference)
    signatures: list[Signature] | None = None
    for requirement in requirements:
        if requirement.kind == "insecureAcceptAnything":
            continue
        where = f"pull of {reference.familiar()} is refused by containers/policy.json, scope {scope!r}"
        if requirement.kind == "reject":
            raise PermissionDenied(where)
        if requirement.refused:
            raise Unimplemented(f"{where}: it asks for {requirement.refused}, which this version cannot check")
        if signatures is None:
            signatures = [one for digest in dict.fromkeys(digests) for one in await fetch_signatures(registry, digest)]
        if not signatures:
            raise PermissionDenied(f"{where}: there is no signature", hint="cosign sign makes one")
        reasons = [check_signature(one, requirement, reference, digests) for one in signatures]
        if all(reasons):
            raise PermissionDenied(f"{where}: {'; '.join(dict.fromkeys(reasons))}")


def enforce_file(policy: Policy, transport: str, path: Path | None = None, label: str = "") -> None:
    """Let an archive through, or raise PermissionDenied. Archives have no signatures: a requirement of one is not met.

    ``path``: where it lies, None for a stream, which only the transport's own default speaks of; ``label``: the image's
    name in an OCI layout.
    """
    scopes = [""]
    if path is not None and transport in _BY_PATH:
        whole = path.resolve()
        scopes = [f"{whole}:{label}"] if label else []
        scopes += [*map(str, (whole, *whole.parents[:-1])), ""]
    scope, requirements = policy.of(transport, scopes)
    for requirement in requirements:
        if requirement.kind != "insecureAcceptAnything":
            why = "" if requirement.kind == "reject" else f": it asks for {requirement.kind}, and there is no signature"
            verb = "import" if transport == TARBALL else "load"
            raise PermissionDenied(f"{verb} ({transport}) is refused by containers/policy.json, scope {scope!r}{why}")


async def enforce_served(
    policy: Policy, names: Sequence[Reference], digests: Sequence[str], data: bytes, media_type: str, registry: Registry
) -> None:
    """Let a cache take a manifest from a registry, under any of the names it is known by; raises as ``enforce``.

    A list is no image, and a signature is what a client judges images by: they pass where nothing rejects them. ``digests``:
    the manifest's own, and those of indexes that name it.
    """
    listed = media_type in INDEXES or _only_signatures(data, media_type)
    for name in names:
        try:
            _, requirements = policy.requirements(name)
            if not listed or any(requirement.kind == "reject" for requirement in requirements):
                await enforce(policy, name, digests, registry)
            return
        except PermissionDenied:
            if name == names[-1]:
                raise


def _only_signatures(data: bytes, media_type: str) -> bool:
    blobs = parse_artifact(data, media_type).blobs
    return bool(blobs) and all(blob.media_type == SIGNATURE_TYPE for blob in blobs)


async def fetch_signatures(registry: Registry, digest: str) -> list[Signature]:
    """All signatures of a manifest, by tag and by referrer."""
    manifests = []
    try:
        manifests.append((await registry.manifest(f"{digest.replace(':', '-', 1)}.sig"))[:2])
    except NotFound:
        for entry in await registry.referrers(digest, REFERRER_TYPE):
            manifests.append((await registry.manifest(str(entry.get("digest"))))[:2])
    found: list[Signature] = []
    for data, media_type in manifests:
        for blob in parse_artifact(data, media_type, what=f"signatures of {digest}").blobs:
            text = blob.annotations.get(SIGNATURE, "")
            if blob.media_type != SIGNATURE_TYPE or not text or len(found) >= SIGNATURES_MAX:
                continue
            try:
                signature = base64.b64decode(text, validate=True)
            except binascii.Error:
                continue
            found.append(Signature(await registry.small_blob(blob, PAYLOAD_MAX), signature))
    return found


def check_signature(
    signature: Signature, requirement: Requirement, reference: Reference, digests: Sequence[str]
) -> str:
    """Why a signature is not good enough, or "". Raises FailedPrecondition for a key that is none."""
    if not any(_verify(load_key(key), signature) for key in requirement.keys):
        return "a signature is by none of the keys"
    try:
        critical = json.loads(signature.payload)["critical"]
        kind, digest = critical["type"], critical["image"]["docker-manifest-digest"]
        identity = critical["identity"]["docker-reference"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a signature's payload makes no sense"
    if kind not in _PAYLOAD_TYPES:
        return f"a signature is of type {kind!r}"
    if digest not in digests:
        return f"a signature is for {digest}"
    if not isinstance(identity, str) or not requirement.identity.accepts(reference, identity):
        return f"a signature is for the name {identity!r}"
    return ""


def load_key(key: Path | bytes) -> Any:
    """A public key of PEM. Raises FailedPrecondition."""
    # Imported when a policy asks for it: it costs a daemon without one nothing.
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    what = str(key) if isinstance(key, Path) else "keyData"
    try:
        loaded = load_pem_public_key(key.read_bytes() if isinstance(key, Path) else key)
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"containers/policy.json: key {what}: {error}") from None
    if not isinstance(loaded, EllipticCurvePublicKey):
        raise FailedPrecondition(f"containers/policy.json: key {what} is not for ECDSA", hint="cosign's keys are")
    return loaded


def _verify(key: Any, signature: Signature) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        key.verify(signature.signature, signature.payload, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True

