"""`orchestrator adopt`: take over a directory of Orbax's CheckpointManager."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.errors import EXIT_FAILED, EXIT_OK, UsageError

_WORDS = {
    "adopt": "is adopted",
    "older": "stays: the run has newer steps",
    "there": "is in the run",
    "left": "stays: not asked for",
    "unfinished": "stays: Orbax has not finished it",
}


class FoundStep(msgspec.Struct, frozen=True):
    """A step of Orbax's. verdict: adopt, older, there, left, unfinished or cannot; why: of the last two. bytes: of its
    data."""

    step: int
    path: str
    verdict: str
    why: str
    items: tuple[str, ...]
    bytes: int


class AdoptedSteps(Result, frozen=True):
    """`adopt`. steps: adopted, or to be with --dry_run. older: steps left where they are, because the run has newer
    ones. found: every step that is there. copied: the files are copied, not linked."""

    root: str
    steps: tuple[int, ...]
    older: tuple[int, ...]
    bytes: int
    found: tuple[FoundStep, ...] = ()
    copied: bool = False
    dry_run: bool = False


def run(root: str, flags: Flags) -> AdoptedSteps:
    from orchestrator.compat import adopt  # JAX takes a second to import: only here
    from orchestrator.compat.adopt_plan import Choice

    store, source = open_store(root), flags["from"] or root
    skip = frozenset(name for name in flags["skip"].split(",") if name)
    choice = Choice(skip, _numbers(flags["steps"]), flags["prefix"], flags["as_step"])
    plan = adopt.plan(store, source, choice, copy=flags["copy"])
    total = sum(each.bytes for each in plan.steps)
    if flags["dry_run"]:
        done = adopt.Adopted(plan, total)
    else:
        plan.check()
        about = "copying and reading" if plan.copied else "reading"
        with render.bar(about, total * (1 + plan.copied), "bytes") as bar:
            done = adopt.adopt(store, source, plan, bar.add)
    found = tuple(
        FoundStep(each.step, str(each.path), each.verdict, each.why, each.items, each.bytes) for each in plan.steps
    )
    return AdoptedSteps(store.url, done.steps, done.older, done.bytes, found, plan.copied, flags["dry_run"])


def _numbers(text: str) -> frozenset[int] | None:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise UsageError(f"--steps={text}: expected numbers of steps, separated by commas")
    return frozenset(map(int, words)) if words else None


def show(done: AdoptedSteps, flags: Flags) -> Iterator[render.Shown]:
    steps = ", ".join(map(str, done.steps)) or "no new steps"
    if done.dry_run:
        columns = ("step", "items", "size", "where", "verdict")
        yield render.rows(columns, [_row(each) for each in done.found], right=("step", "size"))
        how = "to copy" if done.copied else "to read"
        yield f"would adopt {steps}, {render.size(done.bytes)} {how}; nothing was done"
        return
    yield f"adopted {steps}; {render.size(done.bytes)} {'copied' if done.copied else 'read once, nothing copied'}"
    if done.older:
        yield f"left where they are, as the run has newer steps: {', '.join(map(str, done.older))}"
    for each in done.found:
        if each.verdict == "unfinished":
            yield render.toned(f"step {each.step}: left: {each.why}", "warn")


def _row(each: FoundStep) -> tuple[render.Cell, ...]:
    known = each.verdict in _WORDS
    verdict = render.words(_WORDS[each.verdict]) if known else render.toned(f"cannot: {each.why}", "bad")
    size = render.size(each.bytes) if each.verdict == "adopt" else ""
    return str(each.step), ", ".join(each.items), size, each.path, verdict


def exit_code(done: AdoptedSteps) -> int:
    return EXIT_FAILED if any(each.verdict == "cannot" for each in done.found) else EXIT_OK


COMMAND = Command(
    run,
    show,
    "take over a directory of Orbax's CheckpointManager, without a copy",
    flags=(
        Flag("from", str, None, "where Orbax's steps are, or one checkpoint; the run's own ROOT if unset"),
        Flag("dry_run", bool, False, "list by step what would be adopted, and what not and why; do nothing"),
        Flag("steps", str, "", "only these steps, separated by commas"),
        Flag("skip", str, "", "items to leave out, separated by commas"),
        Flag("prefix", str, None, "only steps that are called PREFIX_10; --prefix= for 10"),
        Flag("as_step", int, None, "which step a directory is that is one checkpoint, without a number"),
        Flag("copy", bool, False, "copy the files instead of linking them, as from another file system or a store"),
    ),
    examples=(
        "orchestrator adopt /data/run",
        "orchestrator adopt /data/run --from=/data/orbax-run --dry_run",
        "orchestrator adopt /data/run --from=/data/pretrained --as_step=0",
        "orchestrator adopt gs://bucket/run --from=gs://bucket/orbax-run --dry_run",
    ),
    exit_code=exit_code,
)
