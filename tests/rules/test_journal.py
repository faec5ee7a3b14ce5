"""The journal's rules, one by one and in random sequences (DESIGN section 2, invariants 1, 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import policy
from orchestrator.errors import JournalLost, OrchestratorError, StepNotFound, UsageError
from orchestrator.rules import journal, removal
from orchestrator.rules.attempt_id import AttemptId, name_of, parse_name
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.journal import Compared, FencedBy, Next, Overtaken, Rejected, StoredAttempt
from orchestrator.rules.records import Cause, Failure, Head, LiveStep, Quarantine, RetiredAttempt, crc32c
from tests.support.builders import head, live, stamp


def changed(following: Next) -> Head:
    assert isinstance(following, Head), following
    return following


def rejection(following: Next) -> OrchestratorError:
    assert isinstance(following, Rejected), following
    return following.error


def steps(of: Head) -> list[int]:
    return [entry.step for entry in of.live]


def retired(of: Head) -> list[tuple[int, str, str]]:
    return [(gone.step, gone.attempt, gone.reason) for gone in of.retired]


# Epochs.


def test_the_first_entry_is_version_0_of_epoch_1_signed_by_the_stamp() -> None:
    first = changed(journal.open_epoch(None, journal.Stamp("me", 5.0, "id-1")))
    assert (first.version, first.epoch, first.event.kind) == (0, 1, "opened-epoch")
    assert (first.writer, first.time, first.write_id) == ("me", 5.0, "id-1")


def test_a_new_incarnation_raises_the_epoch_and_keeps_every_step() -> None:
    old = head(live(1), live(2), epoch=4, version=9, retired=(RetiredAttempt(step=0, attempt="e0001-a01", reason="x"),))
    following = changed(journal.open_epoch(old, stamp()))
    assert (following.version, following.epoch) == (10, 5)
    assert (following.live, following.retired) == (old.live, old.retired)


def test_a_zombie_can_neither_commit_nor_abort_and_learns_who_fenced_it() -> None:
    now = head(live(1), epoch=3, writer="the successor")
    fenced = FencedBy(3, "the successor")
    assert journal.commit(now, stamp(), epoch=2, entry=live(2, "e0002-a01"), keep=None) == fenced
    assert journal.abort(now, stamp(), epoch=2, attempt=AttemptId(2, "e0002-a01"), failures=(), reason="") == fenced


def test_a_decision_on_a_journal_that_vanished_or_went_back_is_rejected() -> None:
    entry = live(2, "e0002-a01")
    assert isinstance(rejection(journal.commit(None, stamp(), epoch=2, entry=entry, keep=None)), JournalLost)
    gone_back = rejection(journal.commit(head(live(1), epoch=1), stamp(), epoch=2, entry=entry, keep=None))
    assert isinstance(gone_back, JournalLost)
    assert "epoch 1" in str(gone_back) and "epoch 2" in str(gone_back)
    aborting = journal.abort(None, stamp(), epoch=2, attempt=AttemptId(2, "e0002-a01"), failures=(), reason="")
    assert isinstance(rejection(aborting), JournalLost)


@pytest.mark.parametrize(
    ("now", "tree", "opens"),
    [
        (None, None, True),
        (head(), None, True),
        (head(live(1)), "t", True),
        (head(live(1), live(2, tree="u")), "u", True),
        (head(live(1, trust="quarantined")), None, True),
        (head(live(1)), None, False),  # another job has committed since
        (head(live(1, tree="u")), "t", False),
        (head(), "t", False),
        (None, "t", False),
    ],
)
def test_an_epoch_is_opened_only_on_the_run_that_the_job_was_compared_with(
    now: Head | None, tree: str | None, opens: bool
) -> None:
    following = journal.open_epoch(now, stamp(), compared=Compared(tree))
    if opens:
        assert changed(following).epoch == (now.epoch if now else 0) + 1
    else:
        assert isinstance(rejection(following), Overtaken)


# Commit.


def test_live_is_in_commit_order_so_the_newest_is_the_one_committed_last() -> None:
    after_return = changed(journal.commit(head(live(50), live(100)), stamp(), epoch=1, entry=live(60), keep=None))
    assert steps(after_return) == [50, 100, 60]
    newest = journal.newest(after_return)
    assert newest is not None and newest.step == 60


def test_a_commit_says_which_attempt_and_is_the_next_version() -> None:
    following = changed(journal.commit(head(version=7), stamp(9.0), epoch=1, entry=live(3), keep=None))
    assert (following.version, following.time, following.epoch) == (8, 9.0, 1)
    assert (following.event.kind, following.event.step, following.event.attempt) == ("committed", 3, "e0001-a01")


def test_committing_again_after_a_lost_reply_changes_nothing() -> None:
    once = changed(journal.commit(head(), stamp(), epoch=1, entry=live(3), keep=None))
    assert journal.commit(once, stamp(), epoch=1, entry=live(3), keep=None) is None
    moved_on = changed(journal.quarantine(once, stamp(), attempt=AttemptId(3, "e0001-a01"), reason="bad"))
    assert journal.commit(moved_on, stamp(), epoch=1, entry=live(3), keep=None) is None


@pytest.mark.parametrize("reason", ["aborted", "retention", "replaced"])
def test_an_attempt_that_is_aborted_or_retired_can_never_be_committed(reason: str) -> None:
    gone = RetiredAttempt(step=3, attempt="e0001-a01", reason=reason)
    error = rejection(journal.commit(head(retired=(gone,)), stamp(), epoch=1, entry=live(3), keep=None))
    assert "step 3 e0001-a01" in str(error) and "cannot be committed" in str(error)


def test_retention_is_part_of_the_commits_own_entry() -> None:
    full = head(live(1), live(2), version=7)
    following = changed(journal.commit(full, stamp(), epoch=1, entry=live(3), keep=policy.last(2)))
    assert following.version == 8
    assert steps(following) == [2, 3]
    assert retired(following) == [(1, "e0001-a01", "retention")]
    assert (following.event.kind, following.event.steps) == ("committed", (1,))


def test_a_step_committed_again_replaces_the_old_attempt_and_takes_over_its_pins() -> None:
    before = head(live(1, pins=("paper",)), live(2))
    following = changed(journal.commit(before, stamp(), epoch=1, entry=live(1, "e0001-a02"), keep=policy.last(1)))
    assert [(entry.step, entry.attempt, entry.pins) for entry in following.live] == [(1, "e0001-a02", ("paper",))]
    assert retired(following) == [(1, "e0001-a01", "replaced"), (2, "e0001-a01", "retention")]


# Retention.


def test_pinned_steps_survive_any_retention() -> None:
    following = changed(journal.retire(head(live(1, pins=("p",)), live(2), live(3)), stamp(), keep=policy.last(1)))
    assert steps(following) == [1, 3]
    assert following.event.kind == "retired" and following.event.steps == (2,)


def test_retention_that_lets_nothing_go_writes_nothing() -> None:
    assert journal.retire(head(live(1)), stamp(), keep=policy.last(5)) is None
    assert journal.retire(None, stamp(), keep=policy.last(5)) is None


class KeepNothing:
    def keep(self, steps: Any, now: float) -> frozenset[int]:
        return frozenset()


@pytest.mark.parametrize("trust", ["verified", "restored"])
def test_retention_never_drops_the_newest_restorable_nor_the_newest_proven_step(trust: str) -> None:
    run = head(live(1, trust=trust), live(2, trust=trust), live(3), live(4), live(5, trust="quarantined"))
    following = changed(journal.retire(run, stamp(), keep=KeepNothing()))
    assert steps(following) == [2, 4, 5]  # 5 is evidence


def test_a_run_of_quarantined_steps_only_is_left_alone() -> None:
    assert journal.retire(head(live(1, trust="quarantined")), stamp(), keep=KeepNothing()) is None


def test_a_quarantined_step_does_not_use_up_a_place_in_last_n() -> None:
    run = head(live(1), live(2), live(3, trust="quarantined"))
    following = changed(journal.commit(run, stamp(), epoch=1, entry=live(4), keep=policy.last(3)))
    assert steps(following) == [1, 2, 3, 4]


# Abort, quarantine, trust, pins.


def test_an_abort_names_the_causes_and_makes_the_data_collectable() -> None:
    cause = Failure(process=3, host="host-d", phase="write", cause="ENOSPC")
    following = changed(
        journal.abort(
            head(),
            stamp(),
            epoch=1,
            attempt=AttemptId(5, "e0001-a01"),
            failures=(cause,),
            reason="no",
            cause=Cause.REJECTED,
        )
    )
    assert (following.event.kind, following.event.failures, following.event.reason) == ("aborted", (cause,), "no")
    assert following.event.cause is following.retired[0].cause is Cause.REJECTED
    assert retired(following) == [(5, "e0001-a01", "aborted")]
    assert following.live == ()


def test_an_entry_without_a_cause_is_read_and_one_of_a_later_version_counts_as_failed() -> None:
    aborted = changed(
        journal.abort(
            head(), stamp(), epoch=1, attempt=AttemptId(5, "e0001-a01"), failures=(), reason="no", cause=Cause.SILENT
        )
    )
    body = encode(aborted)[: -len(',"crc32c":"00000000"}\n')]
    for there, cause in ((b"", Cause.FAILED), (b',"cause":"of tomorrow"', Cause.FAILED), (None, Cause.SILENT)):
        text = body if there is None else body.replace(b',"cause":"silent"', there)
        assert (text != body) == (there is not None)
        read = decode(text + f',"crc32c":"{crc32c(text)}"}}\n'.encode(), Head, "entry")
        assert journal.abort_of(read, AttemptId(5, "e0001-a01")) == ("no", cause)


def test_a_failure_that_is_a_plain_vote_is_stored_as_it_always_was() -> None:
    vote = Failure(process=1, host="h", phase="write", cause="ENOSPC")
    assert msgspec.json.decode(msgspec.json.encode(vote)).keys() == {"process", "host", "phase", "cause"}
    assert msgspec.json.decode(b'{"process":1,"host":"h","phase":"write","cause":"ENOSPC"}', type=Failure) == vote


def test_a_live_or_aborted_attempt_cannot_be_aborted_again() -> None:
    arguments: dict[str, Any] = {"epoch": 1, "attempt": AttemptId(5, "e0001-a01"), "failures": (), "reason": ""}
    assert journal.abort(head(live(5)), stamp(), **arguments) is None
    once = changed(journal.abort(head(), stamp(), **arguments))
    assert journal.abort(once, stamp(), **arguments) is None


def test_a_quarantined_step_is_not_restorable_and_the_one_before_becomes_the_newest() -> None:
    following = changed(
        journal.quarantine(head(live(1), live(2)), stamp(), attempt=AttemptId(2, "e0001-a01"), reason="bit flip in w")
    )
    newest = journal.newest(following)
    assert newest is not None and newest.step == 1
    assert (following.event.kind, following.event.reason) == ("quarantined", "bit flip in w")
    assert steps(following) == [1, 2]  # its data is still the run's
    assert journal.quarantine(following, stamp(), attempt=AttemptId(2, "e0001-a01"), reason="again") is None


def test_quarantine_and_verify_of_an_attempt_that_was_replaced_meanwhile_change_nothing() -> None:
    now = head(live(2, "e0001-a02"))
    assert journal.quarantine(now, stamp(), attempt=AttemptId(2, "e0001-a01"), reason="bad") is None
    assert journal.trusted(now, stamp(), attempt=AttemptId(2, "e0001-a01"), trust="verified") is None


def test_verified_is_recorded_once() -> None:
    following = changed(journal.trusted(head(live(2)), stamp(), attempt=AttemptId(2, "e0001-a01"), trust="verified"))
    assert (following.live[0].trust, following.event.kind) == ("verified", "verified")
    assert journal.trusted(following, stamp(), attempt=AttemptId(2, "e0001-a01"), trust="verified") is None


def test_pin_and_unpin_are_idempotent_and_a_step_can_have_several_pins() -> None:
    one = changed(journal.pin(head(live(2)), stamp(), step=2, name="a"))
    assert one.event.kind == "pinned"
    assert journal.pin(one, stamp(), step=2, name="a") is None
    both = changed(journal.pin(one, stamp(), step=2, name="b"))
    assert both.live[0].pins == ("a", "b")
    left = changed(journal.unpin(both, stamp(), step=2, name="a"))
    assert (left.live[0].pins, left.event.kind) == (("b",), "unpinned")
    assert journal.unpin(left, stamp(), step=2, name="a") is None


@pytest.mark.parametrize("rule", [journal.pin, journal.unpin])
def test_pinning_a_step_that_is_not_there_says_which_steps_are(rule: Any) -> None:
    error = rejection(rule(head(live(10), live(20)), stamp(), step=15, name="a"))
    assert isinstance(error, StepNotFound)
    assert str(error) == "step 15 is not in this run; it has: 10, 20"
    assert "no steps" in str(rejection(rule(None, stamp(), step=15, name="a")))


# Quarantine protects and is reversible.


def quarantined(step: int, attempt: str = "e0001-a01", at: float = 1.0, **more: Any) -> LiveStep:
    why = Quarantine(time=at, reason="bit flip", **more)
    return live(step, attempt, trust="quarantined", quarantine=why)


def attempts(entries: tuple[LiveStep, ...]) -> list[tuple[int, str]]:
    return [entry.id for entry in entries]


def test_a_quarantined_step_that_is_saved_again_is_put_aside_and_never_collected() -> None:
    following = changed(
        journal.commit(head(quarantined(1), live(2)), stamp(), epoch=1, entry=live(1, "e0001-a02"), keep=policy.last(1))
    )
    assert attempts(following.live) == [(1, "e0001-a02")]
    assert attempts(following.aside) == [(1, "e0001-a01")]
    found = {AttemptId(1, "e0001-a01"): StoredAttempt(True), AttemptId(2, "e0001-a01"): StoredAttempt(True)}
    assert [gone.id for gone in journal.collectable(following, found)] == [(2, "e0001-a01")]
    opened = changed(journal.open_epoch(following, stamp()))
    assert [gone.id for gone in journal.collectable(opened, found)] == [(2, "e0001-a01")]


@pytest.mark.parametrize(("keep_s", "left"), [(None, [1, 2, 3, 9]), (100.0, [2, 3, 9]), (10.0, [3, 9])])
def test_quarantine_keep_s_retires_evidence_that_is_older_and_no_other(keep_s: float | None, left: list[int]) -> None:
    unknown = live(3, trust="quarantined")  # nobody noted when
    run = head(quarantined(1, at=0.0), quarantined(2, at=150.0), unknown, aside=(quarantined(9, "e0001-a07", at=0.0),))
    following = changed(
        journal.commit(run, stamp(200.0), epoch=1, entry=live(9, "e0001-a08"), keep=None, quarantine_keep_s=keep_s)
    )
    assert steps(following) == left
    assert attempts(following.aside) == ([(9, "e0001-a07")] if keep_s is None else [])
    gone = set(attempts(run.quarantined)) - set(attempts(following.quarantined))
    assert {(step, attempt) for step, attempt, reason in retired(following) if reason == "quarantine_keep_s"} == gone


def test_pinned_evidence_does_not_expire() -> None:
    run = head(live(1, trust="quarantined", quarantine=Quarantine(time=0.0), pins=("paper",)))
    following = changed(
        journal.commit(run, stamp(99.0), epoch=1, entry=live(2), keep=policy.last(1), quarantine_keep_s=1.0)
    )
    assert steps(following) == [1, 2]


def test_release_gives_back_the_trust_that_the_step_had_in_its_place() -> None:
    run = head(live(1), live(2, trust="restored", pins=("p",)), live(3))
    taken = changed(journal.quarantine(run, stamp(7.0), attempt=AttemptId(2, "e0001-a01"), reason="crc", by_hand=True))
    assert taken.live[1].quarantine == Quarantine(time=7.0, reason="crc", by_hand=True, trust="restored")
    back = changed(journal.release(taken, stamp(), step=2, reason="was the cable"))
    assert back.live == run.live
    assert (back.event.kind, back.event.step, back.event.reason) == ("released", 2, "was the cable")
    assert journal.release(back, stamp(), step=2) is None
    assert isinstance(rejection(journal.release(back, stamp(), step=8)), StepNotFound)
    assert isinstance(rejection(journal.release(None, stamp(), step=8)), StepNotFound)


@pytest.mark.parametrize(
    ("evidence", "lifts"),
    [
        (quarantined(2), True),
        (quarantined(2, by_hand=True), False),  # a loss spike: reading the data proves nothing about it
        (live(2, trust="quarantined"), True),  # written before reasons were kept
        (live(2), False),
    ],
)
def test_a_verify_that_finds_a_step_good_lifts_what_it_disproves(evidence: LiveStep, lifts: bool) -> None:
    following = journal.release(head(live(1), evidence), stamp(), step=2, attempt="e0001-a01", disproved=True)
    assert (following is not None) == lifts
    if lifts:
        assert changed(following).live[1].restorable


def test_what_was_put_aside_can_be_released_once_its_step_is_free_and_is_never_the_newest() -> None:
    old = quarantined(2)
    run = head(live(1), live(2, "e0002-a01"), live(3, "e0002-a01"), epoch=2, aside=(old,))
    assert "restorable as e0002-a01" in str(rejection(journal.release(run, stamp(), step=2)))
    assert journal.release(run, stamp(), step=2, attempt="e0001-a01", disproved=True) is None
    bad = changed(journal.quarantine(run, stamp(), attempt=AttemptId(2, "e0002-a01"), reason="x"))
    swapped = changed(journal.release(bad, stamp(), step=2, attempt="e0001-a01"))
    assert attempts(swapped.live) == [(1, "e0001-a01"), (2, "e0001-a01"), (3, "e0002-a01")]
    assert attempts(swapped.aside) == [(2, "e0002-a01")]
    dropped = changed(journal.retire(run, stamp(), keep=policy.last(1)))
    back = changed(journal.release(dropped, stamp(), step=2))
    assert attempts(back.live) == [(2, "e0001-a01"), (3, "e0002-a01")] and back.aside == ()


def test_a_step_is_removed_by_name_even_the_newest_and_the_only_one_but_no_evidence() -> None:
    run = head(live(1), live(2), live(3, pins=("p",)))
    gone = changed(removal.remove(run, stamp(), step=2))
    assert steps(gone) == [1, 3] and retired(gone) == [(2, "e0001-a01", "deleted")]
    newest = changed(removal.remove(head(live(1), live(2)), stamp(), step=2))
    assert steps(newest) == [1]
    assert isinstance(rejection(removal.remove(run, stamp(), step=3)), UsageError)
    assert steps(changed(removal.remove(head(live(1)), stamp(), step=1))) == []
    assert steps(changed(removal.remove(head(quarantined(1), live(2)), stamp(), step=2))) == [1]
    assert removal.remove(run, stamp(), step=9) is None
    assert "is quarantined" in str(rejection(removal.remove(head(quarantined(1), live(2)), stamp(), step=1)))


@dataclass(frozen=True)
class Best:
    """Keeps `steps` of those there are."""

    steps: frozenset[int]

    def keep(self, steps: Any, now: float) -> frozenset[int]:
        return self.steps & {each.step for each in steps}


@pytest.mark.parametrize(
    ("run", "kept", "left"),
    [
        (head(live(1), live(2)), {1}, [1]),
        (head(live(2), live(1)), {2}, [2]),  # the newest is the one committed last
        (head(live(1), live(2)), {2}, None),
        (head(live(1), live(2)), set(), None),  # retention never empties a run
        (head(live(1)), {7}, None),
        (head(live(1), live(2, pins=("p",))), {1}, None),
        (head(live(1), live(2, trust="restored")), {1}, None),
        (head(live(1), live(2, trust="verified")), {1}, None),
        (head(quarantined(1), live(2)), {1}, None),  # what is quarantined is nothing to come back to
        (head(live(1), live(2), quarantined(3)), {1}, [1, 3]),
    ],
)
def test_the_newest_step_goes_only_where_the_policy_keeps_another_one(
    run: Head, kept: set[int], left: list[int] | None
) -> None:
    after = removal.unwanted_newest(run, stamp(), epoch=run.epoch, keep=Best(frozenset(kept)))
    assert (steps(changed(after)) if after is not None else None) == left
    fenced = removal.unwanted_newest(run, stamp(), epoch=run.epoch - 1, keep=Best(frozenset(kept)))
    assert isinstance(fenced, FencedBy)


def test_only_the_newest_incarnation_rolls_a_run_back() -> None:
    run = head(live(1), live(2), epoch=2)
    assert isinstance(removal.remove(run, stamp(), step=2, epoch=1), FencedBy)
    assert steps(changed(removal.remove(run, stamp(), step=2, epoch=2))) == [1]


def test_only_somebody_who_names_a_quarantined_step_deletes_it() -> None:
    run = head(live(1), quarantined(2), quarantined(3), aside=(quarantined(1, "e0001-a09"),))
    gone = changed(removal.discard(run, stamp(), step=2))
    assert steps(gone) == [1, 3] and retired(gone) == [(2, "e0001-a01", "quarantined")]
    assert (gone.event.kind, gone.event.steps) == ("retired", (2,))
    both = changed(removal.discard(run, stamp(), step=1))
    assert steps(both) == [1, 2, 3] and both.aside == ()
    assert "quarantined steps: 1, 2, 3" in str(rejection(removal.discard(run, stamp(), step=7)))
    assert isinstance(rejection(removal.discard(head(live(1)), stamp(), step=1)), StepNotFound)
    pinned = head(live(1), live(2, trust="quarantined", pins=("p",)))
    assert isinstance(rejection(removal.discard(pinned, stamp(), step=2)), UsageError)
    # The last step of a run: without it the run would pass for a new one.
    assert isinstance(rejection(removal.discard(head(quarantined(2)), stamp(), step=2)), UsageError)


# Collecting.


@pytest.mark.parametrize(
    ("steps_now", "kept"),
    [
        ([], True),
        ([live(10, "e0001-a01")], True),  # an older step
        ([live(10, "e0002-a01")], True),
        ([live(30, "e0001-a01")], True),  # of a line that was left deliberately (a return to an older step)
        ([quarantined(30, "e0002-a01")], True),  # nothing that can be restored
        ([live(20, "e0002-a01")], False),
        ([live(30, "e0003-a01")], False),
    ],
)
def test_a_whole_attempt_that_was_never_committed_is_kept_until_a_newer_commit(
    steps_now: list[LiveStep], kept: bool
) -> None:
    name = "e0002-a01" if steps_now[-1:] != [live(20, "e0002-a01")] else "e0002-a02"
    found = {AttemptId(20, name): StoredAttempt(whole=True)}
    now = head(*steps_now, epoch=4)
    assert (journal.collectable(now, found) == ()) == kept
    assert (
        journal.collectable(now, {key: StoredAttempt() for key in found}) != ()
    )  # without a manifest it never was a step


def test_only_retired_attempts_and_leftovers_of_older_epochs_are_collectable() -> None:
    gone = RetiredAttempt(step=1, attempt="e0001-a01", reason="retention")
    now = head(live(2, "e0001-a01"), live(3, "e0002-a01"), epoch=3, retired=(gone,))
    names = [
        (1, "e0001-a01"),  # retired
        (2, "e0001-a01"),  # live, of an old epoch
        (2, "e0001-a02"),  # never decided, of an old epoch: it can never commit
        (3, "e0002-a01"),  # live
        (9, "e0003-a01"),  # being written now
        (9, "e0004-a01"),  # of an epoch that opened after this head was read
    ]
    found = {AttemptId(*name): StoredAttempt() for name in names}
    assert [(each.step, each.attempt, each.reason) for each in journal.collectable(now, found)] == [
        (1, "e0001-a01", "retention"),
        (2, "e0001-a02", "orphan"),
    ]


def test_collected_forgets_what_was_deleted_and_only_that() -> None:
    first, second = (RetiredAttempt(step=step, attempt="e0001-a01", reason="aborted") for step in (1, 2))
    now = head(live(3), retired=(first, second))
    following = changed(
        journal.collected(now, stamp(), attempts=[AttemptId(1, "e0001-a01"), AttemptId(3, "e0001-a01")])
    )
    assert following.retired == (second,)
    assert following.live == now.live
    assert journal.collected(following, stamp(), attempts=[AttemptId(1, "e0001-a01")]) is None
    assert journal.collected(None, stamp(), attempts=[]) is None


# What is carried from entry to entry, and how much of it.


def many(step: int, count: int = 500, **decisive: float) -> dict[str, float]:
    return {**{f"m{number}": float(step) for number in range(count)}, **decisive}


def committed(losses: list[float | None], keep: Any, before: Any = None, others: int = 500) -> Head:
    """A run in which `losses` were saved among many other metrics; None: without the one that decides."""
    now = changed(journal.open_epoch(None, stamp()))
    for step, loss in enumerate(losses):
        entry = live(step, metrics=many(step, others) if loss is None else many(step, others, loss=loss))
        policy_then = before if before is not None and step < 2 else keep
        now = changed(journal.commit(now, stamp(float(step)), epoch=1, entry=entry, keep=policy_then))
    return now


def test_steps_are_judged_as_if_the_head_had_all_their_metrics() -> None:
    losses = [3.0, 1.0, None, 2.0, None, 5.0, None]
    now = committed(losses, policy.best("loss", 2))
    assert steps(now) == [1, 3, 6], "the best two, and the newest; those without the metric go"
    for entry in now.live:
        assert len(entry.metrics) == policy.METRICS_MAX
        assert len(entry.metrics) + entry.metrics_omitted == len(many(0)) + (losses[entry.step] is not None)
    assert now.live[-1].metrics_absent == ("loss",)


LOSSES = st.lists(st.none() | st.floats(), min_size=1, max_size=8)
BY_LOSS = st.builds(policy.best, st.just("loss"), st.integers(1, 3), mode=st.sampled_from(["min", "max"]))
POLICIES = BY_LOSS | st.builds(lambda one, n: one | policy.last(n), BY_LOSS, st.integers(1, 3))


@given(LOSSES, POLICIES)
@settings(max_examples=50, deadline=None)
def test_the_same_steps_stay_however_many_other_metrics_there_are(losses: list[float | None], keep: Any) -> None:
    assert steps(committed(losses, keep, others=200)) == steps(committed(losses, keep, others=3))


def test_a_step_whose_deciding_metric_is_not_in_the_head_stays() -> None:
    now = committed([9.0, 1.0, 2.0, 8.0, 3.0], policy.best("loss", 1), before=policy.last(5))
    assert steps(now) == [0, 1, 2, 4]
    assert steps(changed(journal.retire(now, stamp(), keep=policy.last(1)))) == [4], "it is not needed for others"


class Own:
    """A policy of the user's own that does not say what it looks at, and looks at the last of many."""

    def keep(self, found: Any, now: float) -> frozenset[int]:
        return frozenset(entry.step for entry in found if entry.metrics["loss"] < 2.0)


def test_for_a_policy_that_does_not_say_what_it_looks_at_heads_carry_all() -> None:
    now = committed([3.0, 1.0, 5.0, 4.0], Own())
    assert steps(now) == [1, 3] and now.live[0].metrics_omitted == 0
    # Steps from before, of which the head has not all: they are not shown to it.
    assert steps(committed([3.0, 1.0, 5.0, 4.0], Own(), before=policy.last(9))) == [0, 1, 3]


def test_texts_and_lists_in_an_entry_are_bounded() -> None:
    failures = tuple(Failure(process=n, host="h" * 9999, phase="write", cause="c" * 99_999) for n in range(1000))
    signed = journal.Stamp(writer="w" * 9999, time=0.0, write_id="id")
    now = head(live(1))
    entry = changed(
        journal.abort(now, signed, epoch=1, attempt=AttemptId(2, "e0001-a01"), failures=failures, reason="r" * 99_999)
    )
    assert len(encode(entry)) < 200_000
    assert entry.event.reason.endswith("; 936 more processes failed") and len(entry.event.failures) == 64
    quarantined = journal.quarantine(now, signed, attempt=AttemptId(1, now.live[0].attempt), reason="é" * 99_999)
    assert len(changed(quarantined).event.reason) == journal.REASON_CHARS
    rejected = rejection(journal.pin(now, stamp(), step=1, name="p" * 201))
    assert "at most 100 pins, of at most 200 characters" in str(rejected)
    for number in range(100):
        now = changed(journal.pin(now, stamp(), step=1, name=str(number)))
    rejection(journal.pin(now, stamp(), step=1, name="one more"))
    assert journal.pin(now, stamp(), step=1, name="3") is None
    changed(journal.unpin(now, stamp(), step=1, name="3"))


# Random sequences: incarnations of every epoch, zombies included, go on acting in any order.

Attempt = tuple[int, str]
POLICIES = [None, KeepNothing(), policy.last(1), policy.last(3), policy.every_nth(2), policy.best("loss", 1)]


@dataclass
class World:
    """A run's journal, the attempts that have data, and the heads that a slow collector may still hold."""

    heads: list[Head] = field(default_factory=list)
    data: set[Attempt] = field(default_factory=set)
    deleted: set[Attempt] = field(default_factory=set)
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    undecided: list[Attempt] = field(default_factory=list)

    @property
    def head(self) -> Head | None:
        return self.heads[-1] if self.heads else None

    def put(self, following: Next) -> None:
        if isinstance(following, Head):
            if self.head:
                check_transition(self.head, following)
            self.heads.append(following)
            present = {entry.id for entry in (*following.live, *following.aside)}
            assert present <= self.data, "a live attempt has lost its data"


def check_transition(old: Head, new: Head) -> None:
    assert new.version == old.version + 1
    assert new.epoch == old.epoch + (new.event.kind == "opened-epoch")
    before, after = ({entry.id: entry for entry in which.live} for which in (old, new))
    names = {gone.id for gone in new.retired}
    assert len({entry.step for entry in new.live}) == len(new.live), "a step is live twice"
    assert not names & after.keys(), "an attempt is both live and retired"
    aside = {entry.id for entry in new.aside}
    assert before.keys() - after.keys() <= names | aside, "a live attempt vanished without being retired"
    added = after.keys() - before.keys()
    assert not added or new.event.kind in ("committed", "released")
    check_evidence(old, new, names)
    # Invariant 1: the newest is the restorable one committed last, and only those are restorable.
    good = [entry for entry in new.live if entry.trust != "quarantined"]
    assert journal.newest(new) == (good[-1] if good else None)
    check_retention(old, new, {step for step, _ in added})


def check_evidence(old: Head, new: Head, gone: set[Attempt]) -> None:
    """Invariant 8: what is quarantined stays so, or is released, or is deleted by name."""
    kinds = {"released": 1, "retired": len(old.quarantined)}
    left = {entry.id for entry in old.quarantined} - {entry.id for entry in new.quarantined}
    assert len(left) <= kinds.get(new.event.kind, 0), f"{new.event.kind} takes evidence away: {left}"
    if new.event.kind == "retired":
        assert not left or new.event.reason, "retention takes evidence"
    assert len({entry.id for entry in (*new.live, *new.aside)}) == len(new.live) + len(new.aside)


def check_retention(old: Head, new: Head, replaced: set[int]) -> None:
    """Invariant 6: no entry empties the run, or drops its newest proven or a pinned step (unless that is replaced)."""
    still = {entry.id for entry in new.live}
    if new.event.kind not in ("committed", "retired"):
        if new.event.kind != "released":
            assert [entry.step for entry in new.live] == [entry.step for entry in old.live]
        return
    if new.event.reason.startswith("quarantined"):  # by name
        return
    good = [entry for entry in old.live if entry.restorable and entry.step not in replaced]
    proven = [entry for entry in good if entry.trust in ("verified", "restored")]
    pinned = [entry for entry in old.live if entry.pins and entry.step not in replaced]
    must_stay: list[LiveStep] = [*proven[-1:], *pinned]
    if new.event.kind == "retired":
        must_stay += good[-1:]
    else:
        newest = journal.newest(new)
        assert newest is not None and newest.attempt == new.event.attempt
    for entry in must_stay:
        assert entry.id in still, f"{new.event.kind} dropped {entry}"


RULES = ["open", *["start"] * 3, *["commit"] * 3, "again", "abort", "retire", "pin", "unpin", "quarantine", "trust"]
RULES += [*["collect"] * 2, "release", "discard"]

ACTS = st.tuples(
    st.sampled_from(RULES),
    st.integers(0, 5),  # step, or which of several
    st.integers(0, 5),  # how stale a collector's head is, or which epoch acts
    st.sampled_from(POLICIES),
)


@settings(max_examples=300)
@given(st.lists(ACTS, min_size=30, max_size=60))
def test_no_order_of_rules_loses_a_live_step_or_lets_a_zombie_commit(acts: list[Any]) -> None:
    world = World()
    world.put(journal.open_epoch(None, stamp()))
    for name, which, other, keep in acts:
        perform(world, name, which, other, keep)


def perform(world: World, name: str, which: int, other: int, keep: Any) -> None:
    now = world.head
    assert now is not None
    entries = {entry.step: entry.attempt for entry in now.live}
    if name == "open":
        world.put(journal.open_epoch(now, stamp()))
    elif name == "start":
        epoch = max(1, now.epoch - other % 3)  # an incarnation of an older epoch may still be at work
        number = world.numbers[epoch, which] = world.numbers.get((epoch, which), 0) + 1
        world.data.add((which, name_of(epoch, number)))
        world.undecided.append((which, name_of(epoch, number)))
    elif name in ("commit", "abort") and world.undecided:
        decide(world, now, name, world.undecided.pop(which % len(world.undecided)), keep)
    elif name == "again" and which in entries:  # the reply to the commit was lost
        epoch = parse_name(entries[which])[0]
        again = journal.commit(now, stamp(), epoch=epoch, entry=live(which, entries[which]), keep=keep)
        assert again is None or isinstance(again, FencedBy)
    elif name == "retire" and keep is not None:
        world.put(journal.retire(now, stamp(), keep=keep))
    elif name in ("pin", "unpin"):
        world.put((journal.pin if name == "pin" else journal.unpin)(now, stamp(), step=which, name="p"))
    elif name == "quarantine" and which in entries:
        world.put(journal.quarantine(now, stamp(), attempt=AttemptId(which, entries[which]), reason="r"))
    elif name in ("release", "discard"):
        world.put((journal.release if name == "release" else removal.discard)(now, stamp(), step=which))
    elif name == "trust" and which in entries:
        world.put(journal.trusted(now, stamp(), attempt=AttemptId(which, entries[which]), trust="verified"))
    elif name == "collect":
        collect(world, other, which)


def decide(world: World, now: Head, name: str, attempt: Attempt, keep: Any) -> None:
    step, called = attempt
    epoch = parse_name(called)[0]
    if name == "commit":
        entry = live(step, called, metrics={"loss": float(step)})
        following = journal.commit(now, stamp(), epoch=epoch, entry=entry, keep=keep)
    else:
        following = journal.abort(now, stamp(), epoch=epoch, attempt=AttemptId(step, called), failures=(), reason="r")
    if epoch < now.epoch:
        assert isinstance(following, FencedBy), "a zombie was allowed to decide"
    world.put(following)


def collect(world: World, staleness: int, how_many: int) -> None:
    """Invariant 5, by a collector that read its head some versions ago and is killed after `how_many` deletions."""
    stale = world.heads[max(0, len(world.heads) - 1 - staleness)]
    found = {AttemptId(*one): StoredAttempt(whole=one[0] % 2 == 0) for one in sorted(world.data)}
    doomed = journal.collectable(stale, found)[:how_many]
    now = world.head
    assert now is not None
    for gone in doomed:
        assert not journal.is_live(now, gone.id), "deleting what is live"
        world.data.discard(gone.id)
    world.put(journal.collected(now, stamp(), attempts=[gone.id for gone in doomed]))
