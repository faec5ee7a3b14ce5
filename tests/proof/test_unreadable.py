"""Could not be read is not damaged: ways of not being able to read, in a bucket and on a disk (invariants 7 and 8).

`python -m tests.proof.unreadable` plays the whole table; here are those that stand for all others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage
from tests.proof import unreadable_child as child
from tests.proof.unreadable import Bench, play_all
from tests.proof.unreadable_judge import Outcome, judge
from tests.proof.unreadable_ways import DAMAGED, GS, LOCAL, MAYBE, QUICK, UNREAD, WAYS, Way

pytestmark = pytest.mark.jobs  # many processes, most of which wait


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="unreadable-") as folder:  # pytest's own is closed to other users
        made = Bench(Path(folder))
        yield made
        made.close()


@pytest.fixture(scope="module")
def outcomes(bench: Bench, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """Of the ways that this session asks for, played beside each other."""
    mine = [item for item in request.session.items if item.path == request.path and "outcomes" in item.fixturenames]
    asked = {item.callspec.params["way"].label for item in mine}
    return play_all(bench, [way for way in QUICK if way.label in asked and (bench.shim or not way.needs_shim)])


@pytest.mark.parametrize("way", QUICK, ids=lambda way: way.label)
def test_what_cannot_be_read_raises_and_what_is_damaged_is_quarantined(outcomes: dict[str, Outcome], way: Way) -> None:
    if way.label not in outcomes:
        pytest.skip("needs a C compiler")
    assert judge(outcomes[way.label]) == []


def test_the_table_has_at_least_25_ways_in_each_place() -> None:
    for ways, least in ((WAYS, 80), (QUICK, 30)):
        assert len({way.label for way in ways}) == len(ways)
        for place in (GS, LOCAL):
            assert sum(way.place == place and way.expected in (UNREAD, MAYBE) for way in ways) >= least


GOOD = Outcome(
    Way(GS, "x", UNREAD),
    {
        "doctor": {"code": 1, "json": {"findings": [{"level": "bad", "text": "no", "do": "try again"}]}},
        "reader": {"kinds": ["Unavailable", "StorageError"], "text": "503"},
        "verify": {"code": 1, "json": [{"step": 2, "problems": [], "unread": ["503"]}]},
        "restore": {"kinds": ["Unavailable", "StorageError"], "text": "503"},
    },
    events=["opened-epoch"],
    back="step 2",
    lifted="step 2",
)
FOUND = Outcome(
    Way(GS, "x", DAMAGED),
    {
        "doctor": {"code": 4},
        "reader": {"step": 1, "right": True},
        "verify": {"code": 4},
        "restore": {"step": 1, "right": True},
    },
    events=["quarantined", "opened-epoch", "restored"],
    reasons=["state/d/0: 1 bytes, the manifest says 2"],
    quarantined=[2],
    lifted="step 2",
)


def _with(outcome: Outcome, probe: str, **told: Any) -> Outcome:
    return replace(outcome, probes={**outcome.probes, probe: told})


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (_with(GOOD, "restore", step=1, right=True), "restore: restored 1"),
        (_with(GOOD, "reader", step=1, right=True), "reader: restored 1"),
        (_with(GOOD, "restore", step=2, right=False), "wrong bits"),
        (_with(GOOD, "restore", step=None), "as a new run"),
        (_with(GOOD, "restore", kinds=["Damaged", "OrchestratorError"], text="bad"), "raised Damaged"),
        (_with(GOOD, "verify", code=0, json=[]), "exit code 0"),
        (_with(GOOD, "verify", code=4, json=[{"problems": ["x"], "unread": []}]), "verify: damaged"),
        (_with(GOOD, "verify", code=1, json=[{"problems": [], "unread": []}]), "does not say what"),
        (_with(GOOD, "verify", kinds=["ValueError"], text="oh"), "a command raised ValueError"),
        (_with(GOOD, "doctor", code=4, json={"findings": [{"level": "damage", "text": "x", "do": ""}]}), "damage"),
        (
            _with(GOOD, "doctor", code=1, json={"findings": [{"level": "bad", "text": "", "do": "quarantine it"}]}),
            "advises",
        ),
        (replace(GOOD, quarantined=[2]), "quarantined [2]"),
        (replace(GOOD, events=["retired"]), "journalled: ['retired']"),
        (replace(GOOD, lost=["steps/x"]), "lost: steps/x"),
        (replace(GOOD, back="step 1"), "when the cause is gone: step 1"),
        (replace(GOOD, seconds={"restore": 1000.0}), "took 1000 s"),
        (replace(GOOD, probes={}), "restore: no answer"),
        (replace(GOOD, way=Way(GS, "x", rules=({},))), "nobody has met it"),
        (_with(FOUND, "restore", step=2, right=True), "restore: step 2"),
        (_with(FOUND, "reader", step=2, right=True), "reader: step 2"),
        (_with(FOUND, "verify", code=1), "verify: exit code 1"),
        (replace(FOUND, quarantined=[]), "quarantined: []"),
        (replace(FOUND, quarantined=[1, 2]), "quarantined: [1, 2]"),
        (replace(FOUND, reasons=["no"]), "names nothing"),
        (replace(FOUND, lifted="step 1"), "when all is well again: step 1"),
    ],
)
def test_the_judge_sees_every_breach(outcome: Outcome, said: str) -> None:
    assert judge(GOOD) == judge(FOUND) == []
    assert said in "; ".join(judge(outcome))


# What a process beside a job cannot read.

UNUSABLE = [
    Way(GS, "credentials", environ={"GOOGLE_APPLICATION_CREDENTIALS": "{external}"}),
    Way(LOCAL, "a disk that fails", rules=(r"read 5 0 0 steps/.*/d/[0-9a-f]+$",)),
]


@pytest.mark.parametrize("way", UNUSABLE, ids=lambda way: way.label)
def test_a_job_loses_no_step_to_what_a_process_beside_it_cannot_read(bench: Bench, way: Way) -> None:
    """It saves and retires all the while; `verify --all` and a reader fail; and so does its own next incarnation."""
    if way.needs_shim and not bench.shim:
        pytest.skip("needs a C compiler")
    run = bench.empty(way.place)
    options = oc.Options(async_save=False, on_save_failure="raise")
    with (
        ThreadPoolExecutor(1) as pool,
        oc.Agent(run.url, save=oc.every(1), keep=oc.last(3), options=options) as agent,
    ):
        for step in range(4):
            assert agent.save(step, child.saved_state(step))
        told = bench.probe(way, run, ("verify", "reader"))
        assert told["verify"]["code"] == 1 and sum(bool(one["unread"]) for one in told["verify"]["json"]) == 3
        assert "StorageError" in told["reader"]["kinds"], told["reader"]
        beside: Future[Any] = pool.submit(bench.probe, way, run, ("verify", "reader"))
        while not beside.done() or step < 6:
            step += 1
            assert agent.save(step, child.saved_state(step))
            time.sleep(0.5)
        told = beside.result()
        assert told["verify"]["code"] in (0, 1), told["verify"]["text"]  # 0: all have been retired meanwhile
        assert {"StorageError", "StepRetired"} & set(told["reader"]["kinds"]), told["reader"]
    for _ in range(2):
        told = bench.probe(way, run, ("restore",))
        assert "StorageError" in told["restore"]["kinds"], told["restore"]
    store = JournalStore(open_storage(run.url), "test")
    kept: list[int] = []
    for head in store.entries():
        assert all(live.restorable for live in head.live)
        assert head.event.kind in ("opened-epoch", "committed", "retired", "collected", "verified", "restored")
        if head.event.kind == "committed":
            kept = [*kept, head.event.step][-3:]
        assert {live.step for live in head.live} >= set(kept)
    with oc.Agent(run.url, options=options) as agent:
        restored = agent.restore(child.LIKE)
    assert restored and restored.step == step and child.is_state(restored.state, step)
    assert kept == [step - 2, step - 1, step]
    for step in kept:
        assert child.is_state(oc.open_run(run.url).restore(step=step).state, step)
