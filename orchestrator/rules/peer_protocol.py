"""What a tier server and those who ask it say to each other: paths, signatures, and the bodies of answers. Pure.

Every request is signed with the job's secret, which itself never travels: HMAC-SHA256 over the method, the target as
it is sent, the range, the size and CRC-32C of the body, the time and a nonce. Every answer carries a proof, over the
nonce, the status and the length: so whoever answers at an address knows the secret, too, and not only whoever asks.
There is no encryption: whoever listens on the way sees the state, as when processes of a job exchange gradients.

    /<run>[/process-00003[/<key>]][?name=value&...]

Each target has one spelling: what is parsed must be what would be built.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode

import msgspec

from orchestrator.errors import UnsafeKey, UsageError
from orchestrator.rules.keys import TEMPORARY, check_key

AUTHORIZATION, PROOF = "Authorization", "Tier-Proof"
CLOCK_S = 300  # by which the clocks of two hosts may differ
SECRET_DIGITS_MIN = 32
TARGET_CHARS_MAX = 4096
BODY_BYTES_MAX = 16 << 20  # of a request that is no copy: names of files to send
REPLY_BYTES_MAX = 64 << 20  # of an answer that is no file: a page of a listing
NO_BODY_CRC = "00000000"
SLOWEST_BYTES_PER_S = 64 << 10  # whatever comes more slowly than that, for long, is given up
_SCHEME = "orchestrator-tier-1"
_HEADER = re.compile(_SCHEME + r" ([0-9]{1,12}) ([0-9a-f]{32}) ([0-9]{1,18}) ([0-9a-f]{8}) ([0-9a-f]{64})")
_RUN = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"process-([0-9]{5,9})")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})")


class Secret:
    """The secret of a job. Nothing that is shown or logged of it tells what it is."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) < SECRET_DIGITS_MIN // 2:
            raise UsageError(f"the tier's secret has {len(key)} bytes, expected at least {SECRET_DIGITS_MIN // 2}")
        self._key = key

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("the tier's secret is not pickled")

    def sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def signed(self, text: str, signature: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(self.sign(text).encode(), signature.encode("utf-8", "surrogatepass"))


def secret_of(text: str, where: str) -> bytes:
    """The secret in what `where` (a variable's name) says. Raises UsageError, which does not show it."""
    digits = text.strip()
    if len(digits) < SECRET_DIGITS_MIN or len(digits) % 2 or not re.fullmatch("[0-9a-fA-F]*", digits):
        raise UsageError(f"{where}: expected an even number of hexadecimal digits, at least {SECRET_DIGITS_MIN}")
    return bytes.fromhex(digits)


def parse_address(text: str, where: str) -> tuple[str, int]:
    """Host and port of 'host:port' or '[::1]:port'. Raises UsageError naming `where` it stands."""
    host, _, port = text.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = inner and re.fullmatch(r"[0-9A-Za-z._:%-]+", inner) and (":" not in inner or inner != host)
    if not plain or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError(f"{where}: {text!r} is no address; expected host:port, as 10.0.0.3:8476 or [fd00::3]:8476")
    return inner, int(port)


def show_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Targets.


def part_name(process: int) -> str:
    return f"process-{process:05d}"


@dataclass(frozen=True)
class Target:
    """What a request is about: a run, one process's part of it, or a file of that."""

    run: str
    process: int | None = None
    key: str = ""
    query: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """As people are told it."""
        names = [self.run, *([] if self.process is None else [part_name(self.process)]), *([self.key] * bool(self.key))]
        return "/".join(names)

    def encode(self) -> str:
        text = "/" + quote(self.path, safe="/")
        return f"{text}?{urlencode(self.query)}" if self.query else text


def parse_target(text: str) -> Target:
    """Raises UnsafeKey for whatever nobody would have built."""
    raw, _, query = text.partition("?")
    try:
        if len(text) > TARGET_CHARS_MAX:
            raise ValueError("it is too long")
        run, _, rest = raw.removeprefix("/").partition("/")
        name, _, quoted = rest.partition("/")
        part = _PART.fullmatch(name)
        if not _RUN.fullmatch(run) or (name and not part):
            raise ValueError("expected /RUN/process-NNNNN/KEY")
        key = unquote_to_bytes(quoted).decode() if quoted else ""
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict") if query else []
        found = Target(run, int(part[1]) if part else None, key, dict(pairs))
        if found.encode() != text:
            raise ValueError("it is spelled in another way than ours")
    except ValueError as error:
        raise UnsafeKey(f"{text[:200]!r}: {error}; not used") from None
    if key:
        check_key(key, raw)
        if key.partition("/")[0] == TEMPORARY:
            raise UnsafeKey(f"{raw}: is no object; not used")
    return found


# Signatures.


@dataclass(frozen=True)
class Request:
    """What of a request is signed. target: as it is sent. body_bytes, crc32c: of the body, as declared."""

    method: str
    target: str
    range: str = ""
    body_bytes: int = 0
    crc32c: str = NO_BODY_CRC

    def text(self, time_s: int, nonce: str) -> str:
        fields = (_SCHEME, self.method, self.target, self.range, self.body_bytes, self.crc32c, time_s, nonce)
        return "\n".join(map(str, fields))

    def authorize(self, secret: Secret, time_s: int, nonce: str) -> str:
        """The value of the header. nonce: 32 hexadecimal digits that nobody has used before."""
        signature = secret.sign(self.text(time_s, nonce))
        return f"{_SCHEME} {time_s} {nonce} {self.body_bytes} {self.crc32c} {signature}"


@dataclass(frozen=True)
class Signed:
    """What a request with a good signature declares."""

    nonce: str
    body_bytes: int
    crc32c: str


@dataclass(frozen=True)
class Unsigned:
    """Why a request is not carried out. nonce: of one whose signer knows the secret, so that it is told; else ''."""

    reason: str
    nonce: str = ""


def verify(secret: Secret, method: str, target: str, range_: str, header: str, now_s: float) -> Signed | Unsigned:
    found = _HEADER.fullmatch(header)
    if not found:
        return Unsigned("no signature of a tier's request")
    time_s, nonce, body_bytes, crc32c, signature = int(found[1]), found[2], int(found[3]), found[4], found[5]
    request = Request(method, target, range_, body_bytes, crc32c)
    if not secret.signed(request.text(time_s, nonce), signature):
        return Unsigned("another secret has signed it")
    if abs(now_s - time_s) > CLOCK_S:
        text = f"it was signed {now_s - time_s:+.0f} s away from this host's clock, expected at most {CLOCK_S} s"
        return Unsigned(f"{text}; set the hosts' clocks (NTP)", nonce)
    return Signed(nonce, body_bytes, crc32c)


def _proof_text(nonce: str, status: int, length: int | None) -> str:
    return f"{_SCHEME}-reply\n{nonce}\n{status}\n{'-' if length is None else length}"


def prove(secret: Secret, nonce: str, status: int, length: int | None) -> str:
    """The value of an answer's header: whoever answers knows the secret. length: of the body; None: not known yet."""
    return secret.sign(_proof_text(nonce, status, length))


def proves(secret: Secret, nonce: str, status: int, length: int | None, proof: str) -> bool:
    return secret.signed(_proof_text(nonce, status, length), proof)


def parse_range(text: str) -> tuple[int, int] | None:
    """First byte and number of bytes; None for anything but one plain range."""
    found = _RANGE.fullmatch(text)
    if not found or int(found[2]) < int(found[1]):
        return None
    return int(found[1]), int(found[2]) - int(found[1]) + 1


# Bodies.


class Failure(msgspec.Struct, frozen=True):
    """Why something was not done. kind: `missing`, `unavailable` or `storage`, as of the errors; `unsafe`, `conflict`,
    `fenced`, `room`, `damaged` (on its way), `clock`, `secret`, `bad`, `busy`."""

    kind: str
    text: str


class ListPage(msgspec.Struct, frozen=True):
    """entries: key, bytes, problem. more: there are further ones after the last."""

    entries: list[tuple[str, int, str]]
    more: bool = False


class Measured(msgspec.Struct, frozen=True):
    bytes: int
    crc32c: str
    crc32: str = ""


class Parts(msgspec.Struct, frozen=True):
    """Attempts, as (step, name), by process."""

    parts: dict[int, list[tuple[int, str]]]


class Sending(msgspec.Struct, frozen=True):
    """What is to be sent: files of a part, to servers."""

    keys: list[str]
    to: list[str]
    bytes_per_s: int | None = None


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the answer to `Sending`. moved: bytes that this server has sent and read for it, ever: it grows while
    anything goes on. The last line is `done` or has the `failure`."""

    moved: int = 0
    done: bool = False
    failure: Failure | None = None


Body = TypeVar("Body", Failure, ListPage, Measured, Parts, Sending, Progress)
# Made by the thread that imports: see `codec`.
_DECODERS = {kind: msgspec.json.Decoder(kind) for kind in (Failure, ListPage, Measured, Parts, Sending, Progress)}


def encode(body: Body) -> bytes:
    return msgspec.json.encode(body)


def decode(data: bytes, kind: type[Body]) -> Body | None:
    """None for what is no such body."""
    try:
        return _DECODERS[kind].decode(data)  # type: ignore[return-value]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
