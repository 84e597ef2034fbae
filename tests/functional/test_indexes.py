"""Whole indexes: pulled, kept, pushed, saved and loaded; judged by skopeo, buildah and the registry."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, base_tar
from registry import CONFIG, INDEX, MANIFEST, ImageFiles, Registry, digest_of, image, index, layer

pytestmark = pytest.mark.leaves("links", "nft")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        yield one


def attestation(of: str) -> ImageFiles:
    """What BuildKit puts beside an image."""
    statement, config = b'{"_type":"https://in-toto.io/Statement/v0.1"}', b'{"architecture":"unknown","os":"unknown","rootfs":{"type":"layers","diff_ids":[]}}'
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
                "layers": [{"mediaType": "application/vnd.in-toto+json", "digest": digest_of(statement), "size": len(statement)}]}
    return ImageFiles(json.dumps(document).encode(), MANIFEST, {digest_of(config): config, digest_of(statement): statement})


def many(text: str, *, nested: bool = False) -> ImageFiles:
    """Two platforms and an attestation; ``nested``: and an index inside it, which skopeo does not copy."""
    ours = image([base_tar(), layer({"opt/": b"", "opt/text": text.encode()})], config={"Cmd": ["cat", "/opt/text"]})
    arm = image([layer({"arm": text.encode()})], architecture="arm64")
    top = index({"linux/amd64": ours, "linux/arm64": arm, "unknown/unknown": attestation(ours.digest)})
    if not nested:
        return top
    inner = index({"linux/riscv64": image([layer({"riscv": text.encode()})], architecture="riscv64")})
    document = json.loads(top.manifest)
    document["manifests"].append({"mediaType": INDEX, "digest": inner.digest, "size": len(inner.manifest)})
    return ImageFiles(json.dumps(document).encode(), INDEX, {}, [*top.children, inner])


def everything(files: ImageFiles) -> set[str]:
    return {files.digest, *files.blobs}.union(*map(everything, files.children))


def blobs(engine: Daemon) -> set[str]:
    return {f"sha256:{path.name}" for path in (engine.folder / "data/content/blobs/sha256").iterdir()}


def skopeo(*words: str) -> bytes:
    return subprocess.run(["skopeo", *words], check=True, capture_output=True, timeout=60).stdout


def raw_digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{name}")).hexdigest()


def test_an_index_goes_from_registry_to_registry(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    files, before = many("first"), blobs(engine)
    name, other = registry.reference("many:1"), registry.reference("elsewhere/many:2")
    registry.push("many", "1", files)
    engine.dolium("pull", "-q", name)
    engine.dolium("tag", name, other)
    done = engine.dolium("push", "--all-platforms", other, check=False)
    assert done.returncode == 1 and "only its image" in done.stderr and "pull --all-platforms" in done.stderr
    assert blobs(engine) - before < everything(files)

    engine.dolium("pull", "-q", "--all-platforms", name)
    assert blobs(engine) - before == everything(files)
    assert engine.dolium("run", "--rm", name).stdout == "first"
    engine.dolium("tag", name, other)
    assert files.digest in engine.dolium("push", "--all-platforms", other).stdout
    assert raw_digest(other) == files.digest
    skopeo("copy", "-q", "--all", "--src-tls-verify=false", f"docker://{other}", f"dir:{tmp_path}/dir")  # reads every blob
    assert digest_of((tmp_path / "dir/manifest.json").read_bytes()) == files.digest
    found = subprocess.run(["buildah", "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs",
                            "pull", "-q", "--tls-verify=false", "--arch", "arm64", other], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    arm = json.loads(files.children[1].manifest)
    assert found.stdout.strip() == arm["config"]["digest"].removeprefix("sha256:")

    engine.dolium("push", f"{registry.reference('elsewhere/many')}@{files.digest}")  # the name is known since the push by tag
    engine.dolium("push", other)  # without being asked for all: one image under the tag
    assert raw_digest(other) == files.children[0].digest
    engine.dolium("rmi", other)
    assert everything(files) <= blobs(engine)  # another name stands for it
    engine.dolium("rmi", name)
    assert blobs(engine) == before


def test_what_skopeo_pushes_of_all_platforms_comes_back_the_same(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    files = many("copied")
    registry.push("source", "1", files)
    name, back = registry.reference("by-skopeo:1"), registry.reference("back:1")
    skopeo("copy", "-q", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{registry.reference('source:1')}", f"docker://{name}")
    engine.dolium("pull", "-q", "--all-platforms", "--platform", "linux/arm64", name)
    assert engine.inspect(name)["Architecture"] == "arm64"  # that one is unpacked
    engine.dolium("tag", name, back)
    engine.dolium("push", "-q", "--all-platforms", back)
    assert raw_digest(back) == raw_digest(name) == files.digest
    engine.dolium("rmi", name, back)


def test_save_and_load_keep_all_of_it(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    files, before = many("saved"), blobs(engine)
    name, archive = registry.reference("saved:1"), tmp_path / "saved.tar"
    registry.push("saved", "1", files)
    engine.dolium("pull", "-q", "--all-platforms", name)
    engine.dolium("save", "--all-platforms", "-o", str(archive), name)
    layout = tmp_path / "layout"
    layout.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(layout)], check=True)
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert entry["digest"] == files.digest and entry["annotations"]["io.containerd.image.name"] == name
    skopeo("copy", "-q", "--all", f"oci:{layout}:1", f"dir:{tmp_path}/dir")
    assert digest_of((tmp_path / "dir/manifest.json").read_bytes()) == files.digest
    engine.dolium("rmi", name)
    assert blobs(engine) == before

    for path in (archive, tmp_path / "plain.tar"):
        if path != archive:  # an OCI layout alone, as others write it
            (layout / "manifest.json").unlink()
            subprocess.run(["tar", "-cf", str(path), "-C", str(layout), "."], check=True)
        engine.dolium("load", "-q", "-i", str(path))
        assert engine.dolium("run", "--rm", name).stdout == "saved"
        assert files.children[0].digest in blobs(engine) - before < everything(files)
        engine.dolium("rmi", name)
        assert blobs(engine) == before
        engine.dolium("load", "-q", "--all-platforms", "-i", str(path))
        assert blobs(engine) - before == everything(files)
        again = registry.reference(f"loaded:{path.stem}")
        engine.dolium("tag", name, again)
        engine.dolium("push", "-q", "--all-platforms", again)
        assert raw_digest(again) == files.digest
        engine.dolium("rmi", name, again)
        assert blobs(engine) == before
    lost = digest_of(next(iter(files.children[1].blobs.values()))).removeprefix("sha256:")
    (layout / "blobs/sha256" / lost).unlink()
    subprocess.run(["tar", "-cf", str(tmp_path / "short.tar"), "-C", str(layout), "."], check=True)
    assert lost in engine.dolium("load", "--all-platforms", "-i", str(tmp_path / "short.tar"), check=False).stderr
    assert blobs(engine) == before


@pytest.mark.leaves("links", "nft", "children")  # the new daemon's
def test_an_index_moves_with_its_name_and_survives_the_daemon(engine: Daemon, registry: Registry) -> None:
    old, new, before = many("old", nested=True), many("new"), blobs(engine)
    name, other = registry.reference("moving:1"), registry.reference("moved:1")
    registry.push("moving", "1", old)
    engine.dolium("pull", "-q", "--all-platforms", name)
    engine.kill()
    engine.start()
    assert everything(old) <= blobs(engine)
    engine.dolium("tag", name, other)
    engine.dolium("push", "--all-platforms", other)
    assert raw_digest(other) == old.digest
    engine.dolium("rmi", other)
    registry.push("moving", "1", new)
    engine.dolium("pull", "-q", name)  # the tag stands for one image now
    assert engine.dolium("push", "--all-platforms", name, check=False).returncode == 1
    assert everything(old) <= blobs(engine)  # its digest still does for the old index
    engine.dolium("rmi", f"{registry.reference('moving')}@{old.digest}")
    assert not (everything(old) - everything(new)) & blobs(engine)
    engine.dolium("rmi", name)
    assert blobs(engine) == before


def test_the_check_finds_and_fetches_what_an_index_has_lost(engine: Daemon, registry: Registry) -> None:
    files, before = many("checked"), blobs(engine)
    name = registry.reference("checked:1")
    registry.push("checked", "1", files)
    engine.dolium("pull", "-q", "--all-platforms", name)
    lost = list(files.children[1].blobs)[-1]
    path = engine.folder / "data/content/blobs/sha256" / lost.removeprefix("sha256:")

    def check(*words: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(engine.dolium("system", "check", "--quick", "--format", "json", *words, check=False).stdout)["Problems"]
        return [one for one in found if one["Kind"] == "index"]

    assert check() == []
    path.unlink()
    problems = check()
    assert {one["Subject"] for one in problems} >= {name} and all(lost in one["Problem"] for one in problems)
    assert "cannot be sent" in engine.dolium("push", "--all-platforms", name, check=False).stderr
    assert all("fetched again" in one["Outcome"] for one in check("--repair"))
    assert path.exists() and check() == []
    path.unlink()
    (registry.root / "data/docker/registry/v2/blobs/sha256" / path.name[:2] / path.name / "data").unlink()
    assert all("dropped" in one["Outcome"] for one in check("--repair"))
    assert check() == [] and blobs(engine) - before < everything(files)
    assert engine.dolium("run", "--rm", name).stdout == "checked"
    engine.dolium("rmi", name)
    assert blobs(engine) == before
    done = engine.dolium("pull", "--all-platforms", name, check=False)  # one layer of it is nowhere: nothing of it stays
    assert done.returncode == 1 and blobs(engine) == before and not engine.dolium("images", "-q", name).stdout
