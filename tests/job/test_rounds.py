"""What another process sends is decoded, or it is an error that names that process."""

from __future__ import annotations

from typing import Any

import pytest

import orchestrator as oc
from orchestrator.job import restore_rounds, startup_rounds
from orchestrator.job.restore_rounds import Chosen, Done, Exchange, ReadFailure, Sums
from orchestrator.job.rounds import Raised, Round, agree, as_error, gather
from orchestrator.job.startup_rounds import Arrival, FirstRestore, FirstSave, Opened, Sighting
from tests.support.peers import OfTwo, same

MESSAGES: list[tuple[Round[Any], list[Any]]] = [
    (restore_rounds.CHOICE, [None, Chosen(100, "{}\n")]),
    (restore_rounds.QUARANTINE, [None]),
    (
        restore_rounds.fits(3),
        [Done(), ReadFailure("Mismatch", "w: \u00fc"), ReadFailure("Damaged", "w", ("state/d/1",), ("w/c/0",))],
    ),
    (restore_rounds.was_read(3), [Done(), Exchange("00ff00ff"), ReadFailure("UnsafeKey", "")]),
    (restore_rounds.fingerprints(3), [Sums({}), Sums({0: "aa", 11: "bb"}, (("w", "w: is not"),))]),
    (restore_rounds.all_fingerprints(3), [{}, {0: {"w": "aa"}, 11: {}}]),
    (restore_rounds.stored_fingerprints(3), ["w: its stored elements"]),
    (restore_rounds.damage(3), [True, False]),
    (
        startup_rounds.arrival("open the run"),
        [Arrival(""), Arrival("aa", "bb", (7, "cc")), Arrival("aa", rejected=Raised("Damaged", "why"))],
    ),
    (startup_rounds.configurations("open the run"), [{}, {"save": "every(1)"}]),
    (startup_rounds.one_root("open the run"), [Sighting("file:///r"), Sighting("file:///r", sees=False)]),
    (startup_rounds.FIRST_SAVE, [FirstSave(3), FirstSave(3, described=True, mark="steps/.probe-1")]),
    (startup_rounds.FIRST_RESTORE, [FirstRestore("steps/.probe-1"), FirstRestore(rejected=Raised("Damaged", ""))]),
    (startup_rounds.ONE_ROOT, [Sighting("file:///r", rejected=Raised("StorageError", "EIO"))]),
    (startup_rounds.OPENED, [Opened(3, 42)]),
]
NAMES = [round_.name for round_, _ in MESSAGES]
GARBAGE: dict[str, list[Any]] = {  # of each round: what a process of another version might send
    restore_rounds.CHOICE.name: [3, {"step": "3", "head": ""}, {"step": 3}, {"step": 3, "head": "", "more": 1}],
    restore_rounds.QUARANTINE.name: [0, {}],
    restore_rounds.fits(3).name: [None, {}, {"read": True}, {"type": "begun"}, {"type": "failure", "kind": "Damaged"}],
    restore_rounds.was_read(3).name: [
        [],
        {"type": "exchange"},
        {"type": "failure", "kind": "", "text": "", "files": "d"},
    ],
    restore_rounds.fingerprints(3).name: [{}, {"by_replica": {"x": "aa"}}, {"by_replica": {}, "wrong": [["w"]]}],
    restore_rounds.all_fingerprints(3).name: [None, {"0": "aa"}, {"0": {"w": 1}}],
    restore_rounds.stored_fingerprints(3).name: [None, 1],
    restore_rounds.damage(3).name: [None, 1, "yes"],
    "open the run": [{}, {"is": "aa"}, {"configuration": "aa", "head": [7]}],
    "open the run: configurations": [[], {"save": 1}],
    "open the run: one root": [{}, {"url": "file:///r", "sees": "yes"}],
    startup_rounds.FIRST_SAVE.name: [{}, {"step": "3"}, {"step": 3, "rejected": ["Damaged", "why"]}],
    startup_rounds.FIRST_RESTORE.name: [{"opens": []}, {"mark": None}],
    startup_rounds.ONE_ROOT.name: [{"sees": True}],
    startup_rounds.OPENED.name: [None, {"epoch": 3}],
}


@pytest.mark.parametrize(("round_", "messages"), MESSAGES, ids=NAMES)
def test_every_message_of_a_round_arrives_as_it_was_sent(round_: Round[Any], messages: list[Any]) -> None:
    for message in messages:
        assert gather(OfTwo(same), round_, message, 1.0) == [message, message]
        assert agree(OfTwo(same), round_, 1.0, lambda message=message: message) == message


@pytest.mark.parametrize(("round_", "messages"), MESSAGES, ids=NAMES)
def test_garbage_of_a_peer_is_an_error_that_names_it(round_: Round[Any], messages: list[Any]) -> None:
    for garbage in GARBAGE[round_.name]:
        job = OfTwo(lambda name, value, garbage=garbage: garbage)
        with pytest.raises(
            oc.OrchestratorError, match=rf"{round_.name}: process 1 \(host-1\) answered .*; run the same"
        ):
            gather(job, round_, messages[0], 1.0)
        follows = OfTwo(lambda name, value, garbage=garbage: {"value": garbage}, process=1)
        with pytest.raises(oc.OrchestratorError, match=rf"{round_.name}: process 0 \(host-0\) answered"):
            agree(follows, round_, 1.0, lambda: messages[0])


@pytest.mark.parametrize("garbage", [None, 3, {"values": 1}, {"raised": {"kind": "Damaged"}}])
def test_a_decision_that_is_none_is_an_error_that_names_process_0(garbage: Any) -> None:
    with pytest.raises(oc.OrchestratorError, match=r"damage: process 0 \(host-0\) answered"):
        agree(OfTwo(lambda name, value: garbage, process=1), restore_rounds.damage(3), 1.0, lambda: True)


def fails() -> bool:
    raise oc.Damaged("w: is gone", files=["state/d/1"])


def test_what_process_0_raises_all_raise_and_nobody_else_decides() -> None:
    decides = OfTwo(same)
    with pytest.raises(oc.Damaged, match=r"^w: is gone$") as caught:
        agree(decides, restore_rounds.damage(3), 1.0, fails)
    assert caught.value.files == ("state/d/1",) and decides.met == ["restore: step 3 damage"]
    follows = OfTwo(lambda name, value: {"raised": {"kind": "Damaged", "text": "w: is gone"}}, process=1)
    with pytest.raises(oc.Damaged, match=r"^process 0: w: is gone$"):
        agree(follows, restore_rounds.damage(3), 1.0, lambda: pytest.fail("only process 0 decides"))


def test_a_decision_that_cannot_be_sent_is_raised_on_process_0_and_not_waited_for() -> None:
    decides = OfTwo(same)
    with pytest.raises(TypeError):
        agree(decides, Round("odd", object), 1.0, lambda: object())
    assert decides.met == ["odd"], "the others are told"


@pytest.mark.parametrize(
    ("kind", "raised", "text"),
    [
        ("Damaged", oc.Damaged, "process 3: why"),
        ("StepRetired", oc.StepRetired, "process 3: why"),
        ("Mismatch", oc.OrchestratorError, "process 3: Mismatch: why"),
        ("SaveFailed", oc.OrchestratorError, "process 3: SaveFailed: why"),
        ("KeyError", oc.OrchestratorError, "process 3: KeyError: why"),
        ("printable", oc.OrchestratorError, "process 3: printable: why"),
        ("EXIT_OK", oc.OrchestratorError, "process 3: EXIT_OK: why"),
    ],
)
def test_another_processs_error_is_of_its_kind_if_it_is_one_of_ours(
    kind: str, raised: type[Exception], text: str
) -> None:
    error = as_error(3, Raised(kind, "why"))
    assert (type(error), str(error)) == (raised, text)
