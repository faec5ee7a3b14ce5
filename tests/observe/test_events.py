"""Events: one schema, files that a crash or a full disk cannot turn into harm, and what they add up to."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import msgspec
import pytest
from rich.console import Console

import orchestrator as oc
from orchestrator.cli import main, report, run_report, watch
from orchestrator.observe import event_log, events
from orchestrator.observe.event_log import EventLog, LoggedEvent, Reach, Tail, decode, encode, read
from orchestrator.observe.timeline import Timeline
from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Cause
from tests.support.runs import fill, now, store_of

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "events.md"
VALUES: dict[str, Any] = {"int": 7, "float": 0.25, "str": "x"}


def sample(kind: type[events.Event]) -> events.Event:
    values = {field.name: VALUES[str(field.type)] for field in fields(kind)}
    return kind(**(values | {"attempt": "e0001-a01"} if "attempt" in values else values))


def line(event: events.Event, time: float = 1.0, process: int = 0, epoch: int = 1) -> LoggedEvent:
    return LoggedEvent(time, process, f"host-{process}", "node", epoch, event)


@pytest.mark.parametrize("kind", events.KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_event_comes_back_from_its_line(kind: type[events.Event]) -> None:
    told = line(sample(kind), epoch=7)
    assert decode(encode(told)) == told


def test_the_page_names_every_event_with_its_fields_and_every_phase_and_cause() -> None:
    text = DOCS.read_text()
    rows = {row[0]: re.findall(r"`(\w+)`", row[1]) for row in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.M)}
    assert rows == {name: [field.name for field in fields(kind)] for name, kind in events.KINDS.items()}
    assert {word for word in (*events.PHASES, *Cause) if f"`{word}`" not in text} == set()


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b'{"v":1,"event":"Com', b"[1]", b'{"v":2,"event":"Closed"}', b'{"v":1,"event":"Later","time":1}'),
        encode(line(sample(events.SaveCommitted))).replace(b'"step":7', b'"step":"7"'),
    ],
)
def test_a_line_that_cannot_be_read_is_left_out(text: bytes) -> None:
    assert decode(text) is None


def test_a_field_added_by_a_later_version_is_ignored_and_a_missing_one_has_its_default() -> None:
    newer = encode(line(events.Closed(2))).replace(b'"failures":2', b'"failures":2,"more":[1]')
    assert decode(newer) == line(events.Closed(2))
    assert all(field.default is MISSING for field in fields(events.SaveStarted))
    older = encode(line(events.StepRestored(1, "e0001-a01", 2.0, 3))).replace(b',"array_s":0.0', b"")
    assert decode(older) == line(events.StepRestored(1, "e0001-a01", 2.0, 3))


def test_the_former_name_of_a_request_made_again_is_still_read() -> None:
    now_told = line(events.Retried("store", 2, "get", "a/b", "http 503", 0.5))
    where = b'"time":1.0,"process":0,"host":"host-0","machine":"node","epoch":1'
    own = b'"operation":"get","name":"a/b","reason":"http 503","tries":2,"wait_s":0.5'
    assert decode(b'{"v":1,"event":"StoreRetried",%b,%b}' % (where, own)) == now_told


def test_an_agent_writes_its_saves_and_restores_beside_the_run(root: Path) -> None:
    fill(root, 0, 1)
    with oc.Agent(root, options=now()) as agent:
        agent.restore({"w": jnp.zeros(512), "count": 0})
    lines = read(str(root / "events"))
    names = [events.name_of(line.event) for line in lines]
    assert names.count("SaveStarted") == 2  # anywhere among the phases, which come from another thread
    assert [name for name in names if name not in ("Alive", "Pulse", "SaveStarted")] == [
        "EpochOpened",
        *[*["SavePhase"] * 5, "Committed"] * 2,
        *["Closed", "EpochOpened", "Restored", "Closed"],
    ]
    phases = [line.event.phase for line in lines if isinstance(line.event, events.SavePhase)]
    assert phases == [*events.PHASES] * 2
    (restored,) = [line.event for line in lines if isinstance(line.event, events.StepRestored)]
    assert restored.read_bytes == 2048 and 0 < restored.array_s <= restored.elapsed_s
    assert {(line.process, line.epoch) for line in lines} == {(0, 1), (0, 2)}


@pytest.mark.parametrize("chosen", ["elsewhere", ""])
def test_events_go_where_the_option_says_or_nowhere(root: Path, tmp_path: Path, chosen: str) -> None:
    directory = str(tmp_path / chosen) if chosen else ""
    with oc.Agent(root, options=now(events_dir=directory)) as agent:
        agent.save(0, {"w": jnp.zeros(4)})
    assert not (root / "events").exists()
    assert bool(read(directory or None)) == bool(chosen)


def test_an_object_store_has_no_default_place() -> None:
    assert event_log.directory_of("gs://bucket/run", None) is None
    assert event_log.directory_of("gs://bucket/run", "/var/events") == "/var/events"
    assert event_log.directory_of("file:///data/run", None) == "/data/run/events"


def test_files_stay_within_their_bound_and_the_newest_lines_stay(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), process=3, host="h", epoch=1, file_bytes=2000)
    for step in range(200):
        log.write(events.Alive("training", step))
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"00003.jsonl", "00003.old.jsonl"} and max(sizes.values()) <= 2000
    steps = [line.event.step for line in read(str(tmp_path)) if isinstance(line.event, events.Alive)]
    assert steps == list(range(200))[-len(steps) :] and len(steps) > 10 and log.dropped == 0


def test_a_directory_that_cannot_be_written_is_one_warning_and_no_harm(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with oc.Agent(root, options=now(events_dir=str(tmp_path / "file"))) as agent:
        agent.save(0, {"w": jnp.zeros(4)})
        assert agent.all_steps() == [0]
    assert sum("events are not written" in record.message for record in caplog.records) == 1


def test_a_log_that_hangs_loses_lines_and_never_blocks(tmp_path: Path) -> None:
    hanging = threading.Event()

    class Hanging(EventLog):
        def _append(self, body: bytes, key: str, file_bytes: int) -> None:
            hanging.wait(60)

    log = Hanging(str(tmp_path), process=0, host="h", epoch=1)
    started = time.monotonic()
    for step in range(event_log._QUEUE_MAX + 500):
        log.write(events.Alive("training", step))
    assert log.dropped >= 499
    log.close()
    assert time.monotonic() - started < event_log._CLOSE_S + 5
    hanging.set()


def test_a_tail_gives_each_line_once_across_a_rotation_and_waits_for_a_line_to_be_whole(tmp_path: Path) -> None:
    tail = Tail(str(tmp_path))
    assert tail.more() == []
    body = [encode(line(events.Alive("training", step), time=float(step))) for step in range(4)]
    file = tmp_path / "00000.jsonl"
    file.write_bytes(body[0] + body[1][:10])
    assert [each.time for each in tail.more()] == [0.0]
    file.write_bytes(body[0] + body[1])
    file.rename(tmp_path / "00000.old.jsonl")
    file.write_bytes(body[2])
    assert [each.time for each in tail.more()] == [1.0, 2.0]
    with file.open("ab") as more:
        more.write(body[3])
    assert [each.time for each in tail.more()] == [3.0] and tail.more() == []


# What else may lie there.


def put(kind: str, path: Path) -> None:
    match kind:
        case "a directory":
            path.mkdir()
        case "a named pipe":
            os.mkfifo(path)
        case "a symbolic link":
            path.symlink_to("/dev/zero")
        case "a bad byte":
            path.write_bytes(encode(line(events.Closed(1))).replace(b"host-0", b"h\xffst-0"))
        case "no JSON":
            path.write_bytes(b"\0" * 1000 + b"\n" + b"[" * 100_000 + b"\n" + b'{"v":1,"event":"Closed","time":NaN}\n')
        case "200 GB":
            with path.open("wb") as file:
                file.truncate(200 << 30)
                file.seek(0, os.SEEK_END)
                file.write(b"\n" + encode(line(events.Closed(1))))


@pytest.mark.parametrize("kind", ["a directory", "a named pipe", "a symbolic link", "a bad byte", "no JSON", "200 GB"])
def test_what_is_no_event_is_skipped_and_counted_and_breaks_no_command(
    kind: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, 0, 1)
    store_of(root).append(partial(journal.trusted, attempt=AttemptId(1, "e0001-a01"), trust="verified"))
    whole = len(read(str(root / "events")))
    put(kind, root / "events/00009.jsonl")
    (root / "events/00008.jsonl").mkdir()
    tail = Tail(str(root / "events"))
    started = time.monotonic()
    assert len(tail.more()) == whole + (kind == "200 GB")
    assert time.monotonic() - started < 10
    assert "is a directory" in tail.problems["00008.jsonl"]
    problem = tail.problems.get("00009.jsonl", "")
    assert kind in problem or tail.skipped or "only the last" in problem
    assert tail.more() == []
    for words in (["watch", "--once"], ["report", f"--output={root}.html"], ["plan", "--mesh=d=1"], ["doctor"]):
        assert main.main(["orchestrator", words[0], str(root), *words[1:]]) == 0
    said = capsys.readouterr().out
    assert "00008.jsonl: is a directory" in said and "WARN    events" in said


def test_events_behind_a_link_are_neither_written_nor_read(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("# rc\n")
    (root / "events").mkdir(parents=True)
    (root / "events/00000.jsonl").symlink_to(theirs)
    fill(root, 1)
    shutil.rmtree(root / "events")
    (tmp_path / "folder").mkdir()
    (root / "events").symlink_to(tmp_path / "folder")
    fill(root, 2)
    assert theirs.read_text() == "# rc\n" and list((tmp_path / "folder").iterdir()) == []
    assert sum("events are not written" in record.message for record in caplog.records) == 2
    assert sum("is a symbolic link" in record.message for record in caplog.records) == 2
    assert read(str(root / "events")) == []


@pytest.mark.parametrize("obstacle", [os.mkfifo, os.mkdir], ids=["a named pipe", "a directory"])
def test_a_log_that_cannot_be_a_file_is_one_warning_and_never_blocks(
    obstacle: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle(tmp_path / "00000.jsonl")
    log = EventLog(str(tmp_path), process=0, host="h", epoch=1)
    for step in range(10):
        log.write(events.Alive("training", step))
    log.close()
    assert log.dropped == 10 and not log._thread.is_alive()
    assert sum("events are not written" in record.message for record in caplog.records) == 1


ODD: list[Any] = [None, True, 0, -1, -2, 2**53, 2**63 - 1, -(2**63), 2**64, 10**30, 1e308, -1e308, 1e15, 0.5, "", "x"]
ODD += ["../..", "e0001-a01", "zz/..", "é", "\0", "\x1b[2J", [], {}, [1], "x" * 2000, "[bold]", "</script>"]


def test_events_with_any_values_break_no_reader(root: Path) -> None:
    """Seeded: one field after another of each kind of event replaced, alone and among real ones."""
    fill(root, 1, 2)
    real = [each for path in (root / "events").iterdir() for each in path.read_bytes().splitlines()]
    made = [encode(line(sample(kind))).rstrip() for kind in events.KINDS.values()]
    random = Random(16)
    store = store_of(root)
    head = store.require_head()
    texts: list[bytes] = []
    for text in [*real, *made]:
        for name in msgspec.json.decode(text):
            value = random.choice(ODD)
            texts.append(json.dumps({**msgspec.json.decode(text), name: value}).encode())
    for _ in range(40):
        lines = [decode(text) for text in [*real, *random.sample(texts, 10)]]
        timeline = Timeline().add(sorted((each for each in lines if each), key=lambda each: each.time))
        Console(file=io.StringIO()).print(*watch.show(watch.summarize("run", head, timeline, time.time()), {}))
        report.page(run_report.build(store, timeline, time.time()))
    (root / "events/00007.jsonl").write_bytes(b"\n".join(texts))
    for words in (["watch", "--once"], ["report", f"--output={root}.html"], ["plan", "--mesh=d=1"], ["doctor"]):
        assert main.main(["orchestrator", words[0], str(root), *words[1:]]) in (0, 1), words


def phase(name: str, elapsed_s: float, written: int = 0, process: int = 0, epoch: int = 1) -> LoggedEvent:
    event = events.SavePhase(5, f"e{epoch:04d}-a01", name, elapsed_s, written)
    return line(event, time=100.0 + elapsed_s, process=process, epoch=epoch)


def test_a_story_tells_each_hosts_state_bytes_and_rate() -> None:
    timeline = Timeline().add([line(events.EpochOpened(1, "r", 2), 99.0), line(events.EpochOpened(1, "r", 2), 99.0, 1)])
    timeline.add(
        [phase("staging", 0.0), phase("writing", 1.0), phase("writing", 3.0, 400), phase("staging", 0.0, 0, 1)]
    )
    first, second = timeline.hosts[0], timeline.hosts[1]
    assert (first.doing, first.step, first.written_bytes, first.rate) == ("writing", 5, 400, 200.0)
    assert (first.since, first.last_seen, second.doing) == (101.0, 103.0, "staging")
    timeline.add([phase("sealing", 4.0, 600), phase("waiting", 5.0, 600)])
    timeline.add([line(events.SaveCommitted(5, "e0001-a01", 9.0, 1), 109.0)])
    save = timeline.saves[5, "e0001-a01", 0]
    assert [save.seconds(name) for name in events.PHASES] == [1.0, 3.0, 1.0, 4.0, 0.0]
    assert (save.began, save.ended_s, save.outcome, save.written_bytes) == (100.0, 9.0, "committed", 600)
    assert first.doing == "training" and timeline.saves[5, "e0001-a01", 1].ended_s is None


def test_a_newer_incarnation_replaces_the_hosts_of_the_old_one_and_a_zombie_none() -> None:
    timeline = Timeline().add([phase("writing", 1.0), phase("writing", 1.0, process=1)])
    timeline.add([line(events.EpochOpened(2, "r", 1), 200.0, epoch=2), phase("waiting", 150.0)])
    assert timeline.epoch == 2 and set(timeline.hosts) == {0} and timeline.hosts[0].doing == "starting"
    timeline.add([line(events.Closed(0), 300.0, epoch=2)])
    assert timeline.hosts[0].left and timeline.hosts[0].doing == "left"


def test_a_look_at_what_goes_on_now_reads_the_end_of_each_file_and_how_the_job_was_opened(tmp_path: Path) -> None:
    opened = [encode(line(events.EpochOpened(epoch, "r", 7), 10.0 * epoch, epoch=epoch)) for epoch in (1, 2)]
    steps = [encode(line(events.Alive("training", step), 100.0 + step, epoch=2)) for step in range(20_000)]
    (tmp_path / "00000.jsonl").write_bytes(b"".join([*opened, *steps]))
    (tmp_path / "00001.jsonl").write_bytes(b"".join(steps))
    tail = Tail(str(tmp_path), Reach(4096, 8192))
    lines = tail.more()
    assert len(lines) < 100 and tail.skipped == 0 and tail.problems == {}
    assert [each.event for each in lines if isinstance(each.event, events.EpochOpened)] == [
        events.EpochOpened(2, "r", 7)
    ]
    assert {each.event.step for each in lines[-2:] if isinstance(each.event, events.Alive)} == {19_999}
    with (tmp_path / "00001.jsonl").open("ab") as file:
        file.write(steps[0] * 1000)  # more than a first look takes: what comes later is read whole
    assert len(tail.more()) == 1000
    assert len(read(str(tmp_path))) == 41_002


@pytest.mark.parametrize(
    ("processes", "each", "of_all", "events_of_others"),
    [(3, 100, 1000, 100), (100, 100, 5000, 50), (100, 100, 1000, 0), (400, 100, 1, 0)],
    ids=["all of few", "a share of many", "at least a save", "however many there are"],
)
def test_of_many_hosts_the_newest_events_are_read_and_all_of_the_first(
    tmp_path: Path, processes: int, each: int, of_all: int, events_of_others: int
) -> None:
    """In lines; `each` is in two files, the older one shorter."""
    told = [encode(line(events.Alive("training", 10_000 + at), 1000.0 + at, 100)) for at in range(each)]
    bytes_of = {len(text) for text in told}
    (size,) = bytes_of
    for process in range(processes):
        lines = [text.replace(b'"process":100', b'"process":%3d' % process) for text in told]
        (tmp_path / f"{process:05d}.old.jsonl").write_bytes(b"".join(lines[: each // 4]))
        (tmp_path / f"{process:05d}.jsonl").write_bytes(b"".join(lines[each // 4 :]))
    tail = Tail(str(tmp_path), Reach(each * size, of_all * size * 4 // 3))
    least = event_log._LEAST_BYTES // size
    found: dict[int, list[float]] = {}
    for one in tail.more():
        found.setdefault(one.process, []).append(one.time - 1000.0)
    assert found[0] == list(range(each))
    expected = max(least, events_of_others) if processes > 3 else each
    assert set(found) == set(range(processes))
    for process in range(1, processes):
        assert found[process] == list(range(each - len(found[process]), each))
        assert abs(len(found[process]) - expected) <= 2, (process, len(found[process]), expected)
    cut = {process: 1000.0 + times[0] for process, times in found.items() if times[0]}
    assert tail.cut_at == cut and (len(cut) == processes - 1) == (processes > 3) and tail.skipped == 0
    assert tail.more() == []


def known(processes: dict[int, tuple[float, float]], silent: dict[int, tuple[float, float]]) -> list[LoggedEvent]:
    """Of each process a pulse every second of a stretch of time, but for the seconds in which it was silent."""
    return sorted(
        (
            line(events.Pulse("training", 1, 1.0, 0.1, "", 9, 1.0), float(at), process)
            for process, (first, end) in processes.items()
            for at in range(int(first), int(end))
            if not silent.get(process, (0.0, 0.0))[0] < at < silent.get(process, (0.0, 0.0))[1]
        ),
        key=lambda each: each.time,
    )


ALWAYS, LATELY, GAP = (0.0, 200.0), (150.0, 200.0), (40.0, 80.0)


@pytest.mark.parametrize(
    ("processes", "silent", "expected"),
    [
        ({0: ALWAYS, 1: ALWAYS, 2: ALWAYS}, {1: GAP}, [1]),
        ({0: ALWAYS, 1: ALWAYS}, {0: GAP, 1: GAP}, []),
        ({0: ALWAYS, 1: ALWAYS, 2: LATELY}, {1: GAP}, [1]),
        ({0: ALWAYS, 1: LATELY, 2: LATELY}, {0: GAP}, None),
        ({0: ALWAYS, 1: LATELY, 2: LATELY}, {}, None),
        ({0: LATELY, 1: LATELY}, {}, None),
    ],
    ids=["one", "all", "one, another not read", "the only one that was read", "not who was read", "nobody was read"],
)
def test_what_was_not_read_is_not_silence(
    processes: dict[int, tuple[float, float]], silent: dict[int, tuple[float, float]], expected: list[int] | None
) -> None:
    """An older event of each says that it was there; its pulses of then are gone."""
    there = [line(events.Alive("training", 0), 1.0, process) for process in processes]
    timeline = Timeline().add(sorted([*there, *known(processes, silent)], key=lambda each: each.time))
    found = timeline.progress.silent(1, *GAP)
    assert (None if found is None else [one.process for one in found]) == expected


def test_a_command_says_what_happened_once(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[events.Event] = []
    end = events.subscribe(heard.append)
    rejected = events.CredentialsRejected("key.json", "revoked")
    try:
        with events.unlogged():
            events.emit(rejected)
            assert main.main(["orchestrator", "ls", "/nowhere"]) == 3  # which leaves it as it was
            events.emit(rejected)
        assert caplog.text == "" and heard == [rejected, rejected]
        events.emit(rejected)
        assert "CredentialsRejected name=key.json" in caplog.text
    finally:
        end()
