"""A real registry for functional tests (Debian's docker-registry on a loopback port), and images made by hand for it.

    with Registry(tmp_path) as registry:
        registry.push("app", "1", image([layer({"etc/name": b"x"})]))
        registry.reference("app:1")
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

PROGRAM = shutil.which("docker-registry")
USER, PASSWORD = "tester", "secret"
_HTPASSWD = "tester:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"  # bcrypt, cost 5

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class ImageFiles:
    """An image as bytes: what has to be pushed, and the document that names it."""

    manifest: bytes
    media_type: str
    blobs: dict[str, bytes] = field(default_factory=dict)
    children: list[ImageFiles] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)


Entry = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]


def tar(entries: Iterable[Entry], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of exactly these headers, in this order, whatever they say."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for entry in entries:
            info, data = entry if isinstance(entry, tuple) else (entry, b"")
            if data:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if data else None)
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, mode: int | None = None, link: str = "", uid: int = 0,
          gid: int = 0, mtime: float = 1_000_000_000, pax: Mapping[str, str] | None = None,
          device: tuple[int, int] = (0, 0)) -> tarfile.TarInfo:
    """One header."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.uid, info.gid, info.mtime = kind, link, uid, gid, mtime
    info.mode = mode if mode is not None else 0o755 if kind == tarfile.DIRTYPE else 0o644
    info.pax_headers = dict(pax or {})
    info.devmajor, info.devminor = device
    return info


def layer(files: Mapping[str, bytes]) -> bytes:
    """A layer of plain files; a name that ends in / is a directory."""
    return tar(
        entry(name.rstrip("/"), tarfile.DIRTYPE) if name.endswith("/") else (entry(name), data)
        for name, data in files.items()
    )


def image(layers: Sequence[bytes], *, config: Mapping[str, object] | None = None, architecture: str = "amd64",
          compress: Callable[[bytes], bytes] = lambda data: gzip.compress(data, 1, mtime=0), suffix: str = "+gzip",
          media_type: str = MANIFEST, layer_type: str = LAYER, diff_ids: Sequence[str] | None = None) -> ImageFiles:
    """An image of uncompressed layer tars. ``diff_ids`` overrides the true ones."""
    document = {
        "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z", "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids or [digest_of(data) for data in layers])},
        "history": [{"created": "2024-01-02T03:04:05Z", "created_by": f"layer {i}"} for i in range(len(layers))],
    }
    config_data = json.dumps(document).encode()
    blobs = {digest_of(config_data): config_data}
    descriptors = []
    for data in layers:
        packed = compress(data)
        blobs[digest_of(packed)] = packed
        descriptors.append({"mediaType": layer_type + suffix, "digest": digest_of(packed), "size": len(packed)})
    manifest = {
        "schemaVersion": 2, "mediaType": media_type,
        "config": {"mediaType": CONFIG, "digest": digest_of(config_data), "size": len(config_data)},
        "layers": descriptors,
    }
    return ImageFiles(json.dumps(manifest).encode(), media_type, blobs)


def index(images: Mapping[str, ImageFiles]) -> ImageFiles:
    """An index; keys are platforms such as ``linux/arm64``."""
    entries = []
    for platform, child in images.items():
        os, architecture, *variant = platform.split("/")
        entries.append({
            "mediaType": child.media_type, "digest": child.digest, "size": len(child.manifest),
            "platform": {"os": os, "architecture": architecture, **({"variant": variant[0]} if variant else {})},
        })
    data = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
    return ImageFiles(data, INDEX, {}, list(images.values()))


class Registry:
    """docker-registry with its own directory; ended by its own process handle. ``auth`` asks for USER and PASSWORD."""

    def __init__(self, root: Path, *, auth: bool = False, tls: tuple[Path, Path] | None = None,
                 token: Mapping[str, object] | None = None, client_ca: Path | None = None, upstream: str = "") -> None:
        """``tls``: certificate and key; ``token``: distribution's token settings (realm, service, issuer,
        rootcertbundle); ``client_ca``: only clients with a certificate of it; ``upstream``: a pull-through cache of it."""
        self.root = root / "registry"
        self.auth = auth
        self.tls, self.token, self.client_ca, self.upstream = tls, token, client_ca, upstream
        self.address = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Registry:
        assert PROGRAM is not None, "docker-registry is not installed"
        self.root.mkdir(parents=True)
        settings: dict[str, object] = {
            "version": "0.1", "log": {"level": "info", "formatter": "json"},
            "storage": {"filesystem": {"rootdirectory": str(self.root / "data")}, "delete": {"enabled": True}},
            "http": {"addr": "127.0.0.1:0"},
        }
        if self.auth:
            (self.root / "htpasswd").write_text(_HTPASSWD + "\n")
            settings["auth"] = {"htpasswd": {"realm": "tests", "path": str(self.root / "htpasswd")}}
        if self.token:
            settings["auth"] = {"token": dict(self.token)}
        if self.tls:
            http: dict[str, object] = {"certificate": str(self.tls[0]), "key": str(self.tls[1])}
            if self.client_ca:
                http["clientcas"] = [str(self.client_ca)]
            settings["http"] = {"addr": "127.0.0.1:0", "tls": http}
        if self.upstream:
            settings["proxy"] = {"remoteurl": self.upstream}
        path = self.root / "config.yml"
        path.write_text(json.dumps(settings))  # JSON is YAML
        self._process = subprocess.Popen(
            [PROGRAM, "serve", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        seen = []
        for line in self._process.stderr:
            seen.append(line)
            if match := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
                self.address = match[1]
                break
        else:
            self.__exit__(None, None, None)
            raise AssertionError("docker-registry did not start: " + "".join(seen))
        # Nobody reads its log from here on: let it write to a pipe that is never full.
        self._drain = subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL)
        self._process.stderr.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if hasattr(self, "_drain"):
                self._drain.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def reference(self, name: str) -> str:
        return f"{self.address}/{name}"

    def push(self, repository: str, tag: str, files: ImageFiles) -> str:
        """Upload blobs, children and the manifest; returns the manifest's digest."""
        for digest, data in files.blobs.items():
            _, headers, _ = self._call("POST", f"/v2/{repository}/blobs/uploads/", b"", {}, 202)
            location = headers["Location"]
            path = re.sub(r"^https?://[^/]+", "", location) + ("&" if "?" in location else "?") + f"digest={digest}"
            self._call("PUT", path, data, {"Content-Type": "application/octet-stream"}, 201)
        for child in files.children:
            self.push(repository, child.digest, child)
        self._call("PUT", f"/v2/{repository}/manifests/{tag}", files.manifest, {"Content-Type": files.media_type}, 201)
        return files.digest

    def _call(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], expected: int
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        sent = dict(headers)
        if self.auth:
            sent["Authorization"] = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        connection = http.client.HTTPConnection(self.address)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == expected, (method, path, answer.status, data)
            return answer.status, answer.headers, data
        finally:
            connection.close()
