"""Who holds which leaf, as rules: what process 0's account and another process's own view make of a leaf."""

from __future__ import annotations

import pytest
from msgspec import structs

from orchestrator.errors import UsageError
from orchestrator.rules import holders
from orchestrator.rules.attempt import Attempt, Phase, ReceiptsRead, advance
from orchestrator.rules.holders import View
from orchestrator.rules.records import Box, Cause, Held, Receipt
from tests.support import builders
from tests.support.builders import leaf

OWN, P0, P1, P2 = None, ((0, 1),), ((1, 2),), ((2, 3),)
ALL, LATER = ((0, 3),), ((1, 3),)


@pytest.mark.parametrize(
    ("processes", "as_ranges", "label"),
    [
        ([0], ((0, 1),), "process 0"),
        ([2, 0, 1], ((0, 3),), "processes 0-2"),
        ([5, 0, 1, 3, 5], ((0, 2), (3, 4), (5, 6)), "processes 0-1, 3, 5"),
        (range(0, 20, 2), tuple((at, at + 1) for at in range(0, 20, 2)), "processes 0, 2, 4, 6, 8, ..."),
    ],
)
def test_processes_are_named_as_ranges(processes: list[int], as_ranges: holders.Ranges, label: str) -> None:
    assert holders.ranges(processes) == as_ranges
    assert holders.label_of(as_ranges) == label


@pytest.mark.parametrize(
    ("on_process_0", "on_process_1", "fits"),
    [
        (OWN, OWN, True),  # numpy, Python
        (OWN, P1, True),  # numpy there, an array of its own here
        (P0, P1, True),  # each has an array of its own
        (P0, OWN, True),
        (P0, P0, True),  # a stage of process 0
        (P1, P1, True),  # a stage of this process
        (P2, P2, True),  # of a third
        (ALL, ALL, True),
        (LATER, LATER, True),
        (OWN, ALL, False),
        (P0, P2, False),
        (P1, OWN, False),
        (P2, P1, False),
        (P2, OWN, False),
        (ALL, P1, False),
        (ALL, OWN, False),
        (ALL, LATER, False),
    ],
)
def test_a_process_accepts_an_account_only_if_its_own_view_of_the_leaf_goes_with_it(
    on_process_0: View, on_process_1: View, fits: bool
) -> None:
    leaves = [leaf("a"), leaf("b")]
    account = holders.held(leaves, [ALL, on_process_0])
    if fits:
        holders.check_views(account, leaves, [ALL, on_process_1], 1)
        return
    with pytest.raises(UsageError, match=r"^b: process 0 has it .*, process 1 has it .*\. All processes must give"):
        holders.check_views(account, leaves, [ALL, on_process_1], 1)


def test_states_of_different_sizes_are_rejected_and_many_leaves_are_named_briefly() -> None:
    leaves = [leaf(f"w{number}") for number in range(1000)]
    account = holders.held(leaves, [ALL] * 1000)
    assert account == (Held(1000, ALL),), "equal leaves in a row are one entry"
    with pytest.raises(UsageError, match="a state of 1000 leaves, process 1 one of 999"):
        holders.check_views(account, leaves[1:], [ALL] * 999, 1)
    with pytest.raises(UsageError) as caught:
        holders.check_views(account, leaves, [OWN] * 1000, 1)
    assert "and 995 more" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ((), ""),
        ((Held(2, ALL),), ""),
        ((Held(1, None, (4,)), Held(1, P2)), ""),
        ((Held(1, ALL),), "not as many leaves"),
        ((Held(3, ALL), Held(-1, ALL)), "a run of -1 leaves"),
        ((Held(2, ((2, 1),)),), "expected ranges"),
        ((Held(2, ((0, 2), (1, 3))),), "expected ranges"),
        ((Held(2, ((0, 4),)),), "expected ranges"),
        ((Held(2, None, (0,)),), "chunks of"),
    ],
)
def test_a_stored_account_is_checked_before_it_is_used(held: tuple[Held, ...], said: str) -> None:
    intent = structs.replace(builders.intent(leaf("a"), leaf("b"), processes=3), held=held)
    if not said:
        holders.check(intent)
        return
    with pytest.raises(ValueError, match=said):
        holders.check(intent)


def decided(receipts: list[Receipt], *, held: tuple[Held, ...], must_agree: bool = False) -> Attempt:
    intent = structs.replace(builders.intent(leaf("stage/w"), processes=2), held=held)
    attempt = Attempt(intent, own_must_agree=must_agree)
    return advance(attempt, ReceiptsRead(tuple(receipts)))[0]


WHOLE = {"stage.w": (Box((0,), (4,)),)}


def test_a_leaf_that_is_not_covered_is_named_with_those_who_should_have_written_it() -> None:
    held = (Held(1, P1),)
    name = holders.name(held)
    state = decided([builders.receipt(0, went_by=name), builders.receipt(1, went_by=name)], held=held)
    assert state.phase is Phase.ABORTING
    assert state.reason.startswith("stage/w[4]: 0 of 4 elements written; it is on devices of process 1; ")
    assert state.reason.endswith("nothing of it came from process 1 (host-1)")


@pytest.mark.parametrize(("went_by", "phase"), [("right", Phase.FINALIZING), ("", Phase.ABORTING)])
def test_a_receipt_by_another_account_than_the_intents_aborts(went_by: str, phase: Phase) -> None:
    held = (Held(1, P1),)
    name = holders.name(held)
    receipts = [
        builders.receipt(0, went_by=name),
        builders.receipt(1, went_by=name if went_by else "00000000", boxes=WHOLE),
    ]
    assert decided(receipts, held=held).phase is phase


@pytest.mark.parametrize(
    ("own", "must_agree", "phase"),
    [
        ("same", True, Phase.FINALIZING),
        ("other", True, Phase.ABORTING),
        ("other", False, Phase.FINALIZING),
        ("none of its own", True, Phase.FINALIZING),
    ],
)
def test_what_every_process_has_its_own_of_must_agree_where_that_is_asked_for(
    own: str, must_agree: bool, phase: Phase
) -> None:
    held = (Held(1, None),)
    name = holders.name(held)
    form = holders.cut(leaf("stage/w"), held[0]).form
    small = {"stage.w/c/0": b"\0" * 16 + bytes.fromhex("01020304")}
    digest = {
        "same": holders.digest_of_chunks(form, ["04030201"]),
        "other": holders.digest_of_chunks(form, ["00000000"]),
        "none of its own": holders.not_compared(),
    }[own]
    receipts = [
        builders.receipt(0, went_by=name, boxes=WHOLE, small=small),
        builders.receipt(1, went_by=name, own=digest),
    ]
    state = decided(receipts, held=held, must_agree=must_agree)
    assert state.phase is phase
    if phase is Phase.ABORTING:
        assert state.reason.startswith("stage/w: hosts disagree: process 1 (host-1) has other values than process 0")
        assert state.cause is Cause.DISAGREE


def test_the_form_counts_in_a_digest_and_python_values_do_by_their_text() -> None:
    one, other = leaf("n"), structs.replace(leaf("n"), dtype="int32")
    assert holders.cut(one, Held(1)).form != holders.cut(other, Held(1)).form
    number = structs.replace(leaf("n"), kind="int", shape=(), dtype="", chunk=None, value="7")
    assert holders.digest(number) != holders.digest(structs.replace(number, value="8"))
    assert holders.digest(number) == holders.digest(structs.replace(number, path=("m",)))
