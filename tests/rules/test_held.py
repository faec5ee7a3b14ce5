"""Which held step may be offered, in what order, and what a tier has room for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy import last
from orchestrator.rules import held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held import Offer, Standing, asked_for, candidates
from orchestrator.rules.journal import FencedBy
from orchestrator.rules.records import Head, Quarantine
from tests.support.builders import head, live, stamp


def named(epoch: int, step: int, number: int = 1) -> AttemptId:
    return AttemptId.of(step, epoch, number)


def offered(epoch: int, step: int, number: int = 1, crc: str = "0a") -> Offer:
    return Offer(step, named(epoch, step, number).name, crc)


@pytest.mark.parametrize(
    ("journalled", "attempt", "admitted"),
    [
        (Standing(1), named(1, 20), True),  # nothing is committed yet
        (Standing(3, named(3, 20)), named(3, 40), True),
        (Standing(3, named(3, 20)), named(3, 20, 2), True),  # the same step, tried again
        (Standing(3, named(3, 20)), named(3, 20), False),  # the store has that very attempt
        (Standing(3, named(3, 40)), named(3, 20), False),
        # The job went back to step 10 and committed that: what epoch 2 held beyond is another history.
        (Standing(3, named(3, 10)), named(2, 500), False),
        (Standing(3, named(2, 10)), named(2, 20), True),  # epoch 3 has saved nothing
        (Standing(3, named(2, 10)), named(4, 20), False),  # of an epoch that the journal does not know
        # Somebody has found step 40 bad: so is what came after it, in that incarnation.
        (Standing(3, named(3, 20), (named(3, 40),)), named(3, 60), False),
        (Standing(3, named(3, 20), (named(3, 40),)), named(3, 40), False),
        (Standing(3, named(3, 20), (named(3, 40),)), named(3, 30), True),
        (Standing(4, named(3, 20), (named(3, 40),)), named(4, 30), True),
    ],
)
def test_a_held_step_is_admitted_only_over_what_came_before_it(
    journalled: Standing, attempt: AttemptId, admitted: bool
) -> None:
    assert journalled.admits(attempt) is admitted


def test_only_what_every_process_offers_is_tried_newest_first() -> None:
    everywhere = [offered(2, 40), offered(3, 20), offered(3, 30)]
    offers = [[*everywhere, offered(3, 50)], [*reversed(everywhere), offered(3, 60)]]
    assert candidates(Standing(3), offers) == [offered(3, 30), offered(3, 20), offered(2, 40)]
    assert candidates(Standing(3, named(2, 40)), offers) == [offered(3, 30), offered(3, 20)]
    assert candidates(Standing(3), [everywhere, []]) == []
    assert candidates(Standing(3), []) == []


def test_two_steps_of_one_name_with_other_manifests_are_two_steps() -> None:
    assert candidates(Standing(3), [[offered(3, 20, crc="0a")], [offered(3, 20, crc="0b")]]) == []


def test_a_step_that_was_asked_for_is_the_newest_incarnations_also_where_the_store_has_a_newer_one() -> None:
    whole = [offered(1, 20), offered(2, 20), offered(2, 20, 2), offered(2, 40), offered(4, 20)]
    journalled = Standing(3, named(3, 60))
    assert asked_for(journalled, whole, 20) == [offered(2, 20, 2), offered(2, 20), offered(1, 20)]
    assert asked_for(journalled, whole, 30) == []
    assert asked_for(Standing(3, None, (named(2, 20),)), whole, 20) == [offered(1, 20)], "found bad by hand"


attempts = st.builds(named, st.integers(1, 4), st.integers(0, 5), st.integers(1, 2))


@given(
    st.lists(st.sets(attempts, max_size=6), min_size=1, max_size=3),
    st.none() | attempts,
    st.lists(attempts, max_size=2),
    st.integers(1, 4),
)
def test_what_is_chosen_is_newer_than_the_store_and_no_older_epoch_comes_before_a_newer(
    sets: list[set[AttemptId]], newest: AttemptId | None, barred: list[AttemptId], epoch: int
) -> None:
    offers = [[offered(one.epoch, one.step, one.number) for one in each] for each in sets]
    chosen = candidates(Standing(epoch, newest, tuple(barred)), offers)
    ranks = [held.rank(one.id) for one in chosen]
    assert ranks == sorted(ranks, reverse=True)
    for one in chosen:
        assert all(one in each for each in offers)
        assert one.id.epoch <= epoch and (newest is None or held.rank(one.id) > held.rank(newest))
    # However many zombies hold however much more: nothing newer than the newest incarnation's own newest is chosen.
    common = set.intersection(*sets) - {one for one in set.intersection(*sets) if one.epoch > epoch}
    if common and not barred:
        best = max([*common, *([newest] if newest else [])], key=held.rank)
        assert (chosen[0].id if chosen else newest) == best


# A tier's log.


def opened(before: Head | None, epoch: int) -> Any:
    return held.open_epoch(before, stamp(), epoch=epoch, version=9)


def test_a_tiers_log_takes_the_epoch_of_the_runs_journal_and_fences_older_ones() -> None:
    first = opened(None, 3)
    assert (first.version, first.epoch, first.event.kind) == (0, 3, "opened-epoch")
    second = opened(first, 7)
    assert (second.version, second.epoch) == (1, 7)
    assert isinstance(opened(second, 7), FencedBy), "each start opens an epoch of its own: the journal was set back"
    assert isinstance(opened(second, 6), FencedBy)
    zombie = journal.commit(second, stamp(), epoch=3, entry=live(60, named(3, 60).name), keep=last(2))
    assert isinstance(zombie, FencedBy)


def test_what_an_older_incarnation_held_stays_on_offer_until_newer_steps_replace_it() -> None:
    log: Any = opened(None, 1)
    for step in (20, 40):
        log = journal.commit(log, stamp(), epoch=1, entry=live(step, named(1, step).name), keep=last(2))
    log = opened(log, 2)
    assert [one.step for one in log.live] == [20, 40]
    log = journal.commit(log, stamp(), epoch=2, entry=live(60, named(2, 60).name), keep=last(2))
    assert [one.step for one in log.live] == [40, 60] and [one.step for one in log.retired] == [20]


def test_another_processs_log_follows_process_0s() -> None:
    steps = [live(step) for step in (20, 40, 60)]
    log = head(*steps[:2], epoch=1)
    followed: Any = held.follow(log, stamp(), epoch=1, live=steps[1:])
    assert followed.live == (steps[1], steps[2]) and [one.step for one in followed.retired] == [20]
    assert followed.event.step == 60
    assert held.follow(followed, stamp(), epoch=1, live=steps[1:]) is None
    assert isinstance(held.follow(head(*steps, epoch=2), stamp(), epoch=1, live=[]), FencedBy)
    again: Any = held.follow(followed, stamp(), epoch=1, live=steps)  # not to be deleted any more
    assert again.live == tuple(steps) and again.retired == ()


@pytest.mark.parametrize(
    ("own", "process_0", "kept", "retired"),
    [
        ([(1, 20), (1, 40)], [(1, 40), (1, 60)], [(1, 40), (1, 60)], [20]),
        ([(1, 20), (1, 40)], [], [(1, 20), (1, 40)], []),  # it has lost its log with its host
        ([(2, 60), (2, 80)], [(1, 40)], [(1, 40), (2, 60), (2, 80)], []),  # its host was away
        ([(2, 60), (2, 80)], [(3, 70)], [(3, 70)], [60, 80]),  # a newer start has held one
        ([(2, 40)], [(1, 20), (1, 40)], [(1, 20), (2, 40)], []),  # a log has each step once
    ],
)
def test_a_log_that_follows_keeps_what_is_newer_than_process_0s_newest(
    own: list[tuple[int, int]], process_0: list[tuple[int, int]], kept: list[tuple[int, int]], retired: list[int]
) -> None:
    def steps(pairs: list[tuple[int, int]]) -> list[Any]:
        return [live(step, named(epoch, step).name) for epoch, step in pairs]

    log = head(*steps(own), epoch=3)
    followed: Any = held.follow(log, stamp(), epoch=3, live=steps(process_0)) or log
    assert [one.id for one in followed.live] == [named(*pair) for pair in kept]
    assert [one.step for one in followed.retired] == retired


@given(st.sets(attempts), st.sets(attempts), st.integers(1, 4), st.sets(attempts), st.booleans())
def test_freed_is_never_what_may_still_be_the_newest_whole_step_of_somebody(
    found: set[AttemptId], listed: set[AttemptId], epoch: int, decided: set[AttemptId], for_room: bool
) -> None:
    gone = set(held.to_free(found, listed, epoch=epoch, decided=decided, for_room=for_room))
    newest = max(map(held.rank, listed), default=(-1, -1, -1))
    assert gone <= found - listed
    for one in gone:
        assert one.epoch <= epoch  # a newer start's is not an older one's to free
        assert one.epoch < epoch or one in decided  # another host may be ahead by one
        assert one.epoch == epoch or held.rank(one) < newest or for_room
    if any(one.epoch == epoch for one in listed):  # from the first held step on, nothing of older starts is left
        assert all(one.epoch >= epoch or one in listed for one in found - gone)


def test_released_steps_may_be_freed_and_are_offered_no_more() -> None:
    log = head(live(20), live(40), epoch=1)
    released: Any = held.release(log, stamp(), epoch=1, attempts={live(20).id}, reason="room")
    assert [one.step for one in released.live] == [40] and [one.step for one in released.retired] == [20]
    assert held.release(released, stamp(), epoch=1, attempts={live(20).id}, reason="room") is None
    newer = head(live(20), live(40), epoch=2)
    assert isinstance(held.release(newer, stamp(), epoch=1, attempts={live(20).id}, reason="room"), FencedBy)


def test_steps_that_the_store_has_or_has_newer_are_superseded() -> None:
    steps = [live(step, named(2, step).name) for step in (20, 40, 60)]
    assert held.superseded(head(live(40, named(2, 40).name)), steps) == [steps[0].id, steps[1].id]
    assert held.superseded(head(), steps) == []


def test_the_standing_is_of_the_newest_restorable_step_and_of_what_people_have_quarantined() -> None:
    bad = live(60, trust="quarantined", quarantine=Quarantine(time=1.0, by_hand=True))
    damaged = live(80, trust="quarantined", quarantine=Quarantine(time=1.0))
    assert held.standing(head(live(40), bad, damaged, epoch=5)) == Standing(5, live(40).id, (bad.id,))


# Room.


@pytest.mark.parametrize(
    ("held_bytes", "need", "room", "count"),
    [
        ([], 10, 10, 0),
        ([], 10, 9, None),
        ([10], 10, 9, None),  # the newest stays
        ([10, 10], 10, 10, 0),
        ([10, 10], 10, 9, 1),
        ([4, 3, 10], 10, 3, 2),
        ([4, 3, 10], 10, 2, None),
        ([10, 10], 10, -5, None),  # bytes_max was made smaller
        ([20, 10], 10, -5, 1),
    ],
)
def test_as_few_of_the_oldest_go_as_make_room_and_never_the_newest(
    held_bytes: list[int], need: int, room: int, count: int | None
) -> None:
    assert held.to_release(held_bytes, need, room) == count
