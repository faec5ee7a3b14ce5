"""Mistakes that the checker must notice: edits of the shipped rules' own source, and wrong orders in the shells.

`old` must occur exactly once in the module, so that a rule which moves or changes takes its mutation along or fails.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

from orchestrator.rules import attempt, evidence, journal

from .rules import Rules


@dataclass(frozen=True)
class Mutation:
    """`caught_by`: the invariant that must fail first, in `scenario`."""

    name: str
    scenario: str
    caught_by: str
    module: ModuleType | None = None
    old: str = ""
    new: str = ""
    flags: tuple[tuple[str, Any], ...] = ()

    def rules(self) -> Rules:
        changed = dict(self.flags)
        if self.module:
            namespace = mutated(self.module, self.old, self.new)
            names = {field.name for field in fields(Rules)} & set(namespace)
            changed |= {name: namespace[name] for name in names}
        return replace(Rules(), **changed)


def mutated(module: ModuleType, old: str, new: str) -> dict[str, Any]:
    """The functions and tables of `module` with one piece of source replaced; its classes stay the shipped ones."""
    source = inspect.getsource(module)
    if source.count(old) != 1:
        raise AssertionError(f"{module.__name__} has {source.count(old)} times, expected once: {old!r}")
    tree = ast.parse(source.replace(old, new))
    tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    namespace = dict(vars(module))
    exec(compile(tree, f"{module.__name__} with {new!r}", "exec"), namespace)
    return namespace


def edit(name: str, scenario: str, caught_by: str, module: ModuleType, old: str, new: str) -> Mutation:
    return Mutation(name, scenario, caught_by, module, old, new)


def shell(name: str, scenario: str, caught_by: str, **flags: Any) -> Mutation:
    return Mutation(name, scenario, caught_by, flags=tuple(flags.items()))


NOT_OURS = "if head is None or head.epoch != epoch:\n        return _not_our_epoch(head, epoch)\n"

MUTATIONS = (
    edit("a commit does not look at the epoch", "rivals", "fence", journal,
         f"    {NOT_OURS}    if is_live", "    assert head\n    if is_live"),
    edit("an abort does not look at the epoch", "rival processes", "fence", journal,
         f"    {NOT_OURS}    if is_known", "    assert head\n    if is_known"),
    edit("opening leaves the epoch as it is", "rivals", "fence", journal,
         "epoch=(head.epoch if head else 0) + 1", "epoch=max(1, head.epoch if head else 0)"),
    edit("a replaced attempt is not retired", "rivals", "5", journal,
         '*(retired_as(old, "replaced") for old in replaced if old.restorable),', ""),
    edit("retention is not journalled as retired", "commands", "5", journal,
         '(retired_as(old, "retention") for old in live if old.step in dropped)', "()"),
    edit("retention drops the newest step", "commands", "1", journal,
         "set(kept_by(keep, good, now)) | {good[-1].step}", "{entry.step for entry in good[:-1]}"),
    edit("retention drops the newest verified step", "commands", "6", journal,
         "kept.update(proven[-1:])", "pass"),
    edit("retention drops pinned steps", "commands", "6", journal,
         "kept.update(entry.step for entry in live if entry.pins)", "pass"),
    edit("a quarantined step counts as the newest", "commands", "1", journal,
         "(entry for entry in reversed(head.live) if entry.restorable)", "(entry for entry in reversed(head.live))"),
    edit("attempts of the running epoch are collected", "rivals", "5", journal,
         "attempt.epoch < head.epoch", "attempt.epoch <= head.epoch"),
    edit("live attempts are collected", "rivals", "5", journal,
         "and not is_known(head, attempt)", "and not is_retired(head, attempt)"),
    edit("a commit does not wait for all receipts", "processes", "2", attempt,
         "if state.missing:\n        return state, None\n    if problems := uncovered(state.intent, state.receipts):\n",
         "if problems := []:\n"),
    edit("a hole in an array does not matter", "processes", "2", attempt,
         "if problems := uncovered(state.intent, state.receipts):", "if problems := []:"),
    edit("at the deadline the step is committed", "processes", "2", attempt,
         "return _abort(replace(state, failures=(*state.failures, *silent)), Cause.SILENT, reason)",
         "return replace(state, phase=Phase.FINALIZING), Finalize()"),
    edit("retention drops quarantined steps", "commands", "8", journal,
         "frozenset(entry.step for entry in good if entry.step not in kept)",
         "frozenset(entry.step for entry in live if entry.step not in kept)"),
    edit("a quarantined attempt is replaced like any other", "evidence", "8", journal,
         "aside = (*head.aside, *(replace(old, pins=()) for old in replaced if not old.restorable))",
         "aside = head.aside"),
    edit("what was put aside is an orphan", "evidence", "8", journal,
         " or is_retired(head, attempt) or is_aside(head, attempt)",
         " or is_retired(head, attempt)"),
    edit("a whole attempt that was never committed is collected", "rivals", "5", journal,
         "and not (one.whole and not superseded(head, attempt))", ""),
    edit("opening does not see that the run has changed since it was compared", "strangers", "9", journal,
         "if compared is not None and tree_of(head) != compared.tree:", "if False:"),
    edit("an attempt of a later epoch than the head's proves nothing", "broken copy", "12", evidence,
         "if attempt.epoch > epoch:", "if False:"),
    edit("what records build on proves nothing", "broken copy", "12", evidence,
         "if one.built_on > version and not", "if False and not"),
    shell("a job opens its epoch before it compares", "strangers", "9", compares_first=False),
    shell("an agent that only reads opens an epoch", "strangers", "13", opens_when_made=True),
    shell("nobody looks whether the journal has lost its tail", "broken copy", "12", looks_first=False),
    shell("records build on an entry that could vanish", "commands", "12", builds_on_durable=False),
    shell("an attempt that was finished after the listing is collected", "gc", "5", checks_again=False),
    shell("damage is believed at first sight", "unread", "7", reads_twice=False),
    shell("what cannot be read is quarantined", "unread", "7", unread_is_damage=True),
    shell("an entry is overwritten", "rivals", "2", put=lambda there, body: (body, True)),
    shell("a lost race is not decided again", "rivals", "fence", decides_again=False),
    shell("a lost reply is taken for success", "rivals", "12", unknown_is="ours"),
    shell("two writers' bodies cannot be told apart", "three rivals", "3", ids_differ=False),
    shell("an append is done before its entry is durable", "rivals", "12", syncs_entries=False),
    shell("a receipt is written before the data's fsync", "processes", "3", seals_first=False),
    shell("a member hands its receipt over before the data's fsync", "groups", "3", hands_what_is_durable=False),
    shell("a leader signs for its whole group, whoever is in", "groups", "3", signs_what_is_handed=False),
    shell("an entry that was read is believed before it is durable", "processes", "4", settles_before_report=False),
    shell("data is deleted before it is retired", "gc", "5", retires_first=False),
    shell("data is deleted before its retirement is durable", "rivals", "5", settles_before_delete=False),
    shell("readers list directories instead of the journal", "rivals", "1", readers_need_journal=False),
    shell("an attempt's name is used again", "rivals", "fence", attempt_name=lambda epoch, number: "e0001-a01"),
)  # fmt: skip
