"""Nothing stored reaches a terminal as it is: every field that a run holds, forged with right checksums, through every
command, exception and log line."""

from __future__ import annotations

import ast
import json
import logging as python_logging
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from absl import logging
from msgspec import structs

import orchestrator as oc
from orchestrator import errors
from orchestrator.cli.main import COMMANDS, main
from orchestrator.observe import event_log, events
from orchestrator.rules import keys
from orchestrator.rules.codec import decode
from orchestrator.rules.records import (
    Extra,
    Failure,
    FileEntry,
    Head,
    Intent,
    JournalEvent,
    Manifest,
    Receipt,
    Record,
    RetiredAttempt,
    crc32,
    crc32c,
)
from orchestrator.texts import printable
from tests.support.runs import fill

CLI = Path(__file__).parents[2] / "orchestrator" / "cli"
# A title, a line overwritten, a colour by C1, an overridden direction, nothing wide, a line of its own, deleted.
HOSTILE = "\x1b]0;x\x07\r\x9b31m\u202e\u200b\u2028\x7f"
STEP = 2


def unseen(text: str, allowed: str = "\n") -> list[str]:
    """The characters in `text` that a terminal, or a reader, would not see as what they are."""
    return [
        hex(ord(char))
        for char in text
        if char not in allowed and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Grüße, 世界\u3000\u00a0é", "Grüße, 世界\u3000\u00a0é"),
        ("back\\slash", "back\\slash"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("\r\n\t\0", "\\r\\n\\t\\x00"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("\u202e\u2066\u200b\ufeff\xad", "\\u202e\\u2066\\u200b\\ufeff\\xad"),
        ("\u2028\u2029\x85\x0b\x0c", "\\u2028\\u2029\\x85\\x0b\\x0c"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("a\n  b", "a\\n  b"),
    ],
)
def test_what_is_not_to_be_seen_is_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown and printable(shown) == shown
    assert unseen(printable(text)) == []


def test_details_of_an_error_keep_their_lines_and_nothing_else_does() -> None:
    assert printable("a\n  b\x1b\n  c", details=True) == "a\n  b\\x1b\n  c"
    assert printable("a\nb\n c", details=True) == "a\\nb\\n c"


KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OrchestratorError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_fit_to_be_shown(kind: type[errors.OrchestratorError]) -> None:
    error: errors.OrchestratorError
    if kind is errors.Mismatch:
        error = errors.Mismatch(HOSTILE, [f"{HOSTILE}\n  forged"])
        assert len(str(error).splitlines()) == 2
    elif kind is errors.SaveFailed:
        error = errors.SaveFailed(HOSTILE, step=1, attempt="e0001-a01")
    else:
        error = kind(HOSTILE)
    assert unseen(str(error)) == [] and "\\x1b]0;x\\x07\\r\\x9b31m\\u202e" in str(error)


def test_log_lines_of_events_are_fit_to_be_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(python_logging.INFO, logging.get_absl_logger().name):
        events.emit(events.SteppedDown(1, HOSTILE, f"with blanks {HOSTILE}"))
    (record,) = caplog.records
    assert unseen(record.getMessage(), "") == [] and "attempt=\\x1b]0;x" in record.getMessage()


def test_only_render_builds_text_and_prints() -> None:
    """The one place that escapes is the one place that shows: nobody else in the command line builds a rich Text, opens
    a console, or prints; `layout` cuts what `render` has made, and `main` prints help, which is our own."""
    found = []
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if path.name not in ("render.py", "layout.py") and (
                called in ("Text", "Console", "Table", "Text.from_markup")
                or (called == "print" and path.name != "main.py")
                or called.startswith(("sys.stdout.write", "sys.stderr.write"))
            ):
                found.append(f"{path.name}:{node.lineno}: {called}")
    ours = ("usage.overview(", "usage.help_text(", "about", "text(words[0])", "__version__", "help_of(")
    shown = [
        line
        for line in (CLI / "main.py").read_text().splitlines()
        if " print(" in line and not any(own in line for own in ours)
    ]
    assert found == [] and shown == []


# A run whose every stored text is hostile, one at a time.


def signed(record: Record) -> bytes:
    """As `codec.encode`, which would not write what its reader rejects."""
    body = msgspec.json.encode(record)[:-1]
    return body + f',"crc32c":"{crc32c(body)}"}}\n'.encode()


class Forger:
    """Changes a stored run and signs it again, up to the newest journal entry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.attempt = next((root / "steps" / f"{STEP:08d}").iterdir())

    def head(self, change: Callable[[Head], dict[str, Any]]) -> None:
        path = max((self.root / "journal").iterdir())
        head = decode(path.read_bytes(), Head, "")
        path.write_bytes(signed(structs.replace(head, **change(head))))

    def live(self, **changes: Any) -> None:
        self.head(lambda head: {"live": (*head.live[:-1], structs.replace(head.live[-1], **changes))})

    def manifest(self, change: Callable[[Manifest], dict[str, Any]]) -> None:
        path = self.attempt / keys.MANIFEST
        manifest = decode(path.read_bytes(), Manifest, "")
        path.write_bytes(signed(structs.replace(manifest, **change(manifest))))
        self.live(manifest_crc32c=crc32c(path.read_bytes()))

    def record(self, kind: type[Record], name: str, change: Callable[[Any], dict[str, Any]]) -> None:
        path = self.attempt / name
        body = signed(
            structs.replace(decode(path.read_bytes(), kind, ""), **change(decode(path.read_bytes(), kind, "")))
        )
        path.write_bytes(body)

        def sign(entry: FileEntry) -> FileEntry:
            if entry.path != name:
                return entry
            signed = {"bytes": len(body), "crc32c": crc32c(body), "crc32": crc32(body) if entry.crc32 else ""}
            return structs.replace(entry, **signed)

        self.manifest(lambda manifest: {"files": tuple(map(sign, manifest.files))})

    def leaf(self, **changes: Any) -> None:
        def change(intent: Intent) -> dict[str, Any]:
            first, *others = intent.tree.leaves
            return {"tree": structs.replace(intent.tree, leaves=(structs.replace(first, **changes), *others))}

        self.record(Intent, keys.INTENT, change)

    def events(self, old: str, new: str) -> None:
        (path,) = (self.root / "events").glob("0000?.jsonl")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))


FAILED = JournalEvent(
    kind="aborted",
    step=9,
    attempt="e0001-a01",
    failures=(Failure(process=0, host=HOSTILE, phase=HOSTILE, cause=HOSTILE),),
)
IN_JSON = json.dumps(HOSTILE)
FIELDS: dict[str, Callable[[Forger], None]] = {
    "writer": lambda run: run.head(lambda head: {"writer": HOSTILE}),
    "writer of an old time": lambda run: run.head(lambda head: {"writer": HOSTILE, "time": 9e9}),
    "metric": lambda run: run.live(stored_metrics={HOSTILE: 1.0}),
    "pin": lambda run: run.live(pins=(HOSTILE,)),
    "trust": lambda run: run.live(trust=HOSTILE),
    "attempt": lambda run: run.live(attempt=HOSTILE),
    "manifest's checksum": lambda run: run.live(manifest_crc32c=HOSTILE),
    "kind of event": lambda run: run.head(lambda head: {"event": JournalEvent(kind=HOSTILE, step=1)}),
    "reason": lambda run: run.head(lambda head: {"event": JournalEvent(kind="aborted", step=9, reason=HOSTILE)}),
    "failure": lambda run: run.head(lambda head: {"event": FAILED}),
    "retired": lambda run: run.head(
        lambda head: {"retired": (RetiredAttempt(step=1, attempt="e0001-a01", reason=HOSTILE),), "live": head.live[1:]}
    ),
    "leaf": lambda run: run.leaf(path=(HOSTILE,)),
    "kind of leaf": lambda run: run.leaf(kind=HOSTILE),
    "dtype": lambda run: run.leaf(dtype=HOSTILE),
    "sharding": lambda run: run.leaf(sharding=HOSTILE),
    "value": lambda run: run.leaf(value=HOSTILE),
    "mesh": lambda run: run.record(Intent, keys.INTENT, lambda intent: {"mesh": {HOSTILE: 1}}),
    "opened by": lambda run: run.record(Intent, keys.INTENT, lambda intent: {"opened_by": HOSTILE}),
    "extra": lambda run: run.record(Extra, keys.EXTRA, lambda extra: {"stored_extra": {HOSTILE: HOSTILE}}),
    "host of a receipt": lambda run: run.record(Receipt, keys.receipt_name(0), lambda receipt: {"host": HOSTILE}),
    "host": lambda run: run.manifest(lambda manifest: {"hosts": (HOSTILE,)}),
    "file": lambda run: run.manifest(
        lambda manifest: {"files": (*manifest.files, FileEntry(path=f"state/{HOSTILE}", bytes=3, crc32c=HOSTILE))}
    ),
    "chunk": lambda run: run.manifest(lambda manifest: {"chunks": {**manifest.chunks, HOSTILE: HOSTILE}}),
    "fingerprint": lambda run: run.manifest(lambda manifest: {"fingerprints": {"w": HOSTILE}}),
    "stranger's file": lambda run: (
        (run.attempt.parent / "e0009-a09").joinpath(HOSTILE).parent.mkdir()
        or (run.attempt.parent / "e0009-a09" / HOSTILE).write_text("x")
    ),
    "host in events": lambda run: run.events('"host":"', f'"host":"{IN_JSON[1:-1]}'),
    "doing in events": lambda run: run.events('"doing":"', f'"doing":"{IN_JSON[1:-1]}'),
    "machine in events": lambda run: run.events('"machine":"', f'"machine":"{IN_JSON[1:-1]}'),
    "phase in events": lambda run: run.events('"phase":"', f'"phase":"{IN_JSON[1:-1]}'),
    "attempt in events": lambda run: run.events('"attempt":"', f'"attempt":"{IN_JSON[1:-1]}'),
    "name of the root": lambda run: None,
}
# Last: what they write is shown by nobody after them.
CHANGING = ("pin", "unpin", "gc", "verify", "adopt", "quarantine", "release")


def words(name: str, root: Path, to: Path) -> list[str]:
    more = {
        "export": [str(STEP), str(to / f"out{HOSTILE}"), "--format=numpy"],
        "diff": ["1", str(STEP)],
        "report": ["-o", str(to / f"report{HOSTILE}.html")],
        "adopt": [f"--from={to}", f"--skip={HOSTILE}"],
        "watch": ["--once"],
        "pin": [f"--step={STEP}", f"--name={HOSTILE}"],
        "unpin": [f"--step={STEP}", f"--name={HOSTILE}"],
        **{name: [f"--step={STEP}", f"--reason={HOSTILE}"] for name in ("quarantine", "release")},
    }
    return ["orchestrator", name, str(root), *more.get(name, [])]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "run"
    fill(root, 1, STEP, keep=oc.last(9))
    (path,) = (root / "events").glob("0000?.jsonl")
    alive = event_log.LoggedEvent(
        time.time(), 0, "host", "machine", 1, events.Alive("training", STEP)
    )  # seconds apart in a job
    path.write_bytes(path.read_bytes() + event_log.encode(alive))
    return root


@pytest.mark.parametrize("field", FIELDS)
def test_no_command_shows_what_is_stored_as_it_is(
    original: Path, tmp_path: Path, field: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / (f"run{HOSTILE}" if field == "name of the root" else "run")
    shutil.copytree(original, root)
    FIELDS[field](Forger(root))
    capfd.readouterr()
    shown = ""
    for name in sorted(COMMANDS, key=lambda name: name in CHANGING):
        for more in ([], ["--json"]):
            shutil.rmtree(tmp_path / f"out{HOSTILE}", ignore_errors=True)
            try:
                main([*words(name, root, tmp_path), *more])
            except Exception as error:  # that it is no OrchestratorError is for the tests of decoding to say
                assert unseen(str(error)) == []
            said = capfd.readouterr()
            assert unseen(said.out) == [] and unseen(said.err) == [], (name, more)
            shown += said.out + said.err
            if more and said.out:
                json.loads(said.out)
                assert said.out.isascii()
    try:
        oc.open_run(root).restore()
    except oc.OrchestratorError as error:
        assert unseen(str(error)) == []
    said = capfd.readouterr()
    assert unseen(said.out + said.err) == [], "log lines"
    assert "\\x1b]0;x\\x07" in shown or "\\u001b]0;x\\u0007" in shown, "nobody shows it: is it forged at all?"
    page = tmp_path / f"report{HOSTILE}.html"
    assert not page.exists() or [char for char in unseen(page.read_text()) if char != hex(ord("\ufe0f"))] == []
