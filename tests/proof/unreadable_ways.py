"""Ways of not being able to read a run, in a bucket and on a disk, and ways of it being damaged: one table.

Patterns and paths are of a run with steps 1 and 2. `{data}`, `{manifest}` and the like stand for parts of step 2, by
regular expression; other names in braces for what `endpoints` serves and writes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

GS, LOCAL = "gs", "local"
NEWEST = "steps/00000002/e0001-a01"
PARTS = {
    "data": rf"{NEWEST}/state/.*d/[0-9a-f]+$",
    "manifest": rf"{NEWEST}/manifest\.json$",
    "intent": rf"{NEWEST}/intent\.json$",
    "extra": rf"{NEWEST}/extra\.json$",
    "process state": rf"{NEWEST}/process/00000\.bin$",
    "array store": rf"{NEWEST}/state/manifest\.ocdbt$",
    "head": r"journal/0*2\.json$",
    "attempt": rf"{NEWEST}/?$",
    "journal": r"journal/?$",
}

# What is expected. UNREAD: step 2 is whole, and cannot be read. MAYBE: it can be read, perhaps at a second look.
# DAMAGED: its bytes are wrong, for everyone and for ever. ODD: something stands there that no run has, put by somebody.
UNREAD, MAYBE, DAMAGED, ODD = "unread", "maybe", "damaged", "odd"


class Files(Protocol):
    """A run's objects by key, whole, past everything that is made to fail."""

    def names(self, below: str = "") -> list[str]: ...
    def get(self, key: str) -> bytes: ...
    def put(self, key: str, body: bytes) -> None: ...
    def remove(self, key: str) -> None: ...


@dataclass(frozen=True)
class Way:
    """`rules`: of the emulator, or of the shim (`operation action skip times pattern`). `prepare`: done to the run
    before, undone after. `also`: errors that are right here, too, beside StorageError. `crashes`:
    the process may end by it. The rest as in `unreadable_child.Job`."""

    place: str
    name: str
    expected: str = UNREAD
    environ: Mapping[str, str | None] = field(default_factory=dict)
    rules: tuple[Any, ...] = ()
    prepare: Callable[[Any], None] | None = None
    real_credentials: bool = False
    descriptors: int | None = None
    memory_bytes: int | None = None
    unprivileged: bool = False
    also: tuple[str, ...] = ()
    crashes: bool = False

    @property
    def label(self) -> str:
        return f"{self.place}: {self.name}"

    @property
    def needs_shim(self) -> bool:
        return self.place == LOCAL and bool(self.rules)


# In a bucket.

_KEYS = {
    "missing": "key file missing",
    "garbage": "key file of garbage",
    "no_object": "key file holds a JSON list",
    "broken_key": "service account, broken private key",
    "revoked_key": "service account, revoked",
    "revoked_user": "user, refresh token revoked",
    "external": "external_account",
    "impersonated": "impersonated_service_account",
}
_LINES: dict[str, tuple[str, dict[str, str]]] = {
    "self-signed certificate": ("{selfsigned}", {}),
    "connection refused": ("{rejecting}", {}),
    "name does not resolve": ("{unknown}", {}),
    "proxy answers 407": ("http://store.example", {"http_proxy": "{proxy}"}),
    "proxy answers 407 to CONNECT": ("https://store.example", {"https_proxy": "{proxy}"}),
    "black hole": ("{silent}", {}),
    "login page of a captive portal": ("{login}", {}),
}
_STATUSES = (204, 302, 304, 400, 401, 403, 404, 408, 410, 412, 416, 429, 500, 501, 502, 503, 504)
# TensorStore 0.1.86 takes these, which answer conditions that nobody has made, for a value; no service gives them so.
_SEGMENTATION_FAULTS = (304, 412)


def _rule(part: str, kind: str, value: float = 0, *operations: str, **more: Any) -> dict[str, Any]:
    return {"name": PARTS[part], "kind": kind, "value": value, "operations": operations or ("media",), **more}


def _answers(part: str, statuses: tuple[int, ...], *, once: bool) -> Iterator[Way]:
    for status in statuses:
        # What says that there is no such object, or no such bytes, is contradicted by the object's own metadata.
        operations = ("media",) if status in (404, 410, 416) else ("media", "get")
        rule = _rule(part, "status", status, *operations, times=int(once))
        crashes = part == "data" and status in _SEGMENTATION_FAULTS
        expected = MAYBE if once else UNREAD
        yield Way(GS, f"{part}: HTTP {status}{' once' * once}", expected, rules=(rule,), crashes=crashes)


_BODIES: dict[str, tuple[str, float]] = {
    "one bit flipped on the way": ("flip", 0),
    "body cut short": ("cut", 100),
    "whole answer, too short": ("short", 100),
    "Content-Range of other bytes": ("range", 0),
    "HTML and status 200": ("type", 0),
    "no answer": ("hang", 0),
}


def _bodies(part: str, *names: str, once: bool) -> Iterator[Way]:
    for name in names or _BODIES:
        rule = _rule(part, *_BODIES[name], times=int(once))
        needed = part == "data" or name != "Content-Range of other bytes"  # a whole object's has no range
        expected = UNREAD if needed and not once else MAYBE
        yield Way(GS, f"{part}: {name}{' once' * once}", expected, rules=(rule,))


def _in_a_bucket() -> Iterator[Way]:
    for key, name in _KEYS.items():
        environ = {"GOOGLE_APPLICATION_CREDENTIALS": f"{{{key}}}"}
        expected = MAYBE if key == "missing" else UNREAD  # TensorStore reads anonymously then, as an emulator allows
        yield Way(GS, f"arrays: {name}", expected, environ=environ)
        # Here its tokens are revoked, too. A key file that is named and missing is never taken for no credentials.
        yield Way(GS, f"all: {name}", environ=environ, real_credentials=True)
    for name, (url, more) in _LINES.items():
        yield Way(GS, f"arrays: {name}", environ={"TENSORSTORE_GCS_HTTP_URL": url, **more})
        yield Way(GS, f"records: {name}", environ={"STORAGE_EMULATOR_HOST": url, **more})
    for once in (False, True):
        yield from _answers("data", _STATUSES, once=once)
        yield from _bodies("data", once=once)
        yield from _answers("array store", (400, 403, 404, 416, 500), once=once)
        yield from _answers("manifest", (401, 403, 404, 412, 500, 503), once=once)
        yield from _bodies("manifest", once=once)
        yield from _answers("head", (403, 404, 500), once=once)
        yield from _bodies("head", "one bit flipped on the way", "HTML and status 200", "body cut short", once=once)
    yield from _answers("intent", (403, 404), once=False)
    yield from _answers("intent", (404, 503), once=True)
    for status in (401, 403, 500):
        rule = {"name": "", "kind": "status", "value": status, "operations": ("list",)}
        yield Way(GS, f"listings: HTTP {status}", rules=(rule,))
    for kind, name in (("type", "HTML and status 200"), ("cut", "body cut short")):
        yield Way(GS, f"listings: {name}", rules=({"name": "", "kind": kind, "value": 9, "operations": ("list",)},))
    yield Way(GS, "data: half a second late", MAYBE, rules=(_rule("data", "slow", 0.5),))
    yield Way(GS, "data: a byte every 50 ms", UNREAD, rules=(_rule("data", "trickle", 0.05),))
    yield Way(GS, "descriptors used up", descriptors=0)


# On a disk.

_ERRORS = (
    "EACCES",
    "EPERM",
    "EMFILE",
    "ENFILE",
    "ENOMEM",
    "EIO",
    "ESTALE",
    "ETIMEDOUT",
    "ENODEV",
    "ENOTCONN",
    "EAGAIN",
)


def _fails(part: str, operation: str, names: tuple[str, ...], *, once: bool) -> Iterator[Way]:
    for name in names:
        action = str(getattr(errno, name)) if name.startswith("E") else name
        words = {"eof": "ends too early", "flip": "one bit wrong"}.get(name, name)
        rule = f"{operation} {action} 0 {int(once)} {PARTS[part]}"
        expected = MAYBE if once or operation == "stat" else UNREAD  # who reads need not ask for the size
        yield Way(LOCAL, f"{part}: {operation}: {words}{' once' * once}", expected, rules=(rule,))


def _closed(part: str, mode: int) -> Callable[[Path], None]:
    """Take a part of the run from a user who is not privileged, while all else is theirs."""

    def close(root: Path) -> None:
        for path in [root, *root.rglob("*")]:
            os.chown(path, 65534, 65534)
        for path in [root / part] if part in ("", "journal", NEWEST) else _matching(root, part):
            os.chown(path, 0, 0)
            path.chmod(mode)

    return close


def _matching(root: Path, part: str) -> list[Path]:
    found = [path for path in sorted(root.rglob("*")) if re.search(PARTS[part], str(path)) and path.is_file()]
    assert found, part
    return found


def _on_a_disk() -> Iterator[Way]:
    yield from _fails("data", "open", _ERRORS, once=False)
    yield from _fails("data", "read", ("EIO", "ESTALE", "ETIMEDOUT", "ENOMEM", "ENODEV"), once=False)
    yield from _fails("data", "stat", ("EACCES", "ESTALE", "EIO"), once=False)
    yield from _fails("data", "open", ("ENOENT", "EIO", "ESTALE", "EMFILE"), once=True)
    yield from _fails("data", "read", ("EIO", "ESTALE", "EINTR", "eof", "flip"), once=True)
    yield from _fails("array store", "open", ("EACCES", "EMFILE", "EIO", "ESTALE"), once=False)
    yield from _fails("array store", "open", ("ENOENT", "ESTALE"), once=True)
    yield from _fails("array store", "read", ("EIO", "eof", "flip"), once=True)
    yield from _fails("manifest", "open", ("EACCES", "EMFILE", "ENOMEM", "EIO", "ESTALE"), once=False)
    yield from _fails("manifest", "open", ("ENOENT", "ESTALE"), once=True)
    yield from _fails("manifest", "read", ("EIO", "eof", "flip"), once=True)
    yield from _fails("intent", "read", ("EIO",), once=False)
    yield from _fails("intent", "read", ("eof", "flip"), once=True)
    yield from _fails("extra", "open", ("ENOENT",), once=True)
    yield from _fails("process state", "open", ("EACCES",), once=False)
    yield from _fails("process state", "read", ("eof", "flip"), once=True)
    yield from _fails("head", "open", ("EACCES", "EIO", "ESTALE"), once=False)
    yield from _fails("head", "open", ("ENOENT", "ESTALE"), once=True)
    yield from _fails("head", "read", ("eof", "flip"), once=True)
    for part in ("attempt", "journal"):
        for once in (False, True):
            for name in ("EACCES", "EIO", "ESTALE", "ENODEV", *(("ENOENT",) if once else ())):
                numbers = f"{getattr(errno, name)} 0 {int(once)} {PARTS[part]}"
                rules = (f"list {numbers}", f"open {numbers}")
                expected = MAYBE if once or part == "attempt" else UNREAD  # who reads it need not list it
                also = ("JournalLost", "NotARun") if (part, name) == ("journal", "ENOENT") else ()
                yield Way(LOCAL, f"{part}: listing: {name}{' once' * once}", expected, rules=rules, also=also)
    for part, mode in (("data", 0o600), ("manifest", 0o600), ("head", 0o600), (NEWEST, 0o700), ("journal", 0o700)):
        name = part.replace(NEWEST, "attempt")
        yield Way(LOCAL, f"{name}: of another user", prepare=_closed(part, mode), unprivileged=True)
    yield Way(LOCAL, "root: of another user", prepare=_closed("", 0o700), unprivileged=True)
    yield Way(LOCAL, "descriptors used up", descriptors=0)
    yield Way(LOCAL, "two descriptors left", descriptors=2)
    # Which layer runs out first is chance; some end the process, and CPython may hang in it.
    errors = ("MemoryError", "RuntimeError")
    yield Way(LOCAL, "memory used up", memory_bytes=1 << 20, also=errors, crashes=True)


# Damage, anywhere.


def _only(files: Files, part: str) -> str:
    return max((key for key in files.names() if re.search(PARTS[part], key)), key=lambda key: len(files.get(key)))


def _flip(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _edit(part: str, change: Callable[[bytes], bytes]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        key = _only(files, part)
        files.put(key, change(files.get(key)))

    return damage


def _delete(part: str) -> Callable[[Files], None]:
    return lambda files: files.remove(_only(files, part))


def _of_another_save(files: Files) -> None:
    """A data file of the same form and size, whole, of another step."""
    key = _only(files, "data")
    size, folder = len(files.get(key)), key.rpartition("/")[0].replace("00000002", "00000001")
    others = [other for other in files.names() if other.startswith(folder) and len(files.get(other)) == size]
    files.put(key, files.get(others[0]))


DAMAGE: dict[str, Callable[[Files], None]] = {
    **{f"{part}: one bit flipped": _edit(part, _flip) for part in ("data", "manifest", "intent", "array store")},
    **{f"{part}: cut": _edit(part, lambda body: body[:-7]) for part in ("data", "manifest", "process state")},
    **{f"{part}: deleted": _delete(part) for part in ("data", "manifest", "extra", "array store")},
    "data: longer than it was": _edit("data", lambda body: body + b"more"),
    "data: zeroed": _edit("data", lambda body: bytes(len(body))),
    "data: another save's file of the same size": _of_another_save,
}


def _replaced(part: str, make: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """Move a part of the run elsewhere, and put something else in its place."""

    def replace(root: Path) -> None:
        path = root / part if part in ("steps", NEWEST) else _matching(root, part)[0]
        moved = root.parent / f"{root.name}-moved-{path.name}"
        shutil.move(path, moved)
        make(path, moved)

    return replace


_ODD: dict[str, Callable[[Path], None]] = {
    "data: a FIFO": _replaced("data", lambda path, moved: os.mkfifo(path)),
    "data: a link to the file, moved": _replaced("data", lambda path, moved: path.symlink_to(moved)),
    "data: a link to nothing": _replaced("data", lambda path, moved: path.symlink_to("nothing")),
    "data: a directory": _replaced("data", lambda path, moved: path.mkdir()),
    "manifest: a FIFO": _replaced("manifest", lambda path, moved: os.mkfifo(path)),
    "manifest: a link to the file, moved": _replaced("manifest", lambda path, moved: path.symlink_to(moved)),
    "attempt: a link to it, moved": _replaced(NEWEST, lambda path, moved: path.symlink_to(moved)),
    "steps: a link to it, moved": _replaced("steps", lambda path, moved: path.symlink_to(moved)),
    "steps: an empty directory": _replaced("steps", lambda path, moved: path.mkdir()),
}

# The store itself says that all of it is gone. (If the disk is another one than it was, `verify` takes it back later.)
_gone = _replaced(NEWEST, lambda path, moved: path.mkdir())

WAYS: tuple[Way, ...] = (
    *_in_a_bucket(),
    *_on_a_disk(),
    *(Way(place, name, DAMAGED, prepare=damage) for name, damage in DAMAGE.items() for place in (GS, LOCAL)),
    Way(LOCAL, "attempt: an empty directory", DAMAGED, prepare=lambda files: _gone(files.root)),
    *(Way(LOCAL, name, ODD, prepare=make) for name, make in _ODD.items()),
)

# Those that stand for the others, for the suite.
_QUICK = r"""
arrays: (key file of garbage|service account, broken|external_account|impersonated)
|arrays: (self-signed|connection refused|proxy answers 407$|black hole|login page)
|all: (service account, revoked|external_account)
|records: (connection refused|black hole|login page)
|data: HTTP (400|403|404|416|503)$
|data: HTTP (400|403|404|503) once
|data: (one bit flipped on the way|HTML|no answer once|a byte|body cut short once)
|array store: HTTP 404
|manifest: HTTP (403|404)$
|manifest: (HTTP 404 once|one bit flipped on the way$|HTML and status 200 once)
|head: HTTP 404
|intent: HTTP 404
|listings: H
|gs: descriptors
|data: open: (EMFILE|ENOMEM|ENODEV|ENOENT)
|data: read: (EIO|ESTALE$|ends|one bit)
|array store: (open: EMFILE|open: ENOENT|read: one)
|manifest: (open: EACCES|open: ENOENT|open: ESTALE$|read: one)
|process state: read: one
|head: (open: EIO|open: ENOENT|read: one)
|attempt: listing: (ESTALE$|ENOENT)
|journal: listing: E(IO$|NOENT)
|(data|attempt|journal|root): of another user
|descriptors used up|two descriptors|memory
|data: (one bit flipped|deleted)$|data: another save
|(manifest|array store): one bit flipped$
|(data|manifest): a (FIFO|link to the)
|attempt: an empty
"""
QUICK = tuple(way for way in WAYS if re.search(_QUICK.replace("\n", ""), way.label))
