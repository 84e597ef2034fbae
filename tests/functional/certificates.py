"""Certificates and a token server for registries of tests."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID


def certificate(folder: Path, name: str, *, authority: tuple[Path, Path] | None = None) -> tuple[Path, Path]:
    """NAME.crt and NAME.key: an authority of its own, or signed by one, for 127.0.0.1 and clients."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    issuer, signer = subject, key
    if authority is not None:
        issuer = x509.load_pem_x509_certificate(authority[0].read_bytes()).subject
        loaded = serialization.load_pem_private_key(authority[1].read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
    made = (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            .sign(signer, hashes.SHA256()))
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
                                           serialization.NoEncryption()))
    return paths


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenServer:
    """Distribution's token protocol on loopback: users and what each may do; ``log`` has each request's query or form.

    ``access``: user to actions; "" is everybody. Identity tokens are given to who asks for offline_token.
    """

    def __init__(self, folder: Path, users: dict[str, str], access: dict[str, set[str]], *, life: int = 60) -> None:
        self.users, self.access, self.life = users, access, life
        self.log: list[dict[str, list[str]]] = []
        self.identities: dict[str, str] = {}
        self.pem, key = certificate(folder, "issuer")
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                words = parse_qs(urlsplit(self.path).query)
                outer.log.append({"method": ["GET"], **words})
                user = ""
                if header := self.headers.get("Authorization"):
                    user, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
                    if outer.users.get(user) != password:
                        self.answer(401, {"details": "incorrect username or password"})
                        return
                self.give(user, words.get("scope", []), words.get("offline_token") == ["true"])

            def do_POST(self) -> None:
                words = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                outer.log.append({"method": ["POST"], **words})
                user = outer.identities.get(words.get("refresh_token", [""])[0])
                if user is None:
                    self.answer(401, {"details": "unknown refresh token"})
                else:
                    self.give(user, words.get("scope", [""])[0].split(" "), False)

            def give(self, user: str, scopes: list[str], offline: bool) -> None:
                value: dict[str, object] = {"token": outer.token(user, scopes), "expires_in": outer.life}
                if offline:
                    identity = secrets.token_hex(8)
                    outer.identities[identity] = user
                    value["refresh_token"] = identity
                self.answer(200, value)

            def answer(self, status: int, value: object) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def settings(self) -> dict[str, object]:
        """For the registry's configuration."""
        return {"realm": f"http://127.0.0.1:{self._server.server_address[1]}/token", "service": "tests", "issuer": "tests",
                "rootcertbundle": str(self.pem)}

    def token(self, user: str, scopes: list[str]) -> str:
        allowed = self.access.get(user, set()) | self.access.get("", set())
        access = []
        for scope in filter(None, scopes):
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": [one for one in actions.split(",") if one in allowed]})
        der = x509.load_pem_x509_certificate(self.pem.read_bytes()).public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        claims = {"iss": "tests", "sub": user, "aud": "tests", "exp": now + self.life, "nbf": now - 10, "iat": now,
                  "jti": secrets.token_hex(8), "access": access}
        signed = f"{_b64(json.dumps(header).encode())}.{_b64(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def __enter__(self) -> TokenServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
