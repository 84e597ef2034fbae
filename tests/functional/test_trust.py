"""Signatures made here, kept beside an image in a real registry; the daemon lets through what the policy allows."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from daemon import Daemon, base_tar
from registry import CONFIG, MANIFEST, ImageFiles, Registry, digest_of, image, index, layer
from test_mirror import Cache

SIGNED = "application/vnd.dev.cosign.simplesigning.v1+json"


def signature(digest: str, name: str, key: ec.EllipticCurvePrivateKey) -> ImageFiles:
    """What `cosign sign --key` pushes as sha256-HEX.sig."""
    payload = json.dumps({"critical": {"identity": {"docker-reference": name}, "image": {"docker-manifest-digest": digest},
                                       "type": "cosign container image signature"}, "optional": None}).encode()
    config = json.dumps({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": [digest_of(payload)]}}).encode()
    signed = base64.b64encode(key.sign(payload, ec.ECDSA(hashes.SHA256()))).decode()
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
                "layers": [{"mediaType": SIGNED, "digest": digest_of(payload), "size": len(payload),
                            "annotations": {"dev.cosignproject.cosign/signature": signed}}]}
    return ImageFiles(json.dumps(manifest).encode(), MANIFEST, {digest_of(config): config, digest_of(payload): payload})


def test_a_policy_decides_what_is_pulled(engine: Daemon, tmp_path: Path) -> None:
    key, stranger = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    policy = engine.folder / "etc/containers/policy.json"
    policy.parent.mkdir(parents=True, exist_ok=True)
    with Registry(tmp_path) as registry:
        files = index({"linux/amd64": image([base_tar()], config={"Cmd": ["echo", "signed"]})})
        repository = registry.reference("team/app")
        for tag in ("good", "bad", "none"):
            registry.push("team/app", tag, files)
        rules = {"default": [{"type": "reject"}], "transports": {"docker": {
            repository: [{"type": "sigstoreSigned", "keyPath": str(tmp_path / "key.pub"), "signedIdentity": {"type": "matchRepository"}}],
            registry.reference("open"): [{"type": "insecureAcceptAnything"}]}}}
        policy.write_text(json.dumps(rules))
        try:
            registry.push("open/app", "1", files)
            registry.push("closed/app", "1", files)
            engine.docker("pull", "-q", registry.reference("open/app:1"))
            assert "refused by containers/policy.json" in engine.docker("pull", registry.reference("closed/app:1"), check=False).stderr
            assert "there is no signature" in engine.docker("pull", f"{repository}:none", check=False).stderr
            tag = files.digest.replace(":", "-") + ".sig"
            registry.push("team/app", tag, signature(files.digest, repository, stranger))
            done = engine.docker("run", "--rm", f"{repository}:bad", check=False)
            assert done.returncode == 125 and "none of the keys" in done.stderr
            registry.push("team/app", tag, signature(files.digest, repository, key))
            assert engine.docker("run", "--rm", f"{repository}:good").stdout == "signed\n"
            assert engine.dolium("run", "--rm", f"{repository}@{files.digest}").stdout == "signed\n"
            policy.write_text("{")
            assert "nothing is pulled" in engine.docker("pull", registry.reference("open/app:1"), check=False).stderr
        finally:
            policy.unlink()
        engine.docker("rmi", "-f", f"{repository}:good", registry.reference("open/app:1"))


def test_a_whole_index_is_signed_itself_or_in_each_image(engine: Daemon, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    policy = engine.folder / "etc/containers/policy.json"
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text(json.dumps({"default": [{"type": "sigstoreSigned", "keyPath": str(tmp_path / "key.pub"),
                                               "signedIdentity": {"type": "matchRepository"}}]}))
    with Registry(tmp_path) as registry:
        files = index({"linux/amd64": image([layer({"a": b"1"})]), "linux/arm64": image([layer({"b": b"2"})], architecture="arm64")})
        ours, arm = (child.digest for child in files.children)
        try:
            for repository, signed in (("index", [files.digest]), ("ours", [ours]), ("each", [ours, arm])):
                name = registry.reference(repository)
                registry.push(repository, "1", files)
                for digest in signed:
                    registry.push(repository, digest.replace(":", "-") + ".sig", signature(digest, name, key))
                engine.dolium("pull", "-q", f"{name}:1")
                done = engine.dolium("pull", "-q", "--all-platforms", f"{name}:1", check=False)
                assert (done.returncode == 0) == (repository != "ours"), done.stderr
                assert repository != "ours" or "there is no signature" in done.stderr or "a signature is for" in done.stderr
                engine.dolium("rmi", f"{name}:1")
        finally:
            policy.unlink()


def test_archives_come_in_by_their_own_transport(engine: Daemon, tmp_path: Path) -> None:
    """As podman and skopeo judge the same archives by the same file."""
    archive, layout, root = tmp_path / "docker.tar", tmp_path / "oci.tar", tmp_path / "root.tar"
    engine.docker("tag", "base:1", "archived:1")
    engine.docker("save", "-o", str(archive), "archived:1")
    subprocess.run(["skopeo", "copy", "-q", f"docker-archive:{archive}", f"oci-archive:{layout}:archived:1"], check=True, timeout=60)
    root.write_bytes(base_tar())
    engine.docker("rmi", "archived:1")
    before = set((engine.folder / "data/content/blobs/sha256").iterdir())
    policy = engine.folder / "etc/containers/policy.json"
    policy.parent.mkdir(parents=True, exist_ok=True)
    ways = {"docker-archive": ("load", "-i", str(archive)), "oci-archive": ("load", "-i", str(layout)), "tarball": ("import", str(root), "archived:1")}
    try:
        for allowed in (*ways, "none"):
            policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {allowed: {"": [{"type": "insecureAcceptAnything"}]}}}))
            for transport, words in ways.items():
                done = engine.dolium(*words, check=False)
                assert (done.returncode == 0) == (transport == allowed), (transport, allowed, done.stderr)
                assert transport == allowed or f"({transport}) is refused by containers/policy.json, scope 'default'" in done.stderr
                if transport != "tarball":
                    judged = subprocess.run(["skopeo", "--policy", str(policy), "copy", "-q", f"{transport}:{words[2]}", f"dir:{tmp_path}/out"],
                                            capture_output=True, timeout=60, check=False)
                    assert judged.returncode == (0 if transport == allowed else 1)
                if transport == allowed:
                    engine.dolium("rmi", "archived:1")
                assert set((engine.folder / "data/content/blobs/sha256").iterdir()) == before
    finally:
        policy.unlink()


def test_a_mirror_fills_itself_with_what_the_policy_lets_through(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "etc/containers").mkdir(parents=True)
    with Registry(tmp_path) as registry:
        files = index({"linux/amd64": image([layer({"a": b"1"})])})
        for repository in ("signed", "unsigned", "closed", "open"):
            registry.push(repository, "1", files)
        registry.push("signed", files.digest.replace(":", "-") + ".sig", signature(files.digest, registry.reference("signed"), key))
        need = [{"type": "sigstoreSigned", "keyPath": str(tmp_path / "key.pub"), "signedIdentity": {"type": "matchRepository"}}]
        (tmp_path / "etc/containers/policy.json").write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": {
            registry.address: need, registry.reference("open"): [{"type": "insecureAcceptAnything"}],
            registry.reference("closed"): [{"type": "reject"}]}}}))
        with Cache(tmp_path, "--upstream", registry.address) as cache:
            def asked(path: str) -> int:
                connection = http.client.HTTPConnection(cache.address)
                with contextlib.closing(connection):
                    connection.request("GET", f"/v2/{path}")
                    answer = connection.getresponse()
                    answer.read()
                    return answer.status

            child, blob = files.children[0].digest, next(iter(files.children[0].blobs))
            assert asked(f"unsigned/blobs/{blob}") == 403  # no manifest that was let through names it
            assert asked(f"signed/manifests/{child}") == 403  # nothing is known to name it yet
            assert [asked(f"closed/manifests/{name}") for name in ("1", files.digest, child)] == [403] * 3
            assert asked("unsigned/manifests/1") == 200 and asked(f"unsigned/manifests/{child}") == 403  # a list is no image
            assert [asked(f"open/{path}") for path in ("manifests/1", f"manifests/{child}", f"blobs/{blob}")] == [200] * 3
            assert [asked(f"signed/{path}") for path in ("manifests/1", f"manifests/{child}", f"blobs/{blob}")] == [200] * 3
            assert asked(f"signed/manifests/{files.digest.replace(':', '-')}.sig") == 200  # clients judge by it
            assert asked(f"unsigned/blobs/{blob}") == 403  # though it is here, for others


pytestmark = pytest.mark.leaves("links", "nft")
