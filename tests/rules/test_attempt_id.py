"""An attempt's name and keys: what is built can be parsed, and what comes from storage is not trusted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UnsafeKey
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId, name_of, parse_name, receipt_file

NUMBERS = st.integers(0, 10**9)
ATTEMPT = AttemptId(100, "e0003-a02")


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (ATTEMPT.label, "step 100 e0003-a02"),
        (ATTEMPT.prefix, "steps/00000100/e0003-a02/"),
        (ATTEMPT.intent_key, "steps/00000100/e0003-a02/intent.json"),
        (ATTEMPT.manifest_key, "steps/00000100/e0003-a02/manifest.json"),
        (ATTEMPT.state_prefix, "steps/00000100/e0003-a02/state/"),
        (ATTEMPT.receipts_prefix, "steps/00000100/e0003-a02/receipts/"),
        (ATTEMPT.receipt_key(3), "steps/00000100/e0003-a02/receipts/00003.json"),
        (ATTEMPT.process_state_key(3), "steps/00000100/e0003-a02/process/00003.bin"),
        (ATTEMPT.key("state/d/0f"), "steps/00000100/e0003-a02/state/d/0f"),
        (ATTEMPT.epoch, 3),
        (ATTEMPT.number, 2),
        (AttemptId.of(100, 3, 2), ATTEMPT),
        (AttemptId.of(10**9, 12345, 678).prefix, "steps/1000000000/e12345-a678/"),
    ],
)
def test_names_and_keys_look_as_the_on_disk_contract_says(built: object, expected: object) -> None:
    assert built == expected


@given(NUMBERS, NUMBERS, NUMBERS)
def test_what_is_built_is_parsed_back(step: int, epoch: int, number: int) -> None:
    attempt = AttemptId.of(step, epoch, number)
    assert (attempt.epoch, attempt.number) == parse_name(attempt.name) == (epoch, number)
    assert AttemptId.in_key(attempt.key("state/d/x")) == (attempt, "state/d/x")
    assert receipt_file(attempt.receipt_key(number)) == (number, keys.receipt_name(number))
    group = keys.group_receipt_name(number, epoch)
    assert receipt_file(attempt.key(group)) == (number, group) and keys.group_of(group) == (number, epoch)


@pytest.mark.parametrize(
    "key",
    [
        *("steps/100/e0003-a01/x", "steps/00000100/e3-a1/x", "steps/00000100/e0003-a01/", "steps/00000100", "a/b"),
        *("steps/000000100/e0003-a01/x", "steps/00000100/e00003-a01/x", "old/steps/00000100/e0003-a01/x"),
        "steps/\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661/e0003-a01/x",
    ],
)
def test_a_stray_file_in_steps_belongs_to_no_attempt(key: str) -> None:
    assert AttemptId.in_key(key) is None


FORGED = [
    "",
    "..",
    "e0003",
    "e0003-a01/../x",
    "e-001-a01",
    "E0003-a01",
    "e0003-a01\n",
    "e03-a1",
    "e00003-a01",
    "e0003-a001",
]
FORGED += ["\u0665e0003-a01", "e\u0661\u0661\u0661\u0661-a01", "/e0003-a01", "e0003-a01/", " e0003-a01"]
BUILT = {
    "prefix": lambda attempt: attempt.prefix,
    "epoch": lambda attempt: attempt.epoch,
    "number": lambda attempt: attempt.number,
    "intent": lambda attempt: attempt.intent_key,
    "manifest": lambda attempt: attempt.manifest_key,
    "state": lambda attempt: attempt.state_prefix,
    "receipts": lambda attempt: attempt.receipts_prefix,
    "receipt": lambda attempt: attempt.receipt_key(0),
    "process state": lambda attempt: attempt.process_state_key(0),
    "key": lambda attempt: attempt.key("x"),
}


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("name", FORGED)
def test_nothing_is_built_of_a_forged_name(name: str, built: str) -> None:
    with pytest.raises(UnsafeKey, match="expected eEEEE-aNN"):
        BUILT[built](AttemptId(1, name))


@pytest.mark.parametrize("name", ["", "..", "../x", "/x", "state/../../x", "a//b", "a\\b", "a\0b"])
def test_a_file_that_could_leave_its_attempt_is_rejected_by_the_manifests_name(name: str) -> None:
    with pytest.raises(UnsafeKey, match=r"steps/00000100/e0003-a02/manifest\.json: key "):
        ATTEMPT.key(name)


STRAY = ["receipts/x", "receipts/3.json", "receipts/00003.json\n", "process/00003.bin", "x", "receipts/group-3-1.json"]
STRAY += ["receipts/group-00003-1.json", "receipts/group-000003-01.json", "receipts/group-00003.json"]


@pytest.mark.parametrize("name", STRAY)
def test_a_stray_file_is_nobodys_receipt(name: str) -> None:
    assert receipt_file(ATTEMPT.prefix + name) is None
    assert receipt_file(f"journal/{name}") is None


def test_attempts_are_in_order_of_step_then_epoch_then_number() -> None:
    ordered = [AttemptId.of(*numbers) for numbers in ((1, 9, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (10, 1, 1))]
    assert sorted(reversed(ordered)) == ordered


def test_each_attempt_has_one_name() -> None:
    assert name_of(3, 1) == "e0003-a01" and keys.step_prefix(100) == "steps/00000100/"
    assert AttemptId.in_key("steps/00000100/e0003-a01/x") == (AttemptId(100, "e0003-a01"), "x")
