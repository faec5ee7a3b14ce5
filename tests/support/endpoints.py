"""Servers that are not what a client hopes for, on loopback: silent, with a certificate that nobody has signed, a proxy
that wants a password, a token server that gives no token. And credentials that are no use."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import threading
from pathlib import Path

_WELL_KNOWN = "https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/a@p.iam.gserviceaccount.com"


class Endpoints:
    """All of them, on a thread, until `close`. `names`: what each is called -> its URL, or the path of a file."""

    def __init__(self, folder: Path) -> None:
        self.names: dict[str, str] = {}
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoints", daemon=True)
        self._thread.start()
        _openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem")
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        self._write_credentials()

    async def _listen(self) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self._folder / "cert.pem", self._folder / "key.pem")
        for name, answer, context in (
            ("silent", b"", None),
            ("selfsigned", _answer(200, b"{}"), tls),
            ("proxy", _answer(407, b"who are you", 'Proxy-Authenticate: Basic realm="x"'), None),
            ("login", _answer(200, b"<html>Please log in.</html>", "Content-Type: text/html"), None),
            ("revoked", _answer(400, b'{"error": "invalid_grant", "error_description": "revoked"}'), None),
        ):
            server = await asyncio.start_server(_serving(answer), "127.0.0.1", 0, ssl=context)
            port = server.sockets[0].getsockname()[1]
            self.names[name] = f"{'https' if context else 'http'}://127.0.0.1:{port}"
        self.names["rejecting"] = "http://127.0.0.1:1"
        self.names["unknown"] = "http://store.invalid"

    def _write_credentials(self) -> None:
        key = (self._folder / "key.pem").read_text()
        account = {
            "type": "service_account",
            "project_id": "p",
            "client_email": "a@p.iam.gserviceaccount.com",
            "client_id": "1",
            "private_key_id": "1",
            "token_uri": f"{self.names['revoked']}/token",
        }
        token = str(self._folder / "token")
        Path(token).write_text("a token of another identity provider")
        user = {"type": "authorized_user", "client_id": "1", "client_secret": "2", "refresh_token": "3"}
        for name, content in {
            "garbage": "hello",
            "no_object": "[]",
            "broken_key": json.dumps({**account, "private_key": "no key"}),
            "revoked_key": json.dumps({**account, "private_key": key}),
            "revoked_user": json.dumps({**user, "token_uri": f"{self.names['revoked']}/token"}),
            "external": json.dumps(
                {
                    "type": "external_account",
                    "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/x",
                    "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
                    "token_url": f"{self.names['revoked']}/sts",
                    "credential_source": {"file": token},
                }
            ),
            "impersonated": json.dumps(
                {
                    "type": "impersonated_service_account",
                    "service_account_impersonation_url": f"{_WELL_KNOWN}:generateAccessToken",
                    "delegates": [],
                    "source_credentials": user,
                }
            ),
        }.items():
            path = self._folder / f"{name}.json"
            path.write_text(content)
            self.names[name] = str(path)
        self.names["missing"] = str(self._folder / "missing.json")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def _answer(status: int, body: bytes, header: str = "X-Is: loopback") -> bytes:
    return f"HTTP/1.1 {status} X\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _serving(answer: bytes):  # type: ignore[no-untyped-def]
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                if line == b"\r\n" and answer:  # bodies of requests are short: they are read as lines, too
                    writer.write(answer)
                    await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    return serve


def _openssl(folder: Path, *arguments: str) -> None:
    more = ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *arguments, *more], cwd=folder, check=True, capture_output=True, timeout=60)
