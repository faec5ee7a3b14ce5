"""What a launcher may say about tier servers."""

from __future__ import annotations

import pytest

from orchestrator.errors import UsageError
from orchestrator.rules.tier_environment import TierEnvironment, tier_environment

SECRET = "0123456789abcdef" * 2


def named(**given: str) -> dict[str, str]:
    return {f"ORCHESTRATOR_TIER_{name.upper()}": value for name, value in given.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, TierEnvironment()),
        ({"secret": SECRET}, TierEnvironment(bytes.fromhex(SECRET))),
        ({"secret": "", "server": "", "address": "", "peers": ""}, TierEnvironment(peers=("",))),
        ({"peers": "10.0.0.1:80, ,[::1]:81"}, TierEnvironment(peers=("10.0.0.1:80", "", "[::1]:81"))),
        ({"server": "h:1", "secret": SECRET}, TierEnvironment(bytes.fromhex(SECRET), server="h:1")),
        ({"address": "10.0.0.1"}, TierEnvironment(listen="10.0.0.1:0")),
        ({"address": "10.0.0.1:77"}, TierEnvironment(listen="10.0.0.1:77")),
        ({"address": "::1"}, TierEnvironment(listen="[::1]:0")),
    ],
)
def test_what_is_said_is_read(given: dict[str, str], expected: TierEnvironment) -> None:
    assert tier_environment(named(**given)) == expected


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({"secret": SECRET[:-1]}, "ORCHESTRATOR_TIER_SECRET"),
        ({"secret": "short"}, "ORCHESTRATOR_TIER_SECRET"),
        ({"secret": "x" * 32}, "ORCHESTRATOR_TIER_SECRET"),
        ({"server": "h", "secret": SECRET}, "ORCHESTRATOR_TIER_SERVER"),
        ({"server": "h:1"}, "ORCHESTRATOR_TIER_SECRET is not"),
        ({"peers": "h:1,nobody"}, "ORCHESTRATOR_TIER_PEERS"),
        ({"address": "a b"}, "ORCHESTRATOR_TIER_ADDRESS"),
        ({"address": "10.0.0.1:99999"}, "ORCHESTRATOR_TIER_ADDRESS"),
    ],
)
def test_what_cannot_be_used_is_the_users_error_and_a_secret_is_never_shown(
    given: dict[str, str], variable: str
) -> None:
    with pytest.raises(UsageError) as raised:
        tier_environment(named(**given))
    assert variable in str(raised.value) and given.get("secret", "?") not in str(raised.value)
    assert SECRET not in repr(tier_environment(named(secret=SECRET)))
