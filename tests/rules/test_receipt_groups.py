"""Who signs together: the same on every process, each in one group at most, none across slices."""

from __future__ import annotations

import pytest

from orchestrator.rules.receipt_groups import Group, bounds, group_of, like, posted_bytes_max

TWO_SLICES = (0, 1, 0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("count", "slices", "size", "members"),
    [
        (1, (), None, {}),
        (2047, (), None, {}),  # a job that is not large signs as before
        (5, (), 2, {1: (1, 2), 2: (1, 2), 3: (3, 4), 4: (3, 4)}),
        (4, (), 2, {1: (1, 2), 2: (1, 2)}),  # the last one is alone
        (4, (), 64, {1: (1, 2, 3), 2: (1, 2, 3), 3: (1, 2, 3)}),
        (4, (), 0, {}),
        (4, (), 1, {}),
        (8, TWO_SLICES, 3, {2: (2, 4, 6), 4: (2, 4, 6), 6: (2, 4, 6), 1: (1, 3, 5), 3: (1, 3, 5), 5: (1, 3, 5)}),
    ],
)
def test_a_process_is_in_the_group_that_the_rule_says(
    count: int, slices: tuple[int, ...], size: int | None, members: dict[int, tuple[int, ...]]
) -> None:
    found = {process: group_of(process, count, slices, size) for process in range(count)}
    assert {process: group.members for process, group in found.items() if group} == members


@pytest.mark.parametrize("count", [2048, 2049, 3000, 4097])
@pytest.mark.parametrize("slice_size", [0, 16, 100])
def test_large_jobs_have_groups_of_one_slice_that_all_processes_agree_on(count: int, slice_size: int) -> None:
    slices = tuple(process // slice_size for process in range(count)) if slice_size else ()
    groups = {process: group_of(process, count, slices) for process in range(count)}
    assert groups[0] is None
    for process, group in groups.items():
        if group is None:
            continue
        assert process in group.members and len(group.members) <= 64 and group.leader == min(group.members)
        assert {groups[member] for member in group.members} == {group}
        assert not slices or len({slices[member] for member in group.members}) == 1
    objects = len(set(groups.values())) + sum(group is None for group in groups.values())
    assert objects <= count / 8


def test_a_dead_leaders_members_have_stored_their_receipts_long_before_the_deadline() -> None:
    for timeout_s in (0.5, 8.0, 600.0, 1e6):
        assert bounds(timeout_s).sign_s < bounds(timeout_s).hand_s <= timeout_s / 4


def test_the_messages_of_a_job_fit_into_process_0() -> None:
    for count in (1, 2048, 50_000, 1_000_000):
        assert 0 < posted_bytes_max(count) <= 1 << 20 and posted_bytes_max(count) * count <= 256 << 20


def test_leaders_are_few() -> None:
    group = Group((1, 2, 3, 4))
    assert [like(each, process, 101) for each, process in ((group, 1), (group, 2), (None, 0))] == [25, 101, 101]
