"""`dolium system check`: what is broken is named; what a registry still has is fetched; what nobody has is dropped. And
artifacts, referrers, leases.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, base_tar, eventually
from registry import Registry, image, layer

pytestmark = pytest.mark.leaves("links", "nft")
ALONE = "127.0.0.1:1/alone:1"  # where nobody answers


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        one.push("app", "1", image([base_tar(), layer({"opt/": b"", "opt/second": b"2", "opt/more": b"3"})], config={"Cmd": ["cat", "/opt/second"]}))
        yield one


@pytest.fixture
def app(engine: Daemon, registry: Registry) -> Iterator[str]:
    name = registry.reference("app:1")
    engine.dolium("pull", "-q", name)
    yield name
    engine.docker("rmi", "-f", name, check=False)


def check(engine: Daemon, *words: str) -> tuple[int, list[dict[str, Any]]]:
    done = engine.dolium("system", "check", "--format", "json", *words, check=False)
    return done.returncode, json.loads(done.stdout)["Problems"]


def blob(engine: Daemon, digest: str) -> Path:
    return engine.folder / "data/content/blobs/sha256" / digest.removeprefix("sha256:")


def parts(engine: Daemon, name: str) -> dict[str, Path]:
    """Where an image's pieces are."""
    found = engine.inspect(name)
    named = found["Id"].encode()
    (manifest,) = [path for path in blob(engine, "").iterdir() if path.stat().st_size < 5000 and named in path.read_bytes()]
    document = json.loads(manifest.read_text())
    chain = engine.folder / "data/snapshots/layers"
    (top,) = [path for path in chain.iterdir() if (path / "fs/opt/second").exists()]
    return {"manifest": manifest, "config": blob(engine, found["Id"]), "layer": blob(engine, document["layers"][1]["digest"]),
            "unpacked": top / "fs/opt/second", "folder": top}


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(b"!" * len(data))


BREAKS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "manifest": ("blob", spoil, "does not have its digest", "fetched again"),
    "config": ("blob", spoil, "does not have its digest", "fetched again"),
    "layer": ("blob", Path.unlink, "missing", "fetched again"),
    "unpacked": ("layer", spoil, "/opt/second has", "unpacked again"),
}


def test_a_whole_store(engine: Daemon, app: str) -> None:
    done = engine.dolium("system", "check")
    assert done.stdout.endswith("all whole\n") and "2 images" in done.stdout


@pytest.mark.parametrize("what", BREAKS)
def test_what_a_registry_has_is_fetched(engine: Daemon, app: str, what: str) -> None:
    kind, breaks, text, outcome = BREAKS[what]
    breaks(parts(engine, app)[what])
    code, problems = check(engine)
    assert code == 1 and problems[0]["Kind"] == kind and text in problems[0]["Problem"]
    assert check(engine) == (code, problems)  # looking changes nothing
    code, problems = check(engine, "--repair")
    assert code == 0 and outcome in problems[0]["Outcome"]
    assert check(engine) == (0, [])
    assert engine.docker("run", "--rm", app).stdout == "2"
    engine.docker("push", app)


def test_what_nobody_has_is_dropped(engine: Daemon, registry: Registry) -> None:
    engine.dolium("load", "-i", str(_saved(engine, registry)))
    paths = parts(engine, ALONE)
    layer_blob = paths["layer"].read_bytes()
    paths["layer"].unlink()
    assert "cannot be sent" in engine.docker("save", "-o", f"{engine.folder}/no.tar", ALONE, check=False).stderr
    code, problems = check(engine, "--repair")
    assert code == 1 and "cannot be repaired" in problems[0]["Outcome"]
    assert engine.docker("run", "--rm", ALONE).stdout == "2"  # it can still run: only push and save need the blob
    spoil(paths["unpacked"])
    paths["layer"].write_bytes(layer_blob)
    engine.docker("create", "--name", "holds", ALONE)
    paths["layer"].unlink()
    shutil.rmtree(paths["folder"])
    code, problems = check(engine, "--repair")
    assert code == 1 and {one["Kind"] for one in problems} == {"blob", "layer", "container"}
    assert any("kept: container" in one["Outcome"] for one in problems)
    engine.docker("rm", "holds")
    code, problems = check(engine, "--repair")
    assert code == 0 and any("is dropped" in one["Outcome"] for one in problems)
    assert engine.docker("image", "inspect", ALONE, check=False).returncode == 1 and check(engine) == (0, [])


def _saved(engine: Daemon, registry: Registry) -> Path:
    name, path = registry.reference("app:1"), engine.folder / "alone.tar"
    engine.docker("pull", "-q", name)
    engine.docker("tag", name, ALONE)
    engine.docker("save", "-o", str(path), ALONE)
    engine.docker("rmi", name, ALONE)
    return path


def test_a_layer_of_a_running_container_is_not_exchanged(engine: Daemon, app: str) -> None:
    engine.docker("run", "-d", "--name", "runs", app, "sleep", "1000")
    try:
        spoil(parts(engine, app)["unpacked"])
        code, problems = check(engine, "--repair")
        assert code == 1 and "running container" in problems[0]["Outcome"] and "stop it" in problems[0]["Outcome"]
        assert engine.docker("exec", "runs", "echo", "on").stdout == "on\n"
    finally:
        engine.docker("rm", "-f", "runs")
    assert check(engine, "--repair")[0] == 0
    assert engine.docker("run", "--rm", app).stdout == "2"


def test_what_an_older_version_wrote_is_read(tmp_path: Path) -> None:
    engine = Daemon(tmp_path)
    engine.start()
    engine.import_base("base:1", 'CMD ["sh"]')
    engine.stop()
    with sqlite3.connect(engine.folder / "data/dolium.db") as database:  # as version 1 of the image tables was
        database.execute("DROP TABLE leases")
        database.execute("DROP TABLE artifacts")
        database.execute("UPDATE schema_versions SET version = 1 WHERE room = 'images'")
    database.close()
    engine.start()
    assert engine.docker("run", "--rm", "base:1", "echo", "old").stdout == "old\n"
    assert check(engine) == (0, [])
    assert engine.api("POST", "/dolium/leases?name=new", {})[0] == 201
    engine.close()


def test_names_and_strays(tmp_path: Path) -> None:
    engine = Daemon(tmp_path)
    engine.start()
    engine.stop()
    with sqlite3.connect(engine.folder / "data/dolium.db") as database:
        database.execute("INSERT INTO tags VALUES ('docker.io/library/lost:1', ?)", ("sha256:" + "0" * 64,))
    database.close()
    engine.start()
    (blob(engine, "sha256:" + "1" * 64)).write_bytes(b"x")
    code, problems = check(engine, "--repair")
    assert code == 0 and {(one["Kind"], one["Outcome"]) for one in problems} == {("name", "dropped"), ("blob", "removed: no image needs it")}
    assert check(engine) == (0, [])
    engine.close()


# Artifacts


def test_artifacts_and_referrers(engine: Daemon, registry: Registry, app: str, tmp_path: Path) -> None:
    (tmp_path / "sbom.json").write_text('{"a": 1}')
    (tmp_path / "notes.txt").write_text("notes")
    name = registry.reference("app:sbom")
    digest = engine.dolium("artifact", "add", "--type", "application/spdx+json", "--annotation", "by=tests", "--subject", app, name,
                           str(tmp_path / "sbom.json"), str(tmp_path / "notes.txt")).stdout.strip()
    assert digest in engine.dolium("artifact", "push", name).stdout
    subject = engine.inspect(app)["RepoDigests"][0].partition("@")[2]
    assert engine.dolium("manifest", "referrers", app).stdout.split()[-3:-1] == [digest, "application/spdx+json"]
    assert engine.dolium("manifest", "referrers", "--artifact-type", "x/y", app).stdout.count("\n") == 1
    found = json.loads(engine.dolium("manifest", "inspect", name).stdout)
    assert found["subject"]["digest"] == subject and found["annotations"] == {"by": "tests"}
    assert json.loads(engine.dolium("manifest", "inspect", "-v", app).stdout)["Descriptor"]["digest"] == subject
    done = engine.docker("pull", name, check=False)
    assert done.returncode == 1 and "not a container image" in done.stderr and "artifact pull" in done.stderr
    engine.dolium("artifact", "rm", name)
    assert not blob(engine, digest).exists()
    engine.dolium("artifact", "pull", name)
    engine.docker("image", "prune", "-f")  # which leaves artifacts alone
    rows = [json.loads(line) for line in engine.dolium("artifact", "ls", "--format", "json").stdout.splitlines()]
    assert [(row["Name"], row["Digest"], row["ArtifactType"]) for row in rows] == [(name, digest, "application/spdx+json")]
    assert sorted(engine.dolium("artifact", "extract", name, str(tmp_path / "out")).stdout.split()) == ["notes.txt", "sbom.json"]
    assert (tmp_path / "out/sbom.json").read_text() == '{"a": 1}'
    spoil(blob(engine, digest))
    assert {one["Kind"] for one in check(engine)[1]} == {"blob", "artifact"}
    code, problems = check(engine, "--repair")
    assert code == 0, problems
    assert check(engine) == (0, [])
    assert json.loads(engine.dolium("artifact", "inspect", name).stdout)["Manifest"] == found
    assert engine.dolium("artifact", "pull", app, check=False).returncode == 1  # that is an image
    engine.dolium("artifact", "rm", name)


def test_a_lease_keeps_what_nobody_names(tmp_path: Path, registry: Registry) -> None:
    engine, app = Daemon(tmp_path), registry.reference("app:1")
    engine.start()
    engine.docker("pull", app)
    digest = engine.inspect(app)["RepoDigests"][0].partition("@")[2]
    status, text = engine.api("POST", "/dolium/leases?name=mine", {"Blobs": [digest], "Labels": {"for": "tests"}})
    assert status == 201 and json.loads(text)["Labels"] == {"for": "tests"}
    assert engine.api("POST", "/dolium/leases?name=mine", {})[0] == 409
    assert engine.api("POST", "/dolium/leases?name=other", {"Blobs": ["sha256:" + "0" * 64]})[0] == 404
    assert engine.api("POST", "/dolium/leases?name=other", {"Blobs": ["../x"]})[0] == 400
    config = engine.inspect(app)["Id"]
    assert "for=tests" in engine.dolium("lease", "ls").stdout
    assert engine.dolium("lease", "create", "--seconds", "1000", "--label", "a=b", "second", digest).stdout == "second\n"
    assert engine.dolium("lease", "ls", "-q").stdout.split() == ["mine", "second"]
    assert engine.dolium("lease", "rm", "second", "third", check=False).returncode == 1
    engine.dolium("lease", "create", "--seconds", "1", "brief", config)
    engine.docker("rmi", app)

    def brief_has_gone() -> bool:
        engine.docker("image", "prune", "-f")
        return not blob(engine, config).exists()

    eventually(brief_has_gone, "what an expired lease kept is collected")
    assert blob(engine, digest).exists() and not blob(engine, config).exists()
    engine.stop()
    engine.start()
    assert blob(engine, digest).exists() and json.loads(engine.api("GET", "/dolium/leases")[1])[0]["Id"] == "mine"
    assert engine.api("DELETE", "/dolium/leases?name=mine")[0] == 204
    assert not blob(engine, digest).exists() and engine.api("DELETE", "/dolium/leases?name=mine")[0] == 404
    engine.close()


def test_what_a_killed_pull_brought_is_not_fetched_again(tmp_path: Path, registry: Registry) -> None:
    engine = Daemon(tmp_path)
    name = registry.reference("slow:1")
    registry.push("slow", "1", image([base_tar(), layer({"big": os.urandom(1 << 20)})]))
    engine.start(fault="pull.synced")
    engine.docker("pull", name, check=False)
    assert engine.wait() == -9
    engine.start()
    before = {path.name: path.stat().st_ino for path in (engine.folder / "data/content/blobs/sha256").iterdir()}
    assert engine.docker("image", "inspect", name, check=False).returncode == 1
    engine.docker("pull", name)
    after = {path.name: path.stat().st_ino for path in (engine.folder / "data/content/blobs/sha256").iterdir()}
    assert before == after and json.loads(engine.api("GET", "/dolium/leases")[1]) == []
    engine.docker("rmi", name)
    eventually(lambda: {path.name for path in (engine.folder / "data/content/blobs/sha256").iterdir()} < set(after), "its blobs go")
    engine.close()
