"""What is explored of jobs on several hosts, and the mistakes that must be noticed there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from orchestrator.rules import held, journal, survival
from tests.proof.model.hosts import Rules, Scenario
from tests.proof.model.mutations import mutated

SCENARIOS = (
    Scenario("zombies", ("s", "t"), (2, 2)),
    Scenario("three starts", ("s", "t"), (2, 1, 0), overlap=False),
    Scenario("a host is lost", ("s", "t", "u"), (1, 1), losses=1),
    Scenario("a host is lost, and again", ("s", "t"), (1, 0, 0), losses=2, overlap=False),
    Scenario("a slice is lost", ("s", "s", "t"), (1, 0), losses=2, overlap=False),
    Scenario("two copies", ("s", "t", "u"), (1, 0), copies=2, losses=2),
    Scenario("no copies", ("s", "t"), (2, 1), copies=0, losses=1),
    Scenario("copies lie", ("s", "t"), (2, 0), lies=1),
    Scenario("one lies, one is lost", ("s", "t"), (1, 1), lies=1, losses=1),
    Scenario("back with an old tier", ("s", "t"), (1, 1, 0), leaves=1, overlap=False),
    Scenario("uploads", ("s", "t"), (2, 1), promotes=True),
    Scenario("uploads of what lies", ("s", "t"), (1, 1), promotes=True, lies=1),
    Scenario("uploads and losses", ("s", "t"), (1, 1), promotes=True, losses=1, overlap=False),
    Scenario("uploads beside saves", ("s", "t"), (2, 0), promotes=True, saves=True),
)


@dataclass(frozen=True)
class Mutation:
    """An edit of a shipped rule's source (`rule` is its field in Rules), or a wrong order in what is around it
    (`flag`; where two make up for each other, both are wrong). caught: what the violation says."""

    name: str
    scenario: str
    caught: str
    rule: str = ""
    function: str = ""
    module: ModuleType | None = None
    old: str = ""
    new: str = ""
    flag: str = ""

    def rules(self) -> Rules:
        changed: dict[str, Any] = {flag: not getattr(Rules(), flag) for flag in self.flag.split()}
        if self.module:
            changed[self.rule] = mutated(self.module, self.old, self.new)[self.function]
        return replace(Rules(), **changed)


_EPOCH = "head is None or head.epoch != epoch:\n        return _not_our_epoch(head, epoch)\n    if is_live"
_OLDER = "head.epoch >= epoch:"

MUTATIONS = (
    Mutation(
        "steps are ordered by their number alone",
        "three starts",
        "of a newer start",
        *("candidates", "candidates", held, "rank(one.id), one.manifest", "one.step, one.manifest"),
    ),
    Mutation(
        "what the store has is not looked at",
        "uploads",
        "newer",
        *("candidates", "candidates", held, "if journalled.admits(one.id)", ""),
    ),
    Mutation(
        "the oldest is tried first",
        "zombies",
        "newer",
        *("candidates", "candidates", held, "reverse=True)\n\n\ndef superseded", ")\n\n\ndef superseded"),
    ),
    Mutation(
        "a tier's log takes an older epoch",
        "zombies",
        "is followed by",
        *("open_tier", "open_epoch", held, _OLDER, "head.epoch == epoch:"),
    ),
    Mutation(
        "a log takes a step of an older epoch",
        "zombies",
        "that epoch 2 has opened",
        *("enter", "commit", journal, _EPOCH, "head is None:\n        return None\n    if is_live"),
    ),
    Mutation(
        "the others' logs follow an older epoch",
        "zombies",
        "changes a tier",
        *("follow", "follow", held, "head is None or head.epoch != epoch:", "head is None:"),
    ),
    Mutation(
        "an upload is committed in a run that was taken over",
        "uploads",
        "commits in a run that epoch 2",
        *("commit", "commit", journal, _EPOCH, "head is None:\n        return None\n    if is_live"),
    ),
    Mutation(
        "more is promised than copies can keep",
        "a host is lost, and again",
        "was promised to survive",
        *("survives", "survives", survival, "return not lost_parts(targets, lost)", "return True"),
    ),
    Mutation("bytes of a peer are believed", "copies lie", "bytes that it never had", flag="checks_read_bytes"),
    Mutation("a bad copy ends the search", "copies lie", "is chosen over", flag="tries_other_hosts"),
    Mutation("what is uploaded is not checked", "uploads of what lies", "not whole", flag="checks_uploaded_bytes"),
    Mutation("held before all copies are in", "a host is lost", "never had part", flag="waits_for_copies"),
    Mutation(
        "held when process 0 says so", "a host is lost", "is chosen over", flag="is_held_when_entered finds_by_manifest"
    ),
    Mutation(
        "held when the first follows",
        "a slice is lost",
        "is chosen over",
        flag="is_held_when_first_follows finds_by_manifest",
    ),
    Mutation("servers take copies of any epoch", "zombies", "takes a copy of epoch 1", flag="servers_fence"),
    Mutation(
        "a new log of process 0 ends what the others list",
        "a host is lost, and again",
        "nothing is chosen",
        *("follow", "follow", held, "if newest is None or rank(old.id) > rank(newest.id)]", "if False]"),
        flag="finds_by_manifest",
    ),
    Mutation(
        "what is held is freed",
        "zombies",
        "was promised",
        *("to_free", "to_free", held, "if one in listed or one.epoch > epoch:", "if one.epoch > epoch:"),
    ),
    Mutation(
        "what is being held is freed",
        "zombies",
        "has no part",
        *("to_free", "to_free", held, "return one in decided", "return True"),
    ),
    Mutation("an upload may come after a newer save", "uploads beside saves", "after", flag="keeps_uploads_in_order"),
)
