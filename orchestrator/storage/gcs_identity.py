"""Who this process is for Cloud Storage: google-auth's credentials, found and renewed one bounded try at a time.

In this order: what is asked for (nobody, or fsspec's `token` for gcs), the file that GOOGLE_APPLICATION_CREDENTIALS
names, gcloud's application default file, the metadata server. Never nobody because nothing was found: a metadata server
that does not answer yet, as in a pod that has just started, is waited for by whoever needs a token.

google-auth repeats requests by itself, up to 15 s under no deadline of ours. So what may pass leaves it at once, as an
exception that it does not know, and is tried again here or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import Any

import google.auth.transport.requests
import requests
from fsspec import config
from gcsfs.credentials import GoogleCredentials
from google.auth import aws, compute_engine, external_account_authorized_user, identity_pool, pluggable
from google.auth import impersonated_credentials as impersonated
from google.auth.exceptions import GoogleAuthError, TransportError
from google.auth.transport import Request, Response
from google.oauth2 import credentials as user
from google.oauth2 import gdch_credentials as gdch
from google.oauth2 import service_account

from orchestrator import environment
from orchestrator.storage.gcs_credentials import ANONYMOUS, Identity, NoToken, Token, is_absent
from orchestrator.storage.gcs_replies import TRANSIENT, line

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_TRY_S = 10.0  # for one try at a token, all its requests together
_UNSURE_S = 10.0  # so long a metadata server is waited for where nothing says that there is one
_NAMELESS_S = 1.0  # and so long if there is not even its name
_KEY = "GOOGLE_APPLICATION_CREDENTIALS"
_METADATA = "metadata.google.internal"
_GOOGLES_ENDPOINTS = ("", "https://oauth2.googleapis.com/token", "https://accounts.google.com/o/oauth2/token")
_AWS = "urn:ietf:params:aws:token-type:aws4_request"
_machine_credentials: Any = compute_engine.Credentials
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_SEE = "See Credentials in docs/gcs.md"
_ADVICE = f"look at {_KEY}, see Credentials in docs/gcs.md"


def find() -> Callable[[], Identity]:
    """What finds the identity, as often as it is called. It raises NoToken."""
    began = time.monotonic()

    def found() -> Identity:
        if environment.gcs_anonymous() or environment.gcs_emulated():
            return ANONYMOUS
        token = next(
            (config.conf[name]["token"] for name in ("gcs", "gs") if "token" in config.conf.get(name, {})), None
        )
        if token == "anon":
            return ANONYMOUS
        if token not in (None, "google_default", "cloud"):
            return _configured(token)
        if token != "cloud":
            for path, source in ((os.environ.get(_KEY), _KEY), (_gclouds_file(), "gcloud's own")):
                if path and (source == _KEY or os.path.isfile(path)):
                    return _from_file(path, source)
        return _machines(began)

    return found


def _gclouds_file() -> str:
    folder = os.environ.get("CLOUDSDK_CONFIG") or os.path.join(os.path.expanduser("~"), ".config", "gcloud")
    return os.path.join(folder, "application_default_credentials.json")


def _configured(token: Any) -> Identity:
    """What a program has given to fsspec's configuration: a file, a token, a dictionary or credentials."""
    where = "the token of fsspec's configuration for gcs"
    try:
        found = GoogleCredentials(None, "read_write", token).credentials
    except Exception as error:
        raise NoToken(f"{where} cannot be used: {_why(error)}", passing=False) from error
    return _identity(where, found)


def _from_file(path: str, source: str) -> Identity:
    where = f"{source} file {path}"
    try:
        info = json.loads(Path(path).read_bytes())
        kind = str(info.get("type")) if isinstance(info, dict) else ""
        if kind not in _KINDS:
            raise ValueError(f"type {kind!r}; expected {', '.join(_KINDS)}")
        found = _KINDS[kind](info)
    except Exception as error:  # the file may hold anything, and each library has errors of its own for it
        raise NoToken(f"{where} cannot be used: {_why(error)}; {_ADVICE}", passing=False) from error
    if quota := os.environ.get("GOOGLE_CLOUD_QUOTA_PROJECT"):
        found = found.with_quota_project(quota)
    # TensorStore knows two kinds of files, with Google's own endpoints, and bills nobody else.
    shared = kind in ("service_account", "authorized_user") and info.get("token_uri", "") in _GOOGLES_ENDPOINTS
    shared = shared and not found.quota_project_id and info.get("universe_domain", "googleapis.com") == "googleapis.com"
    return _identity(where, found, shared=shared)


def _external(info: Mapping[str, Any]) -> Any:
    kind: Any = identity_pool.Credentials
    if info.get("subject_token_type") == _AWS:
        kind = aws.Credentials
    elif "executable" in (info.get("credential_source") or {}):
        kind = pluggable.Credentials
    return kind.from_info(info, scopes=[_SCOPE])


def _service_account(info: Mapping[str, Any]) -> Any:
    kind: Any = service_account.Credentials
    return kind.from_service_account_info(info, scopes=[_SCOPE])


def _impersonated(info: Mapping[str, Any]) -> Any:
    kind: Any = impersonated.Credentials
    return kind.from_impersonated_service_account_info(info, scopes=[_SCOPE])


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "service_account": _service_account,
    "authorized_user": user.Credentials.from_authorized_user_info,  # its scopes were chosen when it was made
    "external_account": _external,
    "external_account_authorized_user": external_account_authorized_user.Credentials.from_info,
    "impersonated_service_account": _impersonated,
    "gdch_service_account": gdch.ServiceAccountCredentials.from_service_account_info,
}


def _machines(began: float) -> Identity:
    """The service account of the machine or pod."""
    nothing = f"no credentials: {_KEY} is not set, gcloud has none"
    options = f"{_ADVICE}; {environment.ANONYMOUS}=1 reads public buckets without any"
    if os.environ.get("NO_GCE_CHECK") == "true":
        raise NoToken(f"{nothing}, and NO_GCE_CHECK keeps from asking a metadata server; {options}", passing=False)
    root = os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_ROOT") or _METADATA
    identity = _identity(
        f"the machine's service account, metadata server {root}",
        _machine_credentials(scopes=[_SCOPE]),
        shared=root == os.environ.get("GCE_METADATA_ROOT", _METADATA),
    )
    answered = False

    def renew() -> Token:
        nonlocal answered
        try:
            token = identity.renew()
        except NoToken as error:
            if answered:
                raise
            if _on_google():  # the server answers for its own name, too: it is late
                raise NoToken(str(error), passing=error.passing) from error
            if time.monotonic() - began <= (_UNSURE_S if not error.absent else _NAMELESS_S):
                raise
            raise NoToken(f"{nothing}, no metadata server answers: {error}; {options}", passing=False) from error
        answered = True
        return token

    return Identity(identity.label, renew, identity.advice, identity.shared)


def _on_google() -> bool:
    """Whether anything says that there is a metadata server. A laptop shall not wait for it for minutes."""
    if any(os.environ.get(name) for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "KUBERNETES_SERVICE_HOST")):
        return True
    try:
        return _PRODUCT.read_text().startswith("Google")
    except OSError:
        return False


_ADVICES: tuple[tuple[type[Any], str], ...] = (
    (user.Credentials, "log in again: gcloud auth application-default login"),
    (compute_engine.Credentials, f"{_KEY} is not set: has the machine or pod a service account? {_SEE}"),
    (service_account.Credentials, f"is the key still valid, and the clock right? {_SEE}"),
)


def _identity(where: str, found: Any, *, shared: bool = False) -> Identity:
    """Of google-auth's `found`; None is nobody."""
    if found is None:
        return ANONYMOUS

    def label() -> str:
        account = getattr(found, "service_account_email", None) or getattr(found, "account", None) or ""
        return f"{account} ({where})" if account and account != "default" else where

    advice = next((text for kind, text in _ADVICES if isinstance(found, kind)), _ADVICE)

    def renew() -> Token:
        try:
            found.refresh(_Bounded(time.monotonic() + _TRY_S))
        except (GoogleAuthError, ValueError) as error:
            raise NoToken(_why(error), passing=bool(getattr(error, "retryable", False))) from error
        except OSError as error:  # a file with a token of another provider, which somebody may be replacing
            raise NoToken(_why(error), passing=error.errno != errno.ENOENT) from error
        headers: dict[str, str] = {}
        found.apply(headers)
        expiry = found.expiry
        return Token(headers, expiry.replace(tzinfo=UTC).timestamp() if expiry else float("inf"))

    return Identity(label, renew, advice, shared)


class _Bounded(Request):
    """HTTP for google-auth: all calls together end within a moment. What may pass is NoToken, which goes through it."""

    def __init__(self, end: float) -> None:
        self._end = end
        self.session = requests.Session()  # google-auth looks for it
        self._send = google.auth.transport.requests.Request(self.session)

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Response:
        host = url.partition("://")[2].partition("/")[0]
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise NoToken(f"{host}: no answer within {_TRY_S:g} s", passing=True)
        try:
            reply: Response = self._send(url, method, body, headers, min(left_s, timeout or left_s), **more)
        except TransportError as error:
            absent = any(map(is_absent, _causes(error)))
            raise NoToken(f"{host}: {_why(error)}", passing=True, absent=absent) from error
        if reply.status in TRANSIENT:
            raise NoToken(f"{host}: HTTP {reply.status}", passing=True)
        return reply


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _why(error: BaseException) -> str:
    """One line, without what libraries put around it. Never a token: those are in no error."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            text = "the name does not exist" if is_absent(cause) else "the name cannot be resolved yet"
            return f"{text} ({cause.strerror})"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{errno.errorcode.get(cause.errno or 0, 'error')} ({cause.strerror})"
    if isinstance(error, TransportError) and isinstance(error.__cause__, requests.Timeout):
        return "no answer in time"
    if isinstance(error, TransportError) and type(error.__cause__) is requests.ConnectionError:
        return "the connection ended without an answer"
    if error.args and isinstance(error.args[0], BaseException):
        return _why(error.args[0])
    text = str(error.args[0]) if error.args else ""
    return line(text if isinstance(error, GoogleAuthError) and text else f"{type(error).__name__}: {error}")
