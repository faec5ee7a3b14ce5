"""`orchestrator verify`: read steps back, say what is damaged, journal what was found."""

from __future__ import annotations

from typing import Any

from orchestrator.cli import render
from orchestrator.cli.commands import Flags, live_step, open_catalog
from orchestrator.errors import EXIT_DAMAGED, EXIT_FAILED, EXIT_OK, OrchestratorError, UsageError
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import LiveStep
from orchestrator.run.journal_store import Catalog


def verify(root: str, flags: Flags) -> int:
    if flags["repair_journal"] not in ("auto", "never"):
        raise UsageError(f"--repair_journal={flags['repair_journal']}: choose from auto or never")
    sample = _fraction(flags["sample"])
    if flags["by_store"] and sample is not None:
        raise UsageError("--by_store looks at every file and reads no chunk: it goes without --sample")
    catalog = open_catalog(root)
    chosen = list(catalog.require_head().live) if flags["all"] else [live_step(catalog, flags["step"])]
    found = []
    for live in chosen:
        found.append(_verify(catalog, live, sample, flags))
        if not flags["json"]:
            _say(found[-1])  # at once: what comes after may take hours, or fail
    if flags["json"]:
        render.give(found)
    if any(one["problems"] for one in found):
        return EXIT_DAMAGED
    return EXIT_FAILED if any(one["unread"] or one["not_recorded"] for one in found) else EXIT_OK


def _verify(catalog: Catalog, live: LiveStep, sample: float | None, flags: Flags) -> dict[str, Any]:
    from orchestrator.tools import verify

    try:
        total = verify.total_bytes(catalog.manifest(live), sample)
    except OrchestratorError:  # it will be among the findings
        total = live.bytes
    with render.progress("bytes") as display:
        bar = render.Bar(display, f"step {live.step}", total)
        verdict = verify.read_back(
            catalog, live, sample=sample, seed=flags["seed"], by_store=flags["by_store"], on_bytes=bar.add
        )
    not_recorded = ""
    if flags["repair_journal"] == "auto":
        try:
            verify.record(catalog, live, verdict)
        except OrchestratorError as error:  # a reader's right to know does not depend on the right to write
            not_recorded = str(error)
    return {
        "step": live.step,
        "attempt": live.attempt,
        "bytes": live.bytes,
        "files": verdict.files,
        "chunks": verdict.chunks,
        "sample": sample,
        "by_store": flags["by_store"],
        "problems": verdict.damaged,
        "unread": verdict.unread,
        "retired": verdict.retired,
        "not_recorded": not_recorded,
    }


def _say(one: dict[str, Any]) -> None:
    state = "damaged" if one["problems"] else "not read" if one["unread"] else "good"
    if one["retired"]:
        render.say(f"{AttemptId(one['step'], one['attempt']).label}: retired while it was read; a job has newer steps")
        return
    share = "" if one["sample"] is None else f", a sample of {one['sample']:.3g} of the chunks"
    read = f"{one['files']} files and {one['chunks']} chunks of {render.size(one['bytes'])} read back{share}"
    if one["by_store"]:
        read = f"{one['files']} files of {render.size(one['bytes'])} compared by the store's checksums"
    render.say(f"{AttemptId(one['step'], one['attempt']).label}: {state}, {read}")
    for line in (*one["problems"], *one["unread"]):
        render.say(f"  {line}")
    if one["not_recorded"]:
        render.say(f"  not recorded in the journal: {one['not_recorded']}")


def _fraction(text: str | None) -> float | None:
    """`10%` or `0.1` as 0.1; None where nothing was said. Raises UsageError."""
    if text is None:
        return None
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise UsageError(f"--sample={text}: expected a share such as 10%, above 0% and up to 100%")
    return number
