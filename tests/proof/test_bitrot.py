"""The campaign of damaged files, some of it; `make bitrot` plays hundreds."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from tests.proof.bitrot import KINDS, campaign, main, report, wrong


@pytest.mark.slow
def test_no_fault_in_any_file_of_a_step_is_silent(tmp_path: Path) -> None:
    outcomes = list(campaign(10 * len(KINDS), 7, tmp_path, orbax=False))
    table = report(outcomes, 7)
    assert not any(map(wrong, outcomes)), table
    restores = collections.Counter(one.restore for one in outcomes)
    # Both must be common, or the campaign would not show much: files that a restore needs, and files that it does not.
    assert restores["stepped down, right bits"] > 25 and restores["not needed, right bits"] > 5, table
    assert "0 silent" in table


def test_a_campaign_without_faults_proves_nothing_and_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bitrot", "--faults=-1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
