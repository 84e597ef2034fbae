"""Signatures made here, kept beside an image in a real registry; the daemon lets through what the policy allows."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from daemon import Daemon, base_tar
from registry import CONFIG, MANIFEST, ImageFiles, Registry, digest_of, image, index

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


pytestmark = pytest.mark.leaves("links", "nft")
