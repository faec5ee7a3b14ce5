"""What a process that met a way has made of the run, held against the contract, and told as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.proof.unreadable_ways import DAMAGED, MAYBE, ODD, UNREAD, Way

ORDER = ("doctor", "reader", "verify", "restore")
PROBE_S = 20.0  # no probe may take longer, whatever it cannot read
LIMIT_S = 40.0  # for one way
_HARMLESS = {"opened-epoch", "restored", "verified"}  # events that a restore or a verify may journal


@dataclass
class Outcome:
    """`probes`: what each brought; `exit`: of the process, None where it was ended for being late. `events`: what was
    journalled meanwhile. `quarantined`: steps. `lost`: objects that are gone or changed. `back`: what one plain restore
    brings when the cause is gone; `lifted`: what it brings after `orchestrator verify --all`."""

    way: Way
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    exit: int | None = None
    met: int = 0
    events: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    back: str = ""
    lifted: str = ""


# The contract.


def judge(outcome: Outcome) -> list[str]:
    """Every way in which this outcome breaks the contract."""
    expected, probes = outcome.way.expected, outcome.probes
    ended = f"no answer within {LIMIT_S:g} s" if outcome.exit is None else f"the process ended with {outcome.exit}"
    silent = [f"{name}: {ended}" for name in ORDER if name not in probes]
    # None: CPython's Thread.start waits for ever for a thread that found no memory to say that it runs (gh-140746).
    problems = [] if outcome.way.crashes and outcome.exit != 0 else silent
    problems += [f"{name}: took {took:.0f} s" for name, took in outcome.seconds.items() if took > PROBE_S]
    problems += [f"{name}: wrong bits" for name, told in probes.items() if told.get("right") is False]
    problems += [f"lost: {key}" for key in outcome.lost]
    if outcome.lifted != "step 2":
        problems.append(f"verify, then restore, when all is well again: {outcome.lifted}")
    if outcome.way.rules and not outcome.met:
        problems.append("nobody has met it")
    if expected == DAMAGED:
        return problems + _damage_problems(outcome)
    problems += _problems_of_reading("reader", outcome) + _problems_of_reading("restore", outcome)
    if expected == ODD:
        return problems
    if outcome.quarantined:
        problems.append(f"quarantined {outcome.quarantined}: {outcome.reasons[0][:200] if outcome.reasons else ''}")
    if more := sorted(set(outcome.events) - _HARMLESS - {"quarantined"}):
        problems.append(f"journalled: {more}")
    if outcome.back != "step 2":
        problems.append(f"restore, when the cause is gone: {outcome.back}")
    return problems + _problems_of_commands(outcome)


def _problems_of_reading(name: str, outcome: Outcome) -> list[str]:
    expected, also, told = outcome.way.expected, outcome.way.also, outcome.probes.get(name)
    if told is None:
        return []
    if "step" in told:
        newest = told["step"] == 2
        return [] if newest else [f"{name}: restored {told['step'] or 'as a new run'}"]
    allowed = {"StorageError", *also} | ({"OrchestratorError"} if expected == ODD else set())
    return [] if allowed & set(told["kinds"]) else [f"{name}: raised {told['kinds'][0]}: {told['text'][:200]}"]


def _problems_of_commands(outcome: Outcome) -> list[str]:
    problems = []
    verify, doctor = outcome.probes.get("verify", {}), outcome.probes.get("doctor", {})
    raised = [told for told in (verify, doctor) if "kinds" in told and not set(outcome.way.also) & set(told["kinds"])]
    for told in raised[:1]:
        problems.append(f"a command raised {told['kinds'][0]}: {told['text'][:200]}")
    steps = verify["json"] if isinstance(verify.get("json"), list) else []
    if found := [problem for one in steps for problem in one["problems"]]:
        problems.append(f"verify: damaged: {found[0][:200]}")
    if not outcome.way.also and verify.get("code") not in (
        (0, 1, None) if outcome.way.expected == MAYBE else (1, None)
    ):
        problems.append(f"verify: exit code {verify.get('code')}")
    if verify.get("code") == 1 and steps and not any(one["unread"] for one in steps):
        problems.append("verify: does not say what was not read")
    findings = (doctor.get("json") or {}).get("findings", ())
    problems += [
        f"doctor: damage: {one['text'][:200]}" for one in findings if one["level"] == "damage" and not outcome.way.also
    ]
    problems += [f"doctor: advises: {one['do']}" for one in findings if "quarantine" in one["do"]]
    return problems


def _damage_problems(outcome: Outcome) -> list[str]:
    """Really damaged: named, quarantined, stepped over."""
    problems = []
    probes = outcome.probes
    if probes.get("restore", {}).get("step") != 1:
        problems.append(f"restore: {said(probes.get('restore', {}))}")
    reader = probes.get("reader", {})
    if reader.get("step") != 1 and "Damaged" not in reader.get("kinds", ()):
        problems.append(f"reader: {said(reader)}")
    if outcome.quarantined != [2]:
        problems.append(f"quarantined: {outcome.quarantined}")
    if not any(re.search(r"step|manifest|intent|extra|process|state|chunk", reason) for reason in outcome.reasons):
        problems.append(f"the reason names nothing: {outcome.reasons}")
    if probes.get("verify", {}).get("code") != 4:
        problems.append(f"verify: exit code {probes.get('verify', {}).get('code')}")
    return problems


def said(told: dict[str, Any], silent: str = "no answer") -> str:
    if "step" in told:
        return f"step {told['step']}" if told["step"] else "a new run"
    if "code" in told:
        return {0: "good", 1: "not read", 4: "damaged"}.get(told["code"], f"exit code {told['code']}")
    return str(told["kinds"][0]) if "kinds" in told else silent


# The tables.

_KINDS = (
    (
        r"(arrays|all): (key|service|user|external|impersonated)",
        "credentials: missing, damaged, revoked, unknown",
    ),
    (r"^(arrays|records): ", "certificate, name, port, proxy, black hole, login page"),
    (r": HTTP .*once", "an HTTP status, once"),
    (r": HTTP ", "an HTTP status, always"),
    (r"listing", "listings"),
    (r"once", "wrong, short or no bytes or an error, once"),
    (r"another user", "permissions"),
    (r"used up|descriptors left", "descriptors or memory used up"),
    (r": (open|read|stat): ", "an error of the file system, always"),
    (r"", "wrong, short or no bytes, late bytes"),
)


def _kind(way: Way) -> str:
    if way.expected in (DAMAGED, ODD):
        return "really damaged" if way.expected == DAMAGED else "a link, a FIFO, an empty directory in its place"
    return next(kind for pattern, kind in _KINDS if re.search(pattern, way.name))


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line for each kind of ways in each place: how often each outcome was."""
    kinds: dict[tuple[str, str], list[Outcome]] = {}
    for one in sorted(outcomes, key=lambda one: (one.way.expected in (DAMAGED, ODD), one.way.place)):
        kinds.setdefault((_kind(one.way), one.way.place), []).append(one)
    lines = [
        "| what | where | ways | a job's restore | `verify --all` | quarantined | back | slowest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, place), mine in kinds.items():
        restored, verified, back = (
            ", ".join(f"{name}: {count}" for name, count in Counter(found).most_common())
            for found in (
                [_probed(one, "restore") for one in mine],
                [_probed(one, "verify") for one in mine],
                [_back(one) for one in mine],
            )
        )
        slowest_s = max((took for one in mine for took in one.seconds.values()), default=0.0)
        kept = sum(bool(one.quarantined) for one in mine)
        cells = [kind, place, str(len(mine)), restored, verified, str(kept), back, f"{slowest_s:.1f} s"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _probed(one: Outcome, name: str) -> str:
    return said(one.probes.get(name, {}), "crash" if one.exit else "no answer")


def _back(one: Outcome) -> str:
    return one.back if one.back == one.lifted else f"{one.lifted} after `verify`"


def report(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| what | where | a job restores | a reader | `verify --all` | quarantined | back | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        probes = [_probed(one, name) for name in ("restore", "reader", "verify")]
        kept = "step " + ", ".join(map(str, one.quarantined)) if one.quarantined else "nothing"
        slowest = max(one.seconds.values(), default=LIMIT_S)
        lines.append(
            "| " + " | ".join([one.way.name, one.way.place, *probes, kept, _back(one), f"{slowest:.1f}"]) + " |"
        )
    told = [verdict(outcomes), *_breaches(outcomes)]
    return "\n".join([summary(outcomes), *told, "", *lines]) + "\n"


def verdict(outcomes: Sequence[Outcome]) -> str:
    whole = [one for one in outcomes if one.way.expected in (UNREAD, MAYBE)]
    given_up = sum(bool(one.quarantined) for one in whole)
    return (
        f"{len(whole)} ways of not being able to read, {len(outcomes) - len(whole)} kinds of damage and of odd things. "
        f"Good steps quarantined: {given_up}. Other than the contract says: {len(list(_breaches(outcomes)))}."
    )


def _breaches(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for one in outcomes:
        if problems := judge(one):
            yield f"- {one.way.label}: {'; '.join(problems)}"
