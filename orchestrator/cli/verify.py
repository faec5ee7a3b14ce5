"""`orchestrator verify`: read steps back, report what is damaged, journal what was found."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import STEP, Command, Flag, Flags, Result, live_step, open_store
from orchestrator.errors import EXIT_DAMAGED, EXIT_FAILED, EXIT_OK, OrchestratorError, UsageError
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import LiveStep
from orchestrator.run.journal_store import JournalStore


class VerifiedStep(Result, frozen=True):
    """`verify` prints a list of these. problems: what is damaged; unread: what could not be read;
    retired: a job has retired the step meanwhile; not_recorded: why the journal does not say so."""

    step: int
    attempt: str
    bytes: int
    files: int
    chunks: int
    sample: float | None
    by_store: bool
    problems: tuple[str, ...]
    unread: tuple[str, ...]
    retired: str
    not_recorded: str


def run(root: str, flags: Flags) -> Iterator[VerifiedStep]:
    if flags["repair_journal"] not in ("auto", "never"):
        raise UsageError(f"--repair_journal={flags['repair_journal']}: choose from auto, never")
    sample = _fraction(flags["sample"])
    if flags["by_store"] and sample is not None:
        raise UsageError("--by_store looks at every file and reads no chunk: it goes without --sample")
    store = open_store(root)
    for live in store.require_head().live if flags["all"] else [live_step(store, flags["step"])]:
        yield _verify(store, live, sample, flags)


def _fraction(text: str | None) -> float | None:
    """`10%` or `0.1` as 0.1; None for None. Raises UsageError."""
    if text is None:
        return None
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise UsageError(f"--sample={text}: expected a share such as 10%, above 0% and up to 100%")
    return number


def _verify(store: JournalStore, live: LiveStep, sample: float | None, flags: Flags) -> VerifiedStep:
    from orchestrator.tools import verify  # JAX takes a second to import: only here

    try:
        total = verify.total_bytes(store.step(live).manifest, sample)
    except OrchestratorError:  # it will be among the findings
        total = live.bytes
    with render.progress("bytes") as display:
        bar = render.Bar(display, f"step {live.step}", total)
        verdict = verify.read_back(
            store, live, sample=sample, seed=flags["seed"], by_store=flags["by_store"], on_bytes=bar.add
        )
    not_recorded = ""
    if flags["repair_journal"] == "auto":
        try:
            verify.record(store, live, verdict)
        except OrchestratorError as error:  # a reader's right to know does not depend on the right to write
            not_recorded = str(error)
    return VerifiedStep(
        step=live.step,
        attempt=live.attempt,
        bytes=live.bytes,
        files=verdict.files,
        chunks=verdict.chunks,
        sample=sample,
        by_store=flags["by_store"],
        problems=tuple(verdict.damaged),
        unread=tuple(verdict.unread),
        retired=verdict.retired,
        not_recorded=not_recorded,
    )


def show(one: VerifiedStep, flags: Flags) -> Iterator[render.Shown]:
    name = AttemptId(one.step, one.attempt).label
    if one.retired:
        yield f"{name}: retired while it was read; a job has newer steps"
        return
    state = "damaged" if one.problems else "not read" if one.unread else "good"
    share = "" if one.sample is None else f", a sample of {one.sample:.3g} of the chunks"
    read = f"{one.files} files and {one.chunks} chunks of {render.size(one.bytes)} read back{share}"
    if one.by_store:
        read = f"{one.files} files of {render.size(one.bytes)} compared by the store's checksums"
    yield f"{name}: {state}, {read}"
    for line in (*one.problems, *one.unread):
        yield f"  {line}"
    if one.not_recorded:
        yield f"  not recorded in the journal: {one.not_recorded}"


def exit_code(one: VerifiedStep) -> int:
    if one.problems:
        return EXIT_DAMAGED
    return EXIT_FAILED if one.unread or one.not_recorded else EXIT_OK


COMMAND = Command(
    run,
    show,
    "read a step back, compare every file and chunk with the manifest; 4 if something is damaged",
    flags=(
        STEP,
        Flag("all", bool, False, "every step"),
        Flag("sample", str, None, "of the arrays' chunks, only this share, such as 10%; marks nothing as verified"),
        Flag("seed", int, 0, "chooses the sample"),
        Flag("by_store", bool, False, "compare the store's own checksums: gs:// downloads nothing; nothing verified"),
        Flag("repair_journal", str, "auto", "auto: mark the good as verified, quarantine the damaged; or never"),
    ),
    examples=(
        "orchestrator verify /data/run",
        "orchestrator verify /data/run --all --repair_journal=never",
        "orchestrator verify /data/run --step=100 --sample=10%",
        "orchestrator verify /data/run --all --by_store",
    ),
    exit_code=exit_code,
)
