"""A server of tokens, as Google's metadata server and token endpoint are, for clients that must have credentials.

Imports only the standard library: google-auth reads its environment when it is imported.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Tokens:
    """Metadata server and token endpoint. `mode`: ok, a status, hang, reset or invalid_grant. Every token that it gives
    begins with `word`."""

    def __init__(self, folder: Path) -> None:
        """folder: where `impersonating` has put the certificate of the proxy."""
        tokens = self
        self.mode, self.word, self.expires, self.asked = "ok", "good", 3600.0, 0

        class Server(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def do_GET(self) -> None:
                if "recursive" in self.path and tokens.mode == "ok":
                    return self.answer(200, {"email": "pod@p.iam.gserviceaccount.com", "scopes": ["x"]})
                tokens.asked += 1
                if tokens.mode == "hang":
                    time.sleep(20)
                if tokens.mode in ("reset", "hang"):
                    self.close_connection = True
                    return None
                if tokens.mode == "invalid_grant":
                    return self.answer(400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."})
                if tokens.mode != "ok":
                    return self.answer(int(tokens.mode), {"error": "no"})
                source = "sts" if "/sts" in self.path else "other"
                token, end = f"{tokens.word}-{source}-{tokens.asked}-secret", time.gmtime(time.time() + tokens.expires)
                if "generateAccessToken" in self.path:
                    return self.answer(
                        200, {"accessToken": token, "expireTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", end)}
                    )
                return self.answer(200, {"access_token": token, "expires_in": tokens.expires, "token_type": "Bearer"})

            def log_message(self, *_: object) -> None:
                pass

        class Proxy(BaseHTTPRequestHandler):
            """Whatever it is asked to connect to, it is that itself."""

            def do_CONNECT(self) -> None:
                self.send_response(200)
                self.end_headers()
                tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
                with tls.wrap_socket(self.connection, server_side=True) as connection:
                    Server(connection, self.client_address, self.server)

            def log_message(self, *_: object) -> None:
                pass

        self.host, self.proxy = _serving(Server), f"http://{_serving(Proxy)}"


def _serving(handler: type[BaseHTTPRequestHandler]) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"127.0.0.1:{server.server_port}"


def service_account(host: str) -> dict[str, str]:
    """The content of a key file whose tokens come from the token server at `host`."""
    key = subprocess.run(["openssl", "genrsa", "2048"], check=True, capture_output=True, text=True, timeout=60).stdout
    return {
        **{"type": "service_account", "project_id": "p", "client_id": "1", "private_key_id": "1", "private_key": key},
        **{"client_email": "a@p.iam.gserviceaccount.com", "token_uri": f"http://{host}/token"},
    }
