"""Push: by the docker command line and dolium's own, judged by skopeo and the registry itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import TokenServer, certificate
from daemon import Daemon
from registry import PASSWORD, USER, Registry, image, layer

pytestmark = pytest.mark.leaves("links", "nft")
HERE, THERE = layer({"a/": b"", "a/one": b"1"}), layer({"a/two": b"2"})


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        yield one


def skopeo(*words: str) -> str:
    return subprocess.run(["skopeo", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def digest_at(name: str) -> str:
    """What the registry says a name is."""
    return str(json.loads(skopeo("inspect", "--tls-verify=false", "--no-tags", f"docker://{name}"))["Digest"])


def pushed(text: str) -> str:
    found = re.search(r"digest: (sha256:[0-9a-f]{64}) size: \d+", text)
    assert found, text
    return found[1]


def test_what_is_pushed_others_can_read(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    name, other = registry.reference("pushed:1"), registry.reference("elsewhere/pushed:2")
    engine.docker("tag", "base:1", name)
    done = engine.docker("push", name)
    assert "The push refers to repository" in done.stdout and "Pushed" in done.stdout
    digest = pushed(done.stdout)
    assert digest_at(name) == digest
    assert [digest] == [one.partition("@")[2] for one in engine.inspect(name)["RepoDigests"]]
    skopeo("copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"oci:{tmp_path}/layout:1")  # checks every digest
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/layout:1", f"{tmp_path}/bundle"], check=True,
                   capture_output=True, timeout=60)
    assert (tmp_path / "bundle/rootfs/data/seed").read_text() == "seed\n"
    again = engine.docker("push", name)
    assert "Layer already exists" in again.stdout and pushed(again.stdout) == digest
    engine.docker("tag", name, other)
    mounted = engine.docker("push", other)
    assert "Mounted from pushed" in mounted.stdout and digest_at(other) == digest
    engine.docker("rmi", name, other)
    assert engine.docker("run", "--rm", other, "cat", "/data/seed").stdout == "seed\n"
    engine.docker("rmi", other)


def buildah(folder: Path, *words: str) -> str:
    done = subprocess.run(["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "vfs", *words],
                          check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_buildah_reads_ours_and_we_run_what_it_makes(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    name, made = registry.reference("for-buildah:1"), registry.reference("by-buildah:1")
    engine.docker("tag", "base:1", name)
    engine.docker("push", "-q", name)
    box = buildah(tmp_path, "from", "--tls-verify=false", name)
    (tmp_path / "added").write_text("by buildah\n")
    buildah(tmp_path, "copy", box, str(tmp_path / "added"), "/added")
    buildah(tmp_path, "config", "--cmd", "cat /added", "--env", "A=1", box)
    buildah(tmp_path, "commit", "-q", box, made)
    buildah(tmp_path, "push", "-q", "--tls-verify=false", made)
    assert engine.docker("run", "--rm", made).stdout == "by buildah\n"
    engine.docker("push", made)  # its own manifest and bytes, unchanged
    assert digest_at(made) == engine.inspect(made)["RepoDigests"][0].partition("@")[2]
    engine.docker("rmi", name, made)


def test_a_pulled_image_keeps_its_digest(engine: Daemon, registry: Registry) -> None:
    files = image([HERE, THERE], config={"Cmd": ["x"]})
    digest = registry.push("kept", "1", files)
    name, copy = registry.reference("kept:1"), registry.reference("copied/kept")
    engine.dolium("pull", name)
    engine.dolium("tag", name, f"{copy}:a")
    engine.dolium("tag", name, f"{copy}:b")
    done = engine.dolium("push", "-a", copy)
    assert done.stdout.count(digest) == 2 and digest_at(f"{copy}:a") == digest_at(f"{copy}:b") == digest
    assert engine.dolium("push", "-q", f"{copy}:a").stdout == f"{copy}:a\n"
    engine.docker("rmi", f"{copy}:a", f"{copy}:b")
    engine.docker("pull", "-aq", copy)
    engine.dolium("pull", "-a", copy)
    assert len(engine.docker("images", copy).stdout.splitlines()) == 3
    by_digest = registry.reference("third/kept")
    engine.dolium("tag", name, f"{by_digest}:x")
    assert engine.dolium("push", f"{by_digest}@{digest}", check=False).returncode == 1
    engine.dolium("push", f"{by_digest}:x")
    engine.dolium("push", f"{by_digest}@{digest}")  # the name is known since the push by tag
    engine.docker("rmi", "-f", engine.inspect(name)["Id"])


def test_a_large_layer_goes_in_chunks(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    name = registry.reference("large:1")
    root = tmp_path / "large.tar"
    root.write_bytes(layer({"big": os.urandom(35 << 20)}))
    engine.dolium("import", str(root), name)
    done = engine.dolium("push", name)
    skopeo("copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"dir:{tmp_path}/dir")
    assert pushed(done.stdout) == digest_at(name)
    engine.dolium("rmi", name)


def test_what_cannot_be_pushed_is_told(engine: Daemon, registry: Registry) -> None:
    done = engine.docker("push", registry.reference("absent:1"), check=False)
    assert done.returncode == 1 and "does not exist locally with the tag" in done.stderr
    engine.docker("tag", "base:1", "127.0.0.1:1/x:1")
    done = engine.docker("push", "127.0.0.1:1/x:1", check=False)
    assert done.returncode == 1 and "127.0.0.1:1" in done.stderr
    engine.docker("rmi", "127.0.0.1:1/x:1")


def test_login_with_a_password(engine: Daemon, tmp_path: Path) -> None:
    config = engine.folder / "docker-config/config.json"
    with Registry(tmp_path, auth=True) as private:
        name = private.reference("app:1")
        engine.docker("tag", "base:1", name)
        for call in (engine.docker, engine.dolium):
            done = call("push", name, check=False)
            assert done.returncode == 1 and "no basic auth credentials" in done.stderr
            done = call("login", "-u", USER, "--password-stdin", private.address, input="wrong", check=False)
            assert done.returncode == 1 and not (config.exists() and json.loads(config.read_text()).get("auths"))
            done = call("login", "-u", USER, "--password-stdin", private.address, input=PASSWORD)
            assert "Login Succeeded" in done.stdout
            assert list(json.loads(config.read_text())["auths"]) == [private.address]
            assert config.stat().st_mode & 0o77 == 0
            call("push", name)
            call("rmi", name)
            call("pull", name)
            assert "Login Succeeded" in call("login", private.address).stdout  # with what is known
            call("logout", private.address)
            assert call("pull", name, check=False).returncode == 1
            assert not json.loads(config.read_text()).get("auths")
        engine.dolium("rmi", name)


def test_a_credential_helper_keeps_the_password(engine: Daemon, tmp_path: Path) -> None:
    config = engine.folder / "docker-config/config.json"
    kept = tmp_path / "kept"
    helper = tmp_path / "docker-credential-tests"
    helper.write_text(f"""#!/bin/sh
case $1 in
store) cat > {kept};;
get) [ -e {kept} ] || {{ echo "credentials not found in native keychain"; exit 1; }}; cat {kept};;
erase) rm -f {kept};;
esac
""")
    helper.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Registry(tmp_path, auth=True) as private:
        name = private.reference("app:1")
        config.parent.mkdir(exist_ok=True)
        config.write_text(json.dumps({"credHelpers": {private.address: "tests"}, "psFormat": "kept"}))
        engine.docker("tag", "base:1", name)
        assert "no basic auth" in engine.dolium("push", name, check=False, env={"PATH": path}).stderr
        engine.dolium("login", "-u", USER, "-p", PASSWORD, private.address, env={"PATH": path})
        assert json.loads(kept.read_text())["Secret"] == PASSWORD and PASSWORD not in config.read_text()
        engine.dolium("push", name, env={"PATH": path})
        engine.docker("push", name, env={"PATH": path})  # what dolium stored docker finds
        engine.dolium("logout", private.address, env={"PATH": path})
        assert not kept.exists() and json.loads(config.read_text())["psFormat"] == "kept"
        engine.docker("rmi", name)
    config.unlink()


def test_certificates_of_certs_d(engine: Daemon, tmp_path: Path) -> None:
    authority = certificate(tmp_path / "ca", "ca")
    server = certificate(tmp_path / "server", "server", authority=authority)
    client = certificate(tmp_path / "client", "client", authority=authority)
    with Registry(tmp_path, tls=server, client_ca=authority[0]) as secure:
        name = secure.reference("app:1")
        engine.docker("tag", "base:1", name)
        assert "certificate" in engine.docker("push", name, check=False).stderr
        folder = engine.folder / "etc/docker/certs.d" / secure.address
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(authority[0].read_bytes())
        assert engine.docker("push", name, check=False).returncode == 1  # it wants to know us, too
        (folder / "client.cert").write_bytes(client[0].read_bytes())
        assert "needs a .key" in engine.docker("push", name, check=False).stderr
        (folder / "client.key").write_bytes(client[1].read_bytes())
        engine.docker("push", name)
        engine.docker("rmi", name)
        engine.docker("pull", name)
        other = engine.folder / "etc/containers/certs.d" / secure.address
        other.parent.mkdir(parents=True)
        folder.rename(other)
        engine.docker("push", name)
        engine.docker("rmi", name)


def test_a_token_server(engine: Daemon, tmp_path: Path) -> None:
    users = {"reader": "r", "writer": "w"}
    with TokenServer(tmp_path / "tokens", users, {"reader": {"pull"}, "writer": {"pull", "push"}}, life=1) as tokens, \
            Registry(tmp_path, token=tokens.settings()) as registry:
        name = registry.reference("team/app:1")
        engine.docker("tag", "base:1", name)
        assert "denied" in engine.docker("push", name, check=False).stderr
        assert engine.docker("login", "-u", "reader", "-p", "wrong", registry.address, check=False).returncode == 1
        engine.docker("login", "-u", "reader", "-p", "r", registry.address)
        assert "denied" in engine.docker("push", name, check=False).stderr
        engine.dolium("login", "-u", "writer", "-p", "w", registry.address)
        config = json.loads((engine.folder / "docker-config/config.json").read_text())
        assert config["auths"][registry.address]["identitytoken"] in tokens.identities
        tokens.log.clear()
        engine.dolium("push", name)  # the token lives for a second: it is fetched again when it is over
        assert {one["method"][0] for one in tokens.log} == {"POST"}
        assert tokens.log[0]["scope"] == ["repository:team/app:pull,push"]
        engine.docker("tag", "base:1", registry.reference("team/other:1"))
        tokens.log.clear()
        assert "Mounted from team/app" in engine.docker("push", registry.reference("team/other:1")).stdout
        assert "repository:team/app:pull" in tokens.log[0]["scope"][0]
        engine.docker("rmi", name, registry.reference("team/other:1"))
        assert "Digest: sha256:" in engine.docker("pull", name).stdout
        engine.docker("logout", registry.address)
        engine.docker("rmi", name)
