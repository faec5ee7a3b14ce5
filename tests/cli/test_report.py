"""`orchestrator report`: what it says of a run, and what a real browser makes of the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.cli.main import main
from orchestrator.cli.report import page
from orchestrator.cli.report_parts import ReportedSave, RunReport
from orchestrator.cli.run_report import build
from orchestrator.observe.event_log import LoggedEvent
from orchestrator.observe.events import (
    Alive,
    Closed,
    EpochOpened,
    Event,
    Pulse,
    SaveCommitted,
    SaveNotCommitted,
    SavePhase,
    SaveStarted,
)
from orchestrator.observe.timeline import Timeline
from orchestrator.policy import last
from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.keys import journal_key
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import MemoryStorage
from tests.support.builders import live
from tests.support.runs import fill, now

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
HEADLESS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
]


def reported(root: Path, capsys: pytest.CaptureFixture[str]) -> RunReport:
    capsys.readouterr()
    assert main(["orchestrator", "report", str(root), "--json"]) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=RunReport)


@pytest.fixture
def run(root: Path, mesh8: jax.sharding.Mesh) -> Path:
    """Two incarnations: steps 0 to 4 of which two stay, one abort, one quarantine, one pin; and a hostile name."""
    both = NamedSharding(mesh8, PartitionSpec("data", "model"))

    def sharded(step: int) -> dict[str, Any]:
        return {"</script><b>w": jax.device_put(jnp.full((8, 4), float(step)), both), "count": step}

    with oc.Agent(root, options=oc.Options(async_save=False), keep=oc.last(3)) as agent:
        for step in range(4):
            agent.save(step, sharded(step), metrics={"loss": 1.0})
        (root / "steps" / "00000009").write_text("in the way")
        agent.save(9, sharded(9))
    main(["orchestrator", "pin", str(root), "--step=2", "--name=release"])
    main(["orchestrator", "quarantine", str(root), "--step=3", "--reason=loss spike"])
    with oc.Agent(root, options=now(), keep=oc.last(3)) as agent:
        restored = agent.restore(sharded(0))
        assert restored is not None and restored.step == 2
        agent.save(4, sharded(4))
    return root


def by_step(made: RunReport) -> dict[int, ReportedSave]:
    return {save.step: save for save in made.saves}


def test_a_report_has_every_save_with_its_state_trust_and_parts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = reported(run, capsys)
    saves = by_step(made)
    assert {step: (save.outcome, save.state) for step, save in saves.items()} == {
        0: ("committed", "gone"),
        1: ("committed", "live"),
        2: ("committed", "live"),
        3: ("committed", "live"),  # quarantined: evidence stays
        4: ("committed", "live"),
        9: ("aborted", ""),
    }
    assert (saves[3].trust, saves[4].trust, saves[2].trust) == ("quarantined", "committed", "restored")
    assert saves[2].pins == ("release",) and saves[2].metrics == {"loss": 1.0} and made.newest == 4
    assert "ENOTDIR" in saves[9].reason
    for save in saves.values():
        (part,) = save.parts
        assert part.process == 0 and part.blocked > 0
        if save.outcome == "committed":
            assert 0 < part.writing < part.sealing < part.waiting < part.committing < part.ended


def test_incidents_have_causes_and_a_restart_its_cost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = reported(run, capsys)
    assert [incident.kind for incident in made.incidents] == ["save aborted", "quarantined", "restart"]
    assert "ENOTDIR" in made.incidents[0].text and made.incidents[1].text == "loss spike"
    first, second = made.epochs
    assert (first.lost_s, second.from_step) == (0.0, 2) and second.restore_s is not None
    # The first incarnation closed: what lies between the two is idle, and no restart's cost.
    assert first.closed and made.goodput.down_s == 0 < made.goodput.idle_s and second.lost_s >= second.restore_s * 0.9
    assert made.goodput.share is not None and 0 <= made.goodput.share < 1
    marks = [each.mark for each in made.intervals]
    assert marks.count("optimum") == 1 and marks.count("this run") == 1
    best = next(each for each in made.intervals if each.mark == "optimum")
    assert all(0 < each.share <= best.share * 1.01 for each in made.intervals)
    blocked = sum(part.blocked for save in made.saves for part in save.parts)
    assert made.goodput.blocked_s == pytest.approx(blocked, abs=1e-3) and made.goodput.restarts_s == second.lost_s


def test_the_mesh_and_the_shardings_are_those_of_the_newest_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mesh = reported(run, capsys).mesh
    assert mesh is not None and (mesh.axes, mesh.devices, mesh.processes) == ({"data": 4, "model": 2}, 8, 1)
    (leaf,) = mesh.leaves
    assert leaf.split == (("data",), ("model",)) and leaf.shape == (8, 4) and leaf.bytes == 128


def test_a_run_without_events_and_a_damaged_one_are_reported_too(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, 0, 1)
    shutil.rmtree(root / "events")
    next((root / "steps" / "00000001").rglob("intent.json")).unlink()
    made = reported(root, capsys)
    assert [save.parts for save in made.saves] == [(), ()] and made.mesh is None and made.goodput.share is not None


def test_a_save_whose_process_died_is_reported_as_unknown() -> None:
    line = LoggedEvent(50.0, 0, "h", "m", 1, SavePhase(3, "e0001-a01", "writing", 1.0, 5))
    store = JournalStore(MemoryStorage(), "test")
    store.append(journal.open_epoch)
    (save,) = build(store, Timeline().add([line]), 60.0).saves
    assert (save.step, save.outcome, save.began, save.parts[0].ended) == (3, "unknown", 49.0, -1.0)


def told(events: list[tuple[float, int, Event]], epoch: int = 1) -> list[LoggedEvent]:
    return [LoggedEvent(at, process, f"host-{process}", "m", epoch, event) for at, process, event in events]


def training(first: int, last: int, *processes: int, lost: int = 0) -> list[tuple[float, int, Event]]:
    """A step a second, but for `lost` seconds before."""
    return [(float(at), process, Alive("training", at - lost)) for at in range(first, last, 5) for process in processes]


def saved(step: int, at: float, *, slow: float) -> list[tuple[float, int, Event]]:
    name = "e0001-a01"
    return [
        (at + after, process, event)
        for process, after in ((0, 0.1), (1, 0.1 * slow), (2, 0.11))
        for event in (
            SavePhase(step, name, "writing", 0.01, 0),
            SavePhase(step, name, "waiting", after, 9),
            SaveCommitted(step, name, after, 9),
        )
    ]


# What happened -> (events, seconds after the newest of them, tone of the verdict, what the page says).
HAPPENED: dict[str, tuple[list[tuple[float, int, Event]], float, str, tuple[str, ...]]] = {
    "ended in order": (
        [*training(0, 100, 0, 1), (100.0, 0, Closed(0)), (100.0, 1, Closed(0))], 9000.0, "good", ("ended in order",)),
    "running": (training(0, 100, 0, 1), 3.0, "good", ("was running",)),
    "the job is gone": (training(0, 100, 0, 1), 600.0, "bad", ("The job is gone", "ended without closing")),
    "one host dead, the other closed": (
        [*training(0, 100, 0, 1), (101.0, 0, Closed(0))], 600.0, "bad", ("last signs of life of host-1",)),
    "one host frozen, the other waits": (
        [
            *training(0, 50, 0, 1),
            *((float(at), 0, Alive("waiting for process 1", 45)) for at in range(50, 90, 5)),
            *training(90, 150, 0, 1, lost=40),
        ], 3.0, "warn", ("no step for", "host-1 gave no sign of life for 45 s, the others did")),
    "one host frozen until now": (
        [*training(0, 50, 0, 1), *((float(at), 0, Pulse("training", 45, 9.0, at - 45.0)) for at in range(50, 90, 5))],
        3.0, "warn", ("no step for", "host-1 gave no sign of life for 40 s, the others did")),
    "saves that could not be journalled": (
        [
            *training(0, 50, 0, 1),
            *((40.0, process, SavePhase(7, "e0001-a01", "writing", 0.1, 9)) for process in (0, 1)),
            *((41.0, process, SaveNotCommitted(7, "e0001-a01", "ENOSPC (No space)")) for process in (0, 1)),
        ], 3.0, "warn", ("One save was aborted, the newest at step 7: ENOSPC",)),
    "all silent": (
        [*training(0, 50, 0, 1), *training(90, 150, 0, 1, lost=40)], 3.0, "warn", ("every host was silent",)),
    "one host slow": (
        [line for step in range(8) for line in saved(step, 10.0 + step, slow=5)], 3.0, "warn",
        ("host-1 was the slowest in 8 of the last 8 saves",)),
    "no host slow": ([line for step in range(8) for line in saved(step, 10.0 + step, slow=1.1)], 3.0, "warn", ()),
}  # fmt: skip


@pytest.mark.parametrize(("events", "later", "tone", "words"), HAPPENED.values(), ids=HAPPENED)
def test_the_first_sentences_say_what_happened(
    events: list[tuple[float, int, Event]], later: float, tone: str, words: tuple[str, ...]
) -> None:
    storage = MemoryStorage()
    entry = journal.commit(
        journal.open_epoch(None, journal.Stamp("w", 0.0, "id")),  # type: ignore[arg-type]
        journal.Stamp("w", 5.0, "id"),
        epoch=1,
        entry=live(1, "e0001-a01", time=5.0),
        keep=last(5),
    )
    opened = journal.open_epoch(None, journal.Stamp("w", 0.0, "id"))
    for head in (opened, entry):
        assert isinstance(head, Head)
        storage.create(journal_key(head.version), encode(head))
    lines = sorted(told(events), key=lambda line: line.time)
    made = build(JournalStore(storage, "test"), Timeline().add(lines), lines[-1].time + later)
    assert made.verdict is not None and made.verdict.tone == tone, made.verdict
    text = "\n".join([made.verdict.text, *(finding.text for finding in made.findings)])
    assert [each for each in words if each not in text] == [], text
    if not words:
        assert "slowest" not in text


def test_a_job_whose_events_find_no_room_is_not_gone() -> None:
    """Its files' time stamps go on (tests/observe/test_heartbeat.py)."""
    store = JournalStore(MemoryStorage(), "test")
    store.append(journal.open_epoch)
    timeline = Timeline().add(told(training(0, 100, 0, 1)))
    gone, there = (build(store, timeline, 900.0, heard) for heard in (0.0, 899.0))
    assert "ended without closing" in str(gone.findings) and "ended without closing" not in str(there.findings)
    assert there.verdict and "was running when this page was made, but its events end at" in there.verdict.text


def test_what_was_not_read_is_said() -> None:
    store = JournalStore(MemoryStorage(), "test")
    store.append(journal.open_epoch)
    timeline = Timeline().add(told(training(0, 100, 0, 1)))
    whole, cut = (build(store, timeline, 101.0, 0.0, cut_at) for cut_at in ({0: 5.0}, {0: 5.0, 1: 50.0, 2: 40.0}))
    assert "Not all events" not in str(whole.findings)
    (said,) = [found for found in cut.findings if "Not all events" in found.text]
    assert "of 2 processes it has those from 1970-01-01 00:00:50 UTC on" in said.text and said.began == 50.0


class Outside(HTMLParser):
    """Everything in a page that would ask a network for something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [each for each in attributes if each[0] in ("src", "href", "srcset", "action", "data")]


def test_the_page_is_one_file_and_no_text_of_a_run_can_leave_its_place(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert main(["orchestrator", "report", str(run), "-o", str(output)]) == 0
    text = output.read_text()
    parser = Outside()
    parser.feed(text)
    assert parser.found == [] and "@import" not in text and "url(" not in text and "fetch(" not in text
    assert "</script><b>" not in text and "\\u003c/script>" in text and "innerHTML" not in text
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.html"]
    assert main(["orchestrator", "report", str(run), "-o", "/nowhere/report.html"]) == 1


def opened(html: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """(the page's document once its scripts have run, what the browser logged)."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *HEADLESS, f"--user-data-dir={profile}", "--dump-dom", *flags, f"file://{html}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_chromium
def test_a_browser_shows_the_page_without_an_error(run: Path, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    main(["orchestrator", "report", str(run), "-o", str(html)])
    document, log = opened(html, tmp_path / "profile")
    assert log == "" and 'data-ready="yes"' in document
    for words in (
        "saves not committed",
        "loss spike",
        "ENOTDIR",
        "release",
        "data=4 x model=2",
        "&lt;/script&gt;&lt;b&gt;w",
    ):
        assert words in document, words
    assert document.count("<figure>") == 2
    (split,) = re.findall(r'id="goodsplit">(.*?)</div></div>', document)
    shares = [float(share) for share in re.findall(r"flex: ([\d.]+) 0 0", split)]
    assert 99.9 < sum(shares) < 100.1, "a run of less than a second, too, fills its bar"


def axe() -> Path | None:
    """axe-core, where somebody has installed it: AXE_JS, or `npm install --global axe-core`."""
    if chosen := os.environ.get("AXE_JS"):
        return Path(chosen)
    if npm := shutil.which("npm"):
        found = Path(subprocess.run([npm, "root", "--global"], capture_output=True, text=True).stdout.strip())
        if (script := found / "axe-core" / "axe.min.js").exists():
            return script
    return None


ACCESSIBLE = """<script>%s</script><script>
axe.run().then(found => { document.documentElement.dataset.axe = JSON.stringify(found.violations
  .filter(each => each.impact === "serious" || each.impact === "critical")
  .map(each => [each.id, each.nodes.slice(0, 3).map(node => node.html.slice(0, 120))])); });
</script></body>"""


def serious(html: Path, profile: Path, *flags: str) -> list[Any]:
    """What axe finds serious or critical in a page."""
    script = axe()
    assert script is not None
    html.write_text(html.read_text().replace("</body>", ACCESSIBLE % script.read_text().replace("</script>", "")))
    document, _ = opened(html, profile, "--virtual-time-budget=20000", *flags)
    found = re.search(r'data-axe="([^"]*)"', document)
    assert found, "axe did not finish"
    violations: list[Any] = json.loads(unescape(found[1]))
    return violations


@needs_chromium
@pytest.mark.parametrize("flags", [(), ("--force-dark-mode", "--window-size=390,844")], ids=["light", "dark, phone"])
def test_the_page_has_no_serious_fault_of_accessibility(flags: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    if axe() is None:
        pytest.skip("axe-core is not installed: npm install --global axe-core, or AXE_JS=.../axe.min.js")
    html, bad = tmp_path / "report.html", tmp_path / "bad.html"
    main(["orchestrator", "report", str(run), "-o", str(html)])
    bad.write_text('<!doctype html><body><img src="data:,"><button></button></body>')
    assert serious(bad, tmp_path / "profile", *flags), "a fault would not be seen"
    assert serious(html, tmp_path / "profile", *flags) == []


@needs_chromium
def test_an_error_in_the_page_would_be_seen(tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    html.write_text("<script>null.x</script>")
    assert "TypeError" in opened(html, tmp_path / "profile")[1]


def phases(save: SaveCommitted, at: float, epoch: int, process: int) -> list[LoggedEvent]:
    """One process's events of a save that began at `at`; process 2 is a straggler."""
    slow = 1 + (process == 2) + (save.step * 7919 + process) % 13 / 13
    begun = {"staging": 0.0, "writing": 0.1, "sealing": slow, "waiting": slow + 0.2}
    told: list[tuple[float, Event]] = [
        (after, SavePhase(save.step, save.attempt, name, after, 1 << 28 if after >= slow else 0))
        for name, after in begun.items()
    ]
    told += [(0.1, SaveStarted(save.step, save.attempt, 0.1)), (save.elapsed_s, save)]
    return [LoggedEvent(at + after, process, f"host-{process}", "m", epoch, event) for after, event in told]


def long_run(steps: int, hosts: int) -> RunReport:
    """As `build` gives it for a run of `steps` saves and a restart now and then: made by the journal's own rules."""
    storage = MemoryStorage()
    head: Head | None = None

    def append(rule: journal.Rule) -> None:
        nonlocal head
        following = rule(head, journal.Stamp("host-0/process-0", at + 4, "id"))
        assert isinstance(following, Head)
        head = following
        storage.create(journal_key(head.version), encode(head))

    lines: list[LoggedEvent] = []
    at, epoch = 1_790_000_000.0, 0
    for step in range(steps):
        if step % (steps // 4) == 0:
            epoch += 1
            append(journal.open_epoch)
            opened = EpochOpened(epoch, "r", hosts)
            lines += [LoggedEvent(at, process, f"host-{process}", "m", epoch, opened) for process in range(hosts)]
        attempt = f"e{epoch:04d}-a01"
        if step % 97 == 5:
            more: dict[str, Any] = {"failures": (), "reason": "process 2 voted to abort"}
            append(partial(journal.abort, epoch=epoch, attempt=AttemptId(step, attempt), **more))
        else:
            entry = live(step, attempt, bytes=1 << 30, time=at, metrics={"loss": 1 / (step + 1)})
            append(partial(journal.commit, epoch=epoch, entry=entry, keep=last(5)))
            assert head is not None
            if step % 100 == 99:  # retired ones would pile up in each entry
                gone = [old.id for old in head.retired]
                append(partial(journal.collected, attempts=gone))
        for process in range(hosts):
            lines += phases(SaveCommitted(step, attempt, 4.0, 1 << 30), at, epoch, process)
        at += 60 + step % 11
    return build(JournalStore(storage, "test"), Timeline().add(lines), at)


@needs_chromium
@pytest.mark.slow
def test_ten_thousand_steps_stay_usable(tmp_path: Path) -> None:
    made = long_run(10_000, 4)
    assert len(made.saves) == 10_000 and len(made.epochs) == 4
    html = tmp_path / "report.html"
    # What a person does, timed by the page itself: the whole run, moving, the next save, all saves in the table.
    acts = """
<script>
const spent = {};
function timed(name, act) { const t = performance.now(); act(); spent[name] = performance.now() - t; }
timed("whole run", () => document.getElementById("all").click());
timed("zoom", () => document.getElementById("in").click());
timed("last saves", () => document.getElementById("last").click());
timed("next", () => document.getElementById("next").click());
timed("all in the table", () => { const s = document.getElementById("show"); s.value = "all"; s.onchange(); });
timed("find", () => { const f = document.getElementById("find"); f.value = "99"; f.oninput(); });
const loaded = performance.now(); document.documentElement.dataset.spent = JSON.stringify({ ...spent, loaded });
</script></body>"""
    html.write_text(page(made).replace("</body>", acts))
    assert html.stat().st_size < 8 << 20
    document, log = opened(html, tmp_path / "profile")
    assert log == ""
    found = re.search(r'data-spent="([^"]*)"', document)
    assert found
    spent = json.loads(found[1].replace("&quot;", '"'))
    assert spent.pop("loaded") < 20_000 and max(spent.values()) < 1_000, spent
    assert document.count("<tr>") < 400
