"""Objects of a bucket, for and beside TensorStore: as whom they are read and written.

TensorStore has an identity of its own for Cloud Storage. It knows fewer kinds of credentials than google-auth, stays
anonymous for the process's lifetime if the metadata server does not answer its first question, and gives up at the
first 401. So it reads
buckets as plain objects over HTTP, with the token of this process's own client. It writes by itself, several times
faster than the client, where it surely finds the same identity; what is then rejected is written by the client after
all. At an emulator, and by gRPC where somebody has chosen that, it goes its own way.
"""

from __future__ import annotations

import os
import re
from typing import Any

import tensorstore as ts

from orchestrator import environment
from orchestrator.errors import StorageError, Unavailable
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_credentials import Token
from orchestrator.storage.gcs_http import client
from orchestrator.storage.gcs_replies import hint, line, parse_error
from orchestrator.storage.port import Exists

BACKEND = "TENSORSTORE_GCS_BACKEND"  # as Orbax knows it: gcs (the JSON API) or gcs_grpc
_URL = "TENSORSTORE_GCS_HTTP_URL"  # as TensorStore knows it
_TIMEOUT_S = 3600.0  # for one object; the save's own deadline is shorter and ends the wait before
_FAILURES = (ValueError, OSError, NotImplementedError)  # as which TensorStore's statuses arrive
_STATUS = re.compile(r"\[(?:HTTP code |http_response_code=')(\d{3})'?\]")
_BODY = re.compile(r"\s*\[http_response_body='(.*?)'\](?=\s*(?:\[|$))", re.DOTALL)


def files_spec(where: str) -> dict[str, Any]:
    """The objects below `gs://` URL `where`, which ends with a slash, to be read. Raises Unavailable."""
    token = stamp()
    if token is None:
        return _native_spec(where)
    headers = [f"{name}: {value}" for name, value in token.headers.items()]
    if payer := environment.gcs_user_project():
        headers = [header for header in headers if not header.lower().startswith("x-goog-user-project:")]
        headers.append(f"x-goog-user-project: {payer}")
    base = os.environ.get(_URL) or client().endpoint
    return {"driver": "http", "base_url": base, "path": where.removeprefix("gs://"), "headers": headers}


def _native_spec(where: str) -> dict[str, Any]:
    bucket, _, path = where.removeprefix("gs://").partition("/")
    return {"driver": os.environ.get(BACKEND, "gcs"), "bucket": bucket, "path": path}


def stamp() -> Token | None:
    """What buckets are read with, None where TensorStore goes its own way. What was opened with another one is to be
    opened again. Raises Unavailable."""
    if environment.gcs_emulated() or os.environ.get(BACKEND, "gcs") != "gcs":
        return None
    return client().token()


def described(error: Exception, operation: str = "read") -> str:
    """What TensorStore says of a request to a bucket, as one line for people. A token that was not accepted is given
    up, so that the next try has another one."""
    text = str(error)
    status, body = _STATUS.search(text), _BODY.search(text)
    if status is None:
        return line(text)
    if status[1] == "401" and (token := stamp()):
        client().credentials.reject(token)
    cause = parse_error(body[1].encode().replace(b"\\n", b"\n").replace(b'\\"', b'"')) if body else parse_error(b"")
    means = hint(operation, int(status[1]), cause) if int(status[1]) in (401, 403) else ""
    return f"{line(_BODY.sub('', text))} {cause.message}".rstrip() + "; " * bool(means) + means


_client_writes = False  # TensorStore's own credentials were rejected where the client's are accepted


def write(base: str, path: str, body: bytes, context: ts.Context) -> None:
    """A new object below `gs://` URL `base`, durable then. Raises StorageError."""
    global _client_writes
    ours, unknown = stamp(), False
    if ours is None or (client().credentials.shared and not _client_writes):
        try:
            store = _native(base.rstrip("/") + "/", context)
            store.write(path, body).result(timeout=_TIMEOUT_S)
            return
        except _FAILURES as error:
            status = _STATUS.search(str(error))
            unknown = status is not None and status[1] == "401"
            if ours is None or status is None or status[1] not in ("401", "403"):
                raise Unavailable(f"write {base}/{path}: {described(error, 'write')}", landed=True) from error
    if isinstance(GcsStorage(base).create(path, body), Exists):
        raise StorageError(f"write {base}/{path}: another writer was here; no object is written twice")
    _client_writes = _client_writes or unknown


def _native(where: str, context: ts.Context) -> Any:
    return ts.KvStore.open(_native_spec(where), context=context).result(timeout=_TIMEOUT_S)
