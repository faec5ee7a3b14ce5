"""`orchestrator report`: one self-contained page about a run."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from importlib import resources
from typing import Any

import msgspec

from orchestrator.cli import render
from orchestrator.cli.command import EVENTS, Command, Flag, Flags, open_store
from orchestrator.cli.report_parts import RunReport
from orchestrator.cli.run_report import build
from orchestrator.errors import StorageError
from orchestrator.observe.event_log import HISTORY, Tail, directory_of
from orchestrator.observe.timeline import Timeline
from orchestrator.texts import printable

_PLACE = "/*REPORT*/null"
# One script, in this order: later ones use what earlier ones define.
_SCRIPTS = ("base.js", "timeline.js", "summary.js", "plots.js", "tables.js", "shardings.js", "start.js")


def run(root: str, flags: Flags) -> RunReport:
    store = open_store(root)
    tail = Tail(directory_of(store.url, flags["events_dir"]), HISTORY)
    timeline = Timeline().add(tail.more(whole=False))
    return build(store, timeline, time.time(), max(tail.newest.values(), default=0.0), tail.cut_at)


def show(made: RunReport, flags: Flags) -> Iterator[render.Shown]:
    """People are shown the page, which is written to --output, and a line that says where."""
    body = page(made)
    write_whole(flags["output"], body)
    where = os.path.abspath(flags["output"])
    yield f"{where}: {len(made.saves)} saves, {len(made.epochs)} epochs, {render.size(len(body))}"


def page(made: RunReport) -> str:
    """The page, with everything in it."""
    parts = resources.files("orchestrator.cli").joinpath("page")
    read = {name: parts.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", *_SCRIPTS)}
    # `<` is escaped, so that no text of a run can end the script. The data goes in last: it may contain any marker.
    body = msgspec.json.encode(_printable(msgspec.to_builtins(made))).decode().replace("<", "\\u003c")
    html = read["page.html"].replace("/*STYLE*/", read["page.css"])
    return html.replace("/*SCRIPT*/", "".join(read[name] for name in _SCRIPTS)).replace(_PLACE, body, 1)


def _printable(value: Any) -> Any:
    """A browser obeys no escape sequences, but bidirectional overrides; and what is copied out of it goes anywhere."""
    match value:
        case str():
            return printable(value)
        case dict():
            return {printable(name): _printable(each) for name, each in value.items()}
        case list() | tuple():
            return [_printable(each) for each in value]
    return value


def write_whole(path: str, text: str) -> None:
    """Replace `path`; nobody sees half of it."""
    partial = f"{path}.{uuid.uuid4().hex[:8]}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


COMMAND = Command(
    run,
    show,
    "one page: verdict, saves, stragglers, incidents, goodput",
    flags=(Flag("output", str, "report.html", "the file to write", short="o", path=True), EVENTS),
    examples=("orchestrator report /data/run -o report.html",),
)
