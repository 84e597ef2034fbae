"""The pull-through cache, ten pulls at once, and what works when no registry does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import pytest
from certificates import certificate
from daemon import DOLIUM, WARM, Daemon, base_tar
from registry import PASSWORD, USER, Registry, image, index, layer

pytestmark = pytest.mark.leaves("links", "nft")


class Counting:
    """In front of a registry: passes requests on, and counts them. ``gate``: blobs are held back until it is open."""

    def __init__(self, upstream: str) -> None:
        self.seen: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.seen[f"{self.command} {self.path}"] += 1
                if "/blobs/" in self.path:
                    outer.gate.wait(30)
                headers = {key: value for key, value in self.headers.items() if key in ("Accept", "Range")}
                request = urllib.request.Request(f"http://{upstream}{self.path}", headers=headers, method=self.command)
                try:
                    answer = urllib.request.urlopen(request)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    data = answer.read()
                    self.send_response(answer.status)
                    for key in ("Content-Type", "Docker-Content-Digest", "Content-Range"):
                        if value := answer.headers.get(key):
                            self.send_header(key, value)
                    self.send_header("Content-Length", answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def blobs(self) -> Counter[str]:
        return Counter({path: count for path, count in self.seen.items() if path.startswith("GET") and "/blobs/" in path})

    def __enter__(self) -> Counting:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Cache:
    """`dolium mirror` as a process."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [DOLIUM, "mirror", "--listen", "127.0.0.1:0", "--store", str(folder / "store"), "--etc-root", str(folder / "etc"), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "DOLIUM_WARM": WARM, "DOCKER_CONFIG": str(folder)})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"listening on (127\.0\.0\.1:\d+), process (\d+)", line)
        assert found, line
        self.address, self.pid = found[1], int(found[2])

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
        self.process.communicate(timeout=30)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as one:
        both = index({"linux/amd64": image([base_tar(), layer({"opt/": b"", "opt/second": os.urandom(2 << 20)})], config={"Cmd": ["echo", "mirrored"]}),
                      "linux/arm64": image([layer({"arm": b"64"})], architecture="arm64")})
        one.push("team/app", "1", both)
        one.push("other/app", "1", image([layer({"other": b"1"})]))
        yield one


def test_ten_pulls_fetch_each_blob_once(engine: Daemon, registry: Registry) -> None:
    with Counting(registry.address) as counting:
        name = f"{counting.address}/team/app:1"
        counting.gate.clear()
        with ThreadPoolExecutor(10) as pool:
            pulls = [pool.submit(engine.api, "POST", f"/images/create?fromImage={counting.address}/team/app&tag=1") for _ in range(10)]
            counting.gate.set()
            answers = [pull.result() for pull in pulls]
        assert all(status == 200 and b"Status: " in text and b"errorDetail" not in text for status, text in answers)
        assert len(counting.blobs()) == 3 and set(counting.blobs().values()) == {1}  # config and two layers
        assert engine.docker("run", "--rm", name).stdout == "mirrored\n"
    assert engine.docker("run", "--rm", name).stdout == "mirrored\n"  # nobody has to be asked
    assert engine.docker("pull", name, check=False).returncode == 1
    engine.docker("rmi", name)


def test_a_cache_fills_itself_and_works_offline(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    with Counting(registry.address) as counting, Cache(tmp_path, "--upstream", counting.address, "--fresh", "0") as cache:
        name = f"{cache.address}/team/app:1"
        counting.gate.clear()
        with ThreadPoolExecutor(4) as pool:
            urls = [f"http://{cache.address}/v2/team/app/manifests/1"] * 4
            manifests = list(pool.map(lambda url: urllib.request.urlopen(url).read(), urls))
            chosen = next(one for one in json.loads(manifests[0])["manifests"] if one["platform"]["architecture"] == "amd64")
            inner = json.loads(urllib.request.urlopen(f"http://{cache.address}/v2/team/app/manifests/{chosen['digest']}").read())
            url = f"http://{cache.address}/v2/team/app/blobs/{inner['layers'][1]['digest']}"
            blobs = [pool.submit(lambda: urllib.request.urlopen(url).read()) for _ in range(4)]
            counting.gate.set()
            assert {len(one.result()) for one in blobs} == {inner["layers"][1]["size"]}
        assert counting.blobs() == {f"GET /v2/team/app/blobs/{inner['layers'][1]['digest']}": 1}
        part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=5-9"}))
        assert part.status == 206 and len(part.read()) == 5
        engine.docker("pull", name)
        assert set(counting.blobs().values()) == {1}
        digest = engine.inspect(name)["RepoDigests"][0].partition("@")[2]
        engine.docker("rmi", name)
        skopeo = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"oci:{tmp_path}/copied:1"]
        subprocess.run(skopeo, check=True, timeout=60)
        assert _status(cache, "team/app/manifests/absent") == 404 and _status(cache, "other/app/blobs/sha256:" + "0" * 64) == 404
        assert _status(cache, f"other/app/blobs/{inner['layers'][0]['digest']}") == 404  # another repository's
        assert _status(cache, "team/app/blobs/uploads/", "POST") == 405
    with Cache(tmp_path, "--upstream", counting.address, "--fresh", "0") as cache:  # the registry has gone
        name = f"{cache.address}/team/app:1"
        answer = urllib.request.urlopen(f"http://{cache.address}/v2/team/app/manifests/1")
        assert answer.headers["Docker-Content-Digest"] == digest and "Warning" in answer.headers
        assert engine.docker("run", "--rm", name).stdout == "mirrored\n"
        assert _status(cache, "team/app/manifests/2") == 503
        engine.docker("rmi", name)


def _status(cache: Cache, path: str, method: str = "GET") -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{cache.address}/v2/{path}", method=method)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            assert json.loads(error.read())["errors"][0]["code"]
            return error.code


def test_images_fetched_beforehand_and_a_limit(registry: Registry, tmp_path: Path) -> None:
    with Counting(registry.address) as counting:
        name = f"{counting.address}/team/app:1"
        with Cache(tmp_path, "--upstream", counting.address, name, f"{counting.address}/absent:1") as cache:
            assert cache.line() == f"{name}: 5 blobs are here\n"  # of both platforms
            second = subprocess.run([DOLIUM, "mirror", "--listen", "127.0.0.1:0", "--store", str(tmp_path / "store")], check=False,
                                    capture_output=True, text=True, env={**os.environ, "DOLIUM_WARM": WARM})
            assert second.returncode == 1 and "another mirror" in second.stderr
        assert len(counting.blobs()) == 5
        with Cache(tmp_path / "b", "--platform", "linux/arm64", "--max-size", "1m", name) as cache:
            assert cache.line() == f"{name}: 2 blobs are here\n"
        with Cache(tmp_path / "c", "--upstream", counting.address, "--max-size", "1m", name) as cache:
            assert cache.line() == f"{name}: 5 blobs are here\n"  # they were; the large one made room at once
            kept = sum(path.stat().st_size for path in (tmp_path / "c/store/content/blobs/sha256").iterdir())
            assert kept <= 3 << 20
    with Cache(tmp_path, "--upstream", counting.address, "--fresh", "0", name) as cache:  # it has gone: what is there will do
        assert cache.line() == f"{name}: 5 blobs are here\n"
        assert _status(cache, "team/app/manifests/1") == 200


def test_an_upstream_that_is_no_registry_is_refused_at_the_start(tmp_path: Path) -> None:
    done = subprocess.run([DOLIUM, "mirror", "--store", str(tmp_path / "store"), "--listen", "127.0.0.1:0", "--upstream", "http://x/y"],
                          capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "DOLIUM_WARM": WARM})
    assert (done.returncode, done.stderr) == (
        1, "dolium: mirror: invalid --upstream: 'http://x/y' (a registry as names have it: HOST or HOST:PORT)\n")
    assert not (tmp_path / "store").exists()


def test_a_cache_with_tls_in_front_of_a_registry_with_a_password(engine: Daemon, tmp_path: Path) -> None:
    """It logs in with its own credentials, and only who has its certificate talks to it."""
    authority = certificate(tmp_path / "ca", "ca")
    crt, key = certificate(tmp_path / "server", "server", authority=authority)
    with Registry(tmp_path, auth=True) as private:
        private.push("app", "1", image([base_tar()], config={"Cmd": ["echo", "behind a password"]}))
        (tmp_path / "config.json").write_text(json.dumps({"auths": {private.address: {
            "auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}}}))
        with Cache(tmp_path, "--upstream", private.address, "--tls-cert", str(crt), "--tls-key", str(key)) as cache:
            name = f"{cache.address}/app:1"
            assert engine.docker("pull", name, check=False).returncode == 1
            folder = engine.folder / "etc/docker/certs.d" / cache.address
            folder.mkdir(parents=True)
            (folder / "ca.crt").write_bytes(authority[0].read_bytes())
            assert engine.docker("run", "--rm", name).stdout == "behind a password\n"
            engine.docker("rmi", name)
        with Cache(tmp_path / "other", "--upstream", private.address) as cache:
            assert _status(cache, "app/manifests/1") == 403


def test_what_a_power_cut_tore_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    with Counting(registry.address) as counting:
        name = f"{counting.address}/team/app:1"
        with Cache(tmp_path, "--upstream", counting.address, name) as cache:
            assert "5 blobs" in cache.line()
            os.kill(cache.pid, signal.SIGKILL)
            cache.process.wait()
        large = max((tmp_path / "store/content/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
        large.write_bytes(b"\0" * large.stat().st_size)
        (tmp_path / "store/running").write_text("another boot\n")
        with Cache(tmp_path, "--upstream", counting.address) as cache:
            assert not large.exists()
            url = f"http://{cache.address}/v2/team/app/blobs/sha256:{large.name}"
            assert hashlib.sha256(urllib.request.urlopen(url).read()).hexdigest() == large.name
        assert not (tmp_path / "store/running").exists()
        assert counting.blobs()[f"GET /v2/team/app/blobs/sha256:{large.name}"] == 2


def test_the_daemon_uses_a_mirror_of_its_settings(engine: Daemon, registry: Registry, tmp_path: Path) -> None:
    """registries.conf names the cache for a registry that cannot be reached itself."""
    conf = engine.folder / "etc/containers/registries.conf"
    conf.parent.mkdir(parents=True, exist_ok=True)
    with Cache(tmp_path, "--upstream", registry.address) as cache:
        conf.write_text(f'[[registry]]\nlocation = "127.0.0.1:1"\n[[registry.mirror]]\nlocation = "{cache.address}"\n')
        try:
            assert engine.docker("run", "--rm", "127.0.0.1:1/team/app:1").stdout == "mirrored\n"
            conf.write_text("[[registry]]\n")
            assert "neither prefix nor location" in engine.docker("pull", "127.0.0.1:1/team/app:1", check=False).stderr
            assert "neither prefix nor location" in engine.docker("info").stderr
        finally:
            conf.unlink()
        daemon_json = engine.folder / "etc/docker/daemon.json"
        daemon_json.parent.mkdir(exist_ok=True)
        daemon_json.write_text(json.dumps({"registry-mirrors": [f"http://{cache.address}"], "insecure-registries": ["10.0.0.0/8"]}))
        try:
            info = json.loads(engine.docker("info", "--format", "json").stdout)["RegistryConfig"]
            assert info["Mirrors"] == [f"http://{cache.address}/"] and "10.0.0.0/8" in info["InsecureRegistryCIDRs"]
            registry.push("library/hub", "1", image([base_tar()], config={"Cmd": ["echo", "hub"]}))
            assert engine.docker("run", "--rm", "hub:1").stdout == "hub\n"  # docker.io's, from the mirror
            engine.docker("rmi", "hub:1")
        finally:
            daemon_json.unlink()
    engine.docker("rmi", "127.0.0.1:1/team/app:1")
