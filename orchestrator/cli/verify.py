"""`orchestrator verify`: read steps back, report what is damaged, journal what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from msgspec.structs import replace

from orchestrator.cli import render
from orchestrator.cli.command import STEP, Command, Flag, Flags, Result, live_step, open_store
from orchestrator.errors import EXIT_DAMAGED, EXIT_FAILED, EXIT_OK, OrchestratorError, UsageError
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import LiveStep
from orchestrator.run.journal_store import JournalStore

_TONES: dict[str, render.Tone] = {"damaged": "bad", "not read": "warn", "good": "good"}


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


class JudgedStep:
    """A step that was read back. What was found is there before anything is written: a reader's right to know depends
    neither on the right to write nor on a store that lets a write hang."""

    def __init__(self, found: VerifiedStep, record: Callable[[], None] | None) -> None:
        self.found = found
        self._record = record

    def recorded(self) -> VerifiedStep:
        """After an attempt to journal the verdict, the first time; with what kept it from the journal."""
        record, self._record = self._record, None
        try:
            if record:
                record()
        except OrchestratorError as error:
            self.found = replace(self.found, not_recorded=str(error))
        return self.found


def run(root: str, flags: Flags) -> Iterator[JudgedStep]:
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


def _verify(store: JournalStore, live: LiveStep, sample: float | None, flags: Flags) -> JudgedStep:
    from orchestrator.tools import verify  # JAX takes a second to import: only here

    try:
        total = verify.total_bytes(store.step(live).manifest, sample)
    except OrchestratorError:  # it will be among the findings
        total = live.bytes
    with render.bar(f"step {live.step}", total, "bytes") as bar:
        verdict = verify.read_back(
            store, live, sample=sample, seed=flags["seed"], by_store=flags["by_store"], on_bytes=bar.add
        )
    found = VerifiedStep(
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
        not_recorded="",
    )
    auto = flags["repair_journal"] == "auto"
    return JudgedStep(found, partial(verify.record, store, live, verdict) if auto else None)


def encode(judged: JudgedStep) -> VerifiedStep:
    return judged.recorded()


def show(judged: JudgedStep, flags: Flags) -> Iterator[render.Shown]:
    one = judged.found
    name = AttemptId(one.step, one.attempt).label
    if one.retired:
        yield f"{name}: retired while it was read; a job has newer steps"
        return
    state = "damaged" if one.problems else "not read" if one.unread else "good"
    files, size = render.counted(one.files, "file"), render.size(one.bytes)
    read = f"{files} and {render.counted(one.chunks, 'chunk')} of {size} read back"
    if one.sample is not None:  # less than `size` was read
        read += f", a sample of {100 * one.sample:.3g}% of the chunks"
    if one.by_store:
        read = f"{files} of {size} compared by the store's checksums"
    yield render.toned(f"{name}: {state}, {read}", _TONES[state])
    for line in (*one.problems, *one.unread):
        yield f"  {line}"
    if why := judged.recorded().not_recorded:  # only now is anything written
        yield render.toned(f"{name}: {state}, but not recorded in the journal: {why}", "warn")


def exit_code(judged: JudgedStep) -> int:
    one = judged.recorded()
    if one.problems:
        return EXIT_DAMAGED
    return EXIT_FAILED if one.unread or one.not_recorded else EXIT_OK


COMMAND = Command(
    run,
    show,
    "read steps back and compare every byte",
    flags=(
        STEP,
        Flag("all", bool, False, "every step"),
        Flag("sample", str, None, "of the arrays' chunks, only this share, such as 10%; marks nothing as verified"),
        Flag("seed", int, 0, "chooses the sample"),
        Flag("by_store", bool, False, "compare the store's own checksums: gs:// downloads nothing; nothing verified"),
        Flag(
            "repair_journal",
            str,
            "auto",
            "auto: mark the good as verified, quarantine the damaged; or never",
            choices=("auto", "never"),
        ),
    ),
    examples=(
        "orchestrator verify /data/run",
        "orchestrator verify /data/run --all --repair_journal=never",
        "orchestrator verify /data/run 100 --sample=10%",
        "orchestrator verify /data/run --all --by_store",
    ),
    exit_code=exit_code,
    encode=encode,
    detail="Each file and chunk is compared with the manifest. A verdict is printed before it is journalled. "
    "Exit code 4 if a step is damaged, 1 if one could not be read.",
)
