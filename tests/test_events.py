"""Events: one schema, files that a crash or a full disk cannot turn into harm, and what they add up to."""

from __future__ import annotations

import os
import re
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from runs import fill, now

import orchestrator as oc
from orchestrator import eventlog, events, protocol
from orchestrator.eventlog import EventLog, Line, Tail, decode, encode, read
from orchestrator.story import Story

DOCS = Path(__file__).parent.parent / "docs" / "reference" / "events.md"
VALUES: dict[str, Any] = {"int": 7, "float": 0.25, "str": "x"}


def sample(kind: type[events.Event]) -> events.Event:
    return kind(**{field.name: VALUES[str(field.type)] for field in fields(kind)})


def line(event: events.Event, time: float = 1.0, process: int = 0, epoch: int = 1) -> Line:
    return Line(time, process, f"host-{process}", "node", epoch, event)


@pytest.mark.parametrize("kind", events.KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_event_comes_back_from_its_line(kind: type[events.Event]) -> None:
    told = line(sample(kind), epoch=7)
    assert decode(encode(told)) == told


def test_the_page_names_every_event_with_its_fields_and_every_phase_and_cause() -> None:
    text = DOCS.read_text()
    rows = {row[0]: re.findall(r"`(\w+)`", row[1]) for row in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.M)}
    assert rows == {name: [field.name for field in fields(kind)] for name, kind in events.KINDS.items()}
    causes = {cause for _, cause in protocol._CAUSES} | {"failed", "hung"}
    assert {word for word in (*events.PHASES, *causes) if f"`{word}`" not in text} == set()


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b'{"v":1,"event":"Com', b"[1]", b'{"v":2,"event":"Closed"}', b'{"v":1,"event":"Later","time":1}'),
        encode(line(sample(events.Committed))).replace(b'"step":7', b'"step":"7"'),
    ],
)
def test_a_line_that_cannot_be_read_is_left_out(text: bytes) -> None:
    assert decode(text) is None


def test_a_field_added_by_a_later_version_is_ignored_and_a_missing_one_has_its_default() -> None:
    newer = encode(line(events.Closed(2))).replace(b'"failures":2', b'"failures":2,"more":[1]')
    assert decode(newer) == line(events.Closed(2))
    assert all(field.default is MISSING for field in fields(events.Committed))
    older = encode(line(events.Restored(1, "a", 2.0, 3))).replace(b',"array_s":0.0', b"")
    assert decode(older) == line(events.Restored(1, "a", 2.0, 3))


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
    names = [type(line.event).__name__ for line in lines]
    assert names.count("SaveStarted") == 2  # anywhere among the phases, which come from another thread
    assert [name for name in names if name not in ("Alive", "SaveStarted")] == [
        "EpochOpened",
        *[*["SavePhase"] * 5, "Committed"] * 2,
        *["Closed", "EpochOpened", "Restored", "Closed"],
    ]
    phases = [line.event.phase for line in lines if isinstance(line.event, events.SavePhase)]
    assert phases == [*events.PHASES] * 2
    (restored,) = [line.event for line in lines if isinstance(line.event, events.Restored)]
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
    assert eventlog.directory_of("gs://bucket/run", None) is None
    assert eventlog.directory_of("gs://bucket/run", "/var/events") == "/var/events"
    assert eventlog.directory_of("file:///data/run", None) == "/data/run/events"


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
    os.mkfifo(tmp_path / "00000.jsonl")  # opening it for writing waits for a reader that never comes
    log = EventLog(str(tmp_path), process=0, host="h", epoch=1)
    started = time.monotonic()
    for step in range(eventlog._QUEUE_MAX + 500):
        log.write(events.Alive("training", step))
    assert log.dropped >= 499
    log.close()
    assert time.monotonic() - started < eventlog._CLOSE_S + 5
    reader = os.open(tmp_path / "00000.jsonl", os.O_RDONLY | os.O_NONBLOCK)  # lets the thread end
    os.close(reader)


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


def phase(name: str, elapsed_s: float, written: int = 0, process: int = 0, epoch: int = 1) -> Line:
    event = events.SavePhase(5, f"e{epoch:04d}-a01", name, elapsed_s, written)
    return line(event, time=100.0 + elapsed_s, process=process, epoch=epoch)


def test_a_story_tells_each_hosts_state_bytes_and_rate() -> None:
    story = Story().tell([line(events.EpochOpened(1, "r", 2), 99.0), line(events.EpochOpened(1, "r", 2), 99.0, 1)])
    story.tell([phase("staging", 0.0), phase("writing", 1.0), phase("writing", 3.0, 400), phase("staging", 0.0, 0, 1)])
    first, second = story.hosts[0], story.hosts[1]
    assert (first.doing, first.step, first.written_bytes, first.rate) == ("writing", 5, 400, 200.0)
    assert (first.since, first.heard, second.doing) == (101.0, 103.0, "staging")
    story.tell([phase("sealing", 4.0, 600), phase("waiting", 5.0, 600)])
    story.tell([line(events.Committed(5, "e0001-a01", 9.0, 1), 109.0)])
    save = story.saves[5, "e0001-a01", 0]
    assert [save.seconds(name) for name in events.PHASES] == [1.0, 3.0, 1.0, 4.0, 0.0]
    assert (save.began, save.ended_s, save.outcome, save.write_rate) == (100.0, 9.0, "committed", 150.0)
    assert first.doing == "training" and story.saves[5, "e0001-a01", 1].ended_s is None


def test_a_newer_incarnation_takes_the_place_of_the_old_ones_hosts_and_a_zombie_changes_nothing() -> None:
    story = Story().tell([phase("writing", 1.0), phase("writing", 1.0, process=1)])
    story.tell([line(events.EpochOpened(2, "r", 1), 200.0, epoch=2), phase("waiting", 150.0)])
    assert story.epoch == 2 and set(story.hosts) == {0} and story.hosts[0].doing == "starting"
    story.tell([line(events.Closed(0), 300.0, epoch=2)])
    assert story.hosts[0].left and story.hosts[0].doing == "left"
