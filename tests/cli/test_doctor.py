"""`orchestrator doctor`: each way in which a run can be ill is found, named, and comes with what to do."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest

import orchestrator as oc
from orchestrator.cli import doctor, machine_checks, render
from orchestrator.cli.doctor import Diagnosis
from orchestrator.cli.finding import ExaminedRun, Finding
from orchestrator.cli.main import main
from orchestrator.observe.event_log import LoggedEvent
from orchestrator.observe.event_log import encode as encode_event
from orchestrator.observe.events import Pulse, SavePhase
from orchestrator.rules import keys
from orchestrator.rules.codec import encode
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import Created, PosixStorage
from tests.support.fakes import HookedStorage
from tests.support.runs import fill, journal_of, state
from tests.support.snapshots import snapshot


def examine(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, tuple[Finding, ...]]:
    code = main(["orchestrator", "doctor", str(root), "--json", *flags])
    return code, msgspec.json.decode(capsys.readouterr().out, type=Diagnosis).findings


def ill(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """Texts of what is not ok, by check; each must say what to do."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        assert (finding.level == "ok") == (finding.do == ""), finding
        if finding.level != "ok":
            found.setdefault(finding.check, []).append(f"{finding.level}: {finding.text}")
    return found


def test_a_healthy_run_has_no_finding_once_its_newest_step_is_proven(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, 0, 1)
    code, findings = examine(root, capsys)
    assert code == 0 and ill(findings) == {"steps": ["warn: newest step 1 has never been read back"]}
    assert {finding.check for finding in findings} >= set(doctor.CHECKS)
    main(["orchestrator", "verify", str(root)])
    capsys.readouterr()
    code, findings = examine(root, capsys)
    assert code == 0 and ill(findings) == {}
    assert list((root / ".tmp").iterdir()) == []


def test_read_only_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, 0)
    before = snapshot(root)
    stamp = (root / ".tmp").stat().st_mtime_ns
    examine(root, capsys, "--read_only")
    assert snapshot(root) == before and (root / ".tmp").stat().st_mtime_ns == stamp


def missing_entry(root: Path) -> None:
    (root / keys.journal_key(1)).unlink()


def edited_entry(root: Path) -> None:
    path = root / keys.journal_key(1)
    path.write_bytes(path.read_bytes().replace(b'"step":0', b'"step":9'))


def missing_file(root: Path) -> None:
    next((root / "steps" / "00000001").rglob("d/*")).unlink()


def orphan(root: Path) -> None:
    left = root / "steps" / "00000009" / "e0000-a01"
    left.mkdir(parents=True)
    (left / "intent.json").write_bytes(bytes(2048))


def stale(root: Path) -> None:
    path = root / ".tmp" / "left"
    path.write_text("half")
    os.utime(path, (time.time() - 7200,) * 2)


def from_the_future(root: Path) -> None:
    newest = journal_of(root)[-1]
    event = msgspec.structs.replace(newest.event, kind="pinned")
    later = msgspec.structs.replace(newest, version=newest.version + 1, time=time.time() + 600, event=event)
    PosixStorage(str(root)).create(keys.journal_key(later.version), encode(later))


def quarantined(root: Path) -> None:
    for step in (0, 1):
        main(["orchestrator", "quarantine", str(root), f"--step={step}", "--reason=x", "--force"])


def test_a_copy_of_a_run_says_nothing_of_its_hosts_clocks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, 0, 1)
    for path in root.rglob("*"):  # as `cp -r` ten minutes later leaves them
        os.utime(path, (time.time() + 600,) * 2)
    assert "clocks" not in ill(examine(root, capsys)[1])


def skewed_host(root: Path) -> None:
    for path in (root / "events").glob("00000.*"):
        os.utime(path, (time.time() - 500,) * 2)


@pytest.mark.parametrize(
    ("harm", "code", "check", "text"),
    [
        (missing_entry, 4, "journal", "damage: "),
        (edited_entry, 4, "journal", "it was edited or damaged"),
        (missing_file, 4, "steps", "is missing"),
        (orphan, 0, "orphans", "warn: 1 attempt that can never be restored: 2.0 KiB"),
        (stale, 0, "orphans", "warn: 1 unfinished files"),
        (from_the_future, 0, "clocks", "10 min ahead of this machine's"),
        (quarantined, 1, "steps", "bad: no step can be restored"),
        (skewed_host, 0, "clocks", "ahead of this machine's"),
    ],
)
def test_each_illness_is_found(
    root: Path, harm: Callable[[Path], None], code: int, check: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, 0, 1)
    harm(root)
    capsys.readouterr()
    got, findings = examine(root, capsys)
    assert got == code and any(text in line for line in ill(findings)[check]), findings


MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
ALIVE, STANDS = Pulse("training", 1, 9.0, 0.1, "", 9, 1.0), Pulse("training", 1, 9.0, 300.0, "", 9, 1.0)


def hears(root: Path, *pulses: tuple[Pulse, float]) -> None:
    """The events of a job that has not closed: each process's newest pulse, and how old it is."""
    shutil.rmtree(root / "events")
    (root / "events").mkdir()
    for process, (pulse, age_s) in enumerate(pulses):
        path, at = root / "events" / f"{process:05d}.pulse.jsonl", time.time() - age_s
        path.write_bytes(encode_event(LoggedEvent(at, process, f"host-{process}", "elsewhere", 1, pulse)))
        os.utime(path, (at, at))


@pytest.mark.parametrize(
    ("pulses", "code", "text"),
    [
        ([(ALIVE, 0), (ALIVE, 0)], 0, "ok: HEALTHY"),
        ([(ALIVE, 0), (ALIVE, MINUTE)], 1, "bad: STALLED: host-1 (process 1) has no pulse"),
        ([(STANDS, 0), (STANDS, 0)], 1, "bad: STALLED: no host goes on"),
        ([(STANDS, HOUR + MINUTE), (STANDS, 2 * HOUR)], 0, "warn: STALLED: no host has a pulse"),
        ([(ALIVE, DAY)], 0, "the last sign of life was 1 d ago"),
        ([(ALIVE, DAY), (STANDS, 0)], 1, "bad: STALLED: host-0 (process 0) has no pulse"),
    ],
)
def test_a_job_that_hangs_fails_the_command_and_one_that_is_long_gone_does_not(
    root: Path, capsys: pytest.CaptureFixture[str], pulses: list[tuple[Pulse, float]], code: int, text: str
) -> None:
    fill(root, 0)
    hears(root, *pulses)
    got, findings = examine(root, capsys)
    (found,) = (one for one in findings if one.check == "hosts")
    assert text in f"{found.level}: {found.text}" and (got, bool(found.do)) == (code, found.level != "ok"), findings


def test_many_aborted_saves_are_reported_with_their_causes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        agent.save(0, state(0))
        (root / "steps" / "00000001").write_text("in the way")
        agent.save(1, state(1))
    code, findings = examine(root, capsys)
    (line,) = ill(findings)["saves"]
    assert code == 1 and line.startswith("bad: 1 of the last 2 saves were aborted: ") and "ENOTDIR" in line


def examined(root: Path, storage: object = None) -> ExaminedRun:
    store = JournalStore(storage or PosixStorage(str(root)), "test")  # type: ignore[arg-type]
    return ExaminedRun(store, False, None, store.require_head())


@pytest.mark.parametrize(
    ("free", "inodes", "levels"),
    [(105, None, ["bad"]), (250, None, ["warn"]), (1000, 5000, ["ok"]), (1000, 5, ["ok", "bad"])],
)
def test_a_full_disk_is_found_before_the_next_save(free: int, inodes: int | None, levels: list[str]) -> None:
    assert [finding.level for finding in machine_checks.room(free, inodes, 100)] == levels


class Replacing(HookedStorage):
    """A store that lets a second create through."""

    def create(self, key: str, body: bytes) -> Created:
        self.inner.delete(key)
        self.inner.create(key, body)
        return Created()


def test_a_store_that_replaces_objects_is_bad(root: Path) -> None:
    fill(root, 0)
    (finding,) = machine_checks.store(examined(root, Replacing(PosixStorage(str(root)))))
    assert finding.level == "bad" and "was not rejected" in finding.text and "could both commit" in finding.do


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user, and so root")
def test_a_root_of_another_user_is_named_with_its_owner(root: Path) -> None:
    fill(root, 0)
    os.chmod(root.parent, 0o755)
    program = (
        "import os, subprocess, sys; sys.path.insert(0, sys.argv[2])\n"
        "import email.parser, packaging.requirements  # what is imported late, the other user may not read\n"
        "from orchestrator.cli.main import main\n"
        "os.setuid(12345); sys.exit(main(['orchestrator', 'doctor', sys.argv[1]]))"
    )
    for folder in [root, *root.parents]:
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    repository = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program, str(root), repository], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written by user 12345" in done.stdout and "owner 0" in done.stdout and "chown" in done.stdout


def test_for_people_each_finding_is_a_line_and_names_the_root_in_what_to_do(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, 0)
    assert main(["orchestrator", "doctor", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"do: orchestrator verify {root} --step=0" in out and "WARN" in out and "ROOT" not in out
    assert "\nok " not in out and " 1 WARN, 13 ok (--all shows them)" in out
    assert main(["orchestrator", "doctor", str(root), "--all"]) == 0
    assert capsys.readouterr().out.count("\nok ") == 13


def test_for_people_the_worst_comes_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, 0, 1)
    missing_file(root)
    orphan(root)
    assert main(["orchestrator", "doctor", str(root)]) == 4
    levels = [row.split()[0] for row in capsys.readouterr().out.splitlines() if row[0] in "DBW"]
    assert levels == ["DAMAGE", "WARN", "WARN"]


def test_of_many_alike_a_few_are_shown_and_the_rest_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    many = [Finding("steps", "damage", f"step {step} is missing", f"verify {step}") for step in range(200)]
    made = Diagnosis(
        "file:///r", "damage", (*many, Finding("hosts", "bad", "STALLED", "look"), *([Finding("x", "ok", "")] * 30))
    )
    for everything, rows in ((False, 10), (True, 200)):
        render.write(doctor.show(made, {"all": everything}))
        out = capsys.readouterr().out
        assert out.count("is missing") == out.count("do: verify") == rows and "BAD     hosts" in out
        assert ("... and 190 more like these" in out) == (not everything) and "200 DAMAGE, 1 BAD, 30 ok" in out


def test_what_to_do_can_be_pasted_into_a_shell_whatever_the_roots_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "my run; rm -rf $HOME"
    fill(root, 0)
    main(["orchestrator", "doctor", str(root)])
    assert f"do: orchestrator verify {shlex.quote(str(root))} --step=0" in capsys.readouterr().out


@pytest.mark.parametrize("version", [10**6, keys.VERSION_MAX])
def test_an_entry_far_above_the_others_costs_no_time_and_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    fill(root, 0)
    newest = journal_of(root)[-1]
    (root / keys.journal_key(version)).write_bytes(encode(msgspec.structs.replace(newest, version=version)))
    started = time.monotonic()
    code, findings = examine(root, capsys)
    assert code == 4 and time.monotonic() - started < 10
    assert any(f"entries 2 to {version - 1} are missing" in line for line in ill(findings)["journal"])


@pytest.mark.parametrize("lost", ["journal", "newest entry"])
def test_a_run_whose_journal_cannot_be_read_is_examined_all_the_same(
    root: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    fill(root, 0)
    if lost == "journal":
        shutil.rmtree(root / "journal")
    else:
        (root / keys.journal_key(1)).write_bytes(b"")
    code, findings = examine(root, capsys)
    assert code == 4 and {finding.check for finding in findings} >= {"journal", "permissions", "store", "versions"}
    (damage,) = [finding for finding in findings if finding.level == "damage"]
    assert f"orchestrator recover {root}" in damage.do


def test_evidence_is_named_with_its_reason_its_size_and_the_ways_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, 0, 1)
    main(["orchestrator", "quarantine", str(root), "--step=0", "--reason=loss spike"])
    fill(root, 0)  # saved again: the quarantined attempt is put aside
    capsys.readouterr()
    _, findings = examine(root, capsys)
    (finding,) = [finding for finding in findings if finding.check == "quarantine"]
    assert "step 0 e0001-a01 is quarantined and holds " in finding.text and "loss spike" in finding.text
    for command in ("verify", "release", "gc"):
        assert f"orchestrator {command} {root} --" in finding.do


def test_a_slow_host_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, 1)
    story = [
        LoggedEvent(
            time.time() - 9 + after, process, f"host-{process}", "m", 1, SavePhase(2, "e0001-a01", name, after, 9)
        )
        for process, slow_s in ((0, 0.2), (1, 8.0))
        for name, after in (("writing", 0.1), ("waiting", slow_s))
    ]
    (root / "events/00007.jsonl").write_bytes(b"".join(map(encode_event, story)))
    (text,) = [text for text in ill(examine(root, capsys)[1])["hosts"] if "slowest" in text]
    assert text == "warn: slowest in step 2: process 1 (host-1), durable after 8.00 s; the others' median is 0.20 s"
