"""NaN and the infinities where JSON has no word for them: every value comes back as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.rules import arguments, json_numbers
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import Extra, Head, crc32c
from tests.support.builders import head, live

NAMES = st.one_of(st.text(st.characters(codec="utf-8"), max_size=4), st.from_regex(r"\$*(number)?", fullmatch=True))
WORDS = st.sampled_from(["NaN", "Infinity", "-Infinity"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), NAMES, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types, bit for bit: NaN is NaN, and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@given(VALUES)
@example({"$number": "Infinity"})
@example({"$number": {"$$number": math.nan}})
@example({"$number": 3, "more": math.inf})
@example({"$number": None})
def test_every_value_of_the_users_comes_back_as_it_was(value: Any) -> None:
    assert same(arguments.plain_json("value", value), value)
    extra = Extra(
        format=1, write_id="x", step=1, timestamp=0.0, stored_metrics={}, stored_extra={"a": json_numbers.pack(value)}
    )
    body = encode(extra)
    assert same(decode(body, Extra, "extra.json").extra, {"a": value})
    json.loads(body, parse_constant=pytest.fail)  # JSON for every other program


@given(st.dictionaries(NAMES, st.floats(), max_size=3))
def test_metrics_come_back_from_a_head_as_they_were(metrics: dict[str, float]) -> None:
    body = encode(head(live(1, metrics=metrics)))
    assert same(decode(body, Head, "journal").live[0].metrics, metrics)
    json.loads(body, parse_constant=pytest.fail)


def test_what_is_stored_can_be_read_by_people() -> None:
    assert json_numbers.stored_all({"a": math.nan, "b": -math.inf, "c": 0.5}) == {
        "a": "NaN",
        "b": "-Infinity",
        "c": 0.5,
    }
    assert json_numbers.pack({"best": [math.inf, 1]}) == {"best": [{"$number": "Infinity"}, 1]}
    assert json_numbers.pack({"$number": "Infinity"}) == {"$$number": "Infinity"}
    assert json_numbers.pack({"$schema": 1, "$number": 2}) == {"$schema": 1, "$number": 2}


def test_what_earlier_versions_wrote_is_read() -> None:
    old = encode(head(live(1, metrics={"loss": 0.5}))).rpartition(b',"crc32c":')[0] + b"}"
    fields = json.loads(old)
    del fields["live"][0]["metrics_omitted"], fields["live"][0]["metrics_absent"]
    fields["live"][0]["metrics"]["bad"] = None  # `adopt` of a NaN
    body = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    entry = decode(body + f',"crc32c":"{crc32c(body)}"}}\n'.encode(), Head, "journal").live[0]
    assert same(entry.metrics, {"loss": 0.5, "bad": math.nan})
