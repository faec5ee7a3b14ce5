"""What the answers of Cloud Storage mean: which may pass, how long to wait, and one line for people. Pure.

A server may answer with anything: a page of HTML, a traceback, a megabyte. Whatever is quoted of it is one short line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from orchestrator.environment import USER_PROJECT
from orchestrator.errors import StorageError, Unavailable

LINE_MAX = 300  # characters quoted of what a server says
_READ_MAX = 100_000  # bytes looked at for it
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
REJECTED_FOR_SURE = frozenset({401, 403, 408, 429})  # and certainly not carried out
_RATE = re.compile(r"rateLimitExceeded|userRateLimitExceeded|RATE_LIMIT_EXCEEDED|quotaExceeded.*per (?:minute|100)")
_CHECKSUM = re.compile(r"crc32c|md5|checksum|hash", re.IGNORECASE)
_CONDITION = re.compile(r"conditionNotMet|pre-?condition", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """An answer that is final. `repeated`: an earlier try got none, and may have been carried out."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    repeated: bool = False


@dataclass(frozen=True)
class ErrorBody:
    """What the service gives as the cause. `reason`: its word for it, '' if it has none; `message`: one short line."""

    reason: str
    message: str

    @property
    def text(self) -> str:
        return f"{self.reason} {self.message}"


def line(text: str, most: int = LINE_MAX) -> str:
    """`text` in one line of at most `most` characters. Of a traceback, what it ends with."""
    if "Traceback (most recent call last)" in text:
        text = text.strip().rsplit("\n", 1)[-1]
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def parse_error(body: bytes) -> ErrorBody:
    """From a body of JSON (the service's own, or OAuth's), XML or anything."""
    text = body[:_READ_MAX].decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        if isinstance(error, str):  # OAuth's
            return ErrorBody(line(error, 60), line(str(json.loads(text).get("error_description", error))))
        reasons = [str(one.get("reason", "")) for one in (*error.get("errors", ()), *error.get("details", ()))]
        return ErrorBody(line(" ".join(filter(None, reasons)), 60), line(str(error["message"])))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    if cut := re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)', text):  # JSON of which somebody has kept the beginning
        reason = re.search(r'"reason"\s*:\s*"(\w+)"', text)
        return ErrorBody(reason[1] if reason else "", line(cut[1]))
    code, message = (re.search(rf"(?is)<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message"))
    if code and message:
        details = re.search(r"(?is)<Details>(.*?)</Details>", text)
        return ErrorBody(line(code[1], 60), line(f"{message[1]} {details[1] if details else ''}"))
    if title := re.search(r"(?is)<title>(.*?)</title>", text):
        return ErrorBody("", line(title[1]))
    return ErrorBody("", line(re.sub(r"(?s)<[^>]*>", " ", text)))


def may_pass(reply: Reply) -> bool:
    """Whether the same request can have another answer a moment later."""
    return reply.status in TRANSIENT or (reply.status == 403 and bool(_RATE.search(parse_error(reply.body).text)))


def is_checksum(reply: Reply) -> bool:
    """Whether an upload was rejected as what arrived is not what its checksum says. Servers say so with 400 or 412."""
    text = parse_error(reply.body).text
    return reply.status in (400, 412) and bool(_CHECKSUM.search(text)) and not _CONDITION.search(text)


def retry_after_s(headers: Mapping[str, str], now: float) -> float:
    """For how long the server asks to be left alone, 0 if it does not. `now`: in seconds since 1970, for dates of
    servers that do not tell their own time."""
    named = {name.lower(): value for name, value in headers.items()}
    after = named.get("retry-after", "").strip()
    if after.isdecimal():
        return float(after)
    until = _time(after)
    if until is None:
        return 0.0
    there = _time(named.get("date", ""))
    return max(0.0, until - (now if there is None else there))


def _time(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


# Permission -> the least predefined role that has it.
_ROLES = {
    "storage.objects.get": "roles/storage.objectViewer",
    "storage.objects.list": "roles/storage.objectViewer",
    "storage.objects.create": "roles/storage.objectCreator",
    "storage.objects.delete": "roles/storage.objectUser",
    "storage.objects.update": "roles/storage.objectUser",
    "storage.buckets.get": "roles/storage.bucketViewer",
    "serviceusage.services.use": "roles/serviceusage.serviceUsageConsumer",
}
_ROLE_OF_OPERATION = {
    **dict.fromkeys(("get", "stat", "list", "read"), "roles/storage.objectViewer"),
    **dict.fromkeys(("create", "write"), "roles/storage.objectCreator"),
    "delete": "roles/storage.objectUser",
}
# Statuses, what is found in reason and message, what it means and what to do. The first that fits.
_HINTS: tuple[tuple[tuple[int, ...], str, str], ...] = (
    (
        (403, 409, 412),
        r"under active|objectUnderActiveHold|\bhold\b",
        "the object is under a hold: deleting and overwriting it are rejected until somebody releases the hold",
    ),
    (
        (403, 409, 412),
        r"retention ?policy|retentionPolicyNotMet|retention expiration|retained until",
        "the bucket's retention policy rejects deleting and overwriting until then; deleting is tried again later",
    ),
    (
        (400, 403),
        r"requester ?pays|user project (?:specified|provided)|userProjectMissing",
        f"the bucket bills whoever asks: set {USER_PROJECT}=PROJECT, the project that pays",
    ),
    (
        (403,),
        r"userProjectAccessDenied|USER_PROJECT_DENIED|serviceusage\.services\.use",
        f"the account may not bill the project of {USER_PROJECT} or of its own quota: it lacks {{role}} there",
    ),
    (
        (401, 403),
        r"accountDisabled|billing|UserProjectAccountProblem",
        "the project of the bucket, or of the account, is disabled or has no billing: enable it in Google Cloud",
    ),
    (
        (403,),
        r"SCOPE_INSUFFICIENT|insufficient(?: authentication)? scope|scope\(s\)",
        "the machine's access scopes lack devstorage.read_write; roles do not help: start it with that scope",
    ),
    (
        (403,),
        r"vpcServiceControls|VPC_SERVICE|organization's policy",
        "VPC Service Controls reject it: ask who administers the perimeter",
    ),
    (
        (400, 403),
        r"cloudkms|KMS key",
        "the bucket's encryption key: is it enabled, and may Cloud Storage's service agent use it?",
    ),
    ((403,), r"", "the credential lacks a role on the bucket, see docs/gcs.md: {role}"),
    ((401,), r"", "the credentials are not accepted"),
    ((407,), r"", "the proxy on the way asks for a password: see http_proxy and https_proxy"),
    ((404,), r"", "check the bucket's name"),
    ((412,), r"", "a condition that was not asked for: is there a proxy or another server in between?"),
)


def hint(operation: str, status: int, cause: ErrorBody) -> str:
    """What it means and what to do; '' for what has no explanation."""
    for statuses, pattern, text in _HINTS:
        if status in statuses and re.search(pattern, cause.text, re.IGNORECASE):
            return text.format(role=_role(operation, cause))
    return ""


def _role(operation: str, cause: ErrorBody) -> str:
    for found in re.finditer(r"[a-z]+\.[a-zA-Z]+\.[a-z]+", cause.message):
        if found[0] in _ROLES:
            return f"{_ROLES[found[0]]} has {found[0]}"
    return _ROLE_OF_OPERATION.get(operation, "roles/storage.objectUser")


def rejection(operation: str, name: str, reply: Reply, who: str = "") -> StorageError:
    """The error for a final answer that is not the one expected. `who`: whose credentials were used."""
    cause = parse_error(reply.body)
    means = hint(operation, reply.status, cause)
    if who and of_credentials(operation, reply):
        means = f"{means} ({who})"
    kind = Unavailable if reply.status in (401, 403, 407) else StorageError
    return kind(f"{operation} {name}: HTTP {reply.status} {cause.message}{'; ' * bool(means)}{means}")


def of_credentials(operation: str, reply: Reply) -> bool:
    """Whether it rejects who asks: another would be answered. Not of a hold, for one: that is nobody's."""
    lacking = reply.status == 403 and "lack" in hint(operation, reply.status, parse_error(reply.body))
    return reply.status == 401 or lacking


def batch_replies(reply: Reply) -> dict[int, Reply]:
    """The answers to the calls of a batch, by the call's index. What the reply does not tell of is left out."""
    found: dict[int, Reply] = {}
    for part in re.split(rb"(?im)(?=^content-id:)", reply.body)[1:]:
        index = re.match(rb"(?i)content-id:\s*<?response-<?(\d+)>?>?", part)
        inner = re.search(rb"HTTP/[\d.]+ (\d{3})[^\r\n]*\r?\n(.*)", part, re.DOTALL)
        if index and inner:
            body = re.search(rb"\r?\n\r?\n(.*?)(?:\r?\n--[^\r\n]*\s*)?$", b"\n" + inner[2], re.DOTALL)
            found[int(index[1])] = Reply(int(inner[1]), {}, body[1].strip() if body else b"")
    return found
