"""What each command does: read, decide with the shipped rules, show. Errors are raised; `main` prints them."""

from __future__ import annotations

import getpass
import os
import socket
from functools import partial
from typing import Any

import msgspec

from orchestrator import policy
from orchestrator.cli import render
from orchestrator.errors import EXIT_FAILED, EXIT_OK, StepNotFound, UsageError
from orchestrator.rules import arguments, journal
from orchestrator.rules.matching import brief
from orchestrator.rules.records import Head, LeafSpec, LiveStep
from orchestrator.rules.restore_cost import leaf_bytes
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import open_storage

Flags = dict[str, Any]
METRICS_SHOWN = 8  # of each step, in a table


def open_catalog(root: str) -> Catalog:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        user = str(os.getuid())
    return Catalog(open_storage(root), writer=f"cli/{user}@{socket.gethostname()}")


def ls(root: str, flags: Flags) -> int:
    catalog = open_catalog(root)
    head = catalog.require_head()
    newest = journal.newest(head)
    loose = sorted(attempt for attempt in catalog.attempts() if not journal.is_known(head, attempt))
    if flags["json"]:
        render.give(
            {
                "root": catalog.url,
                "version": head.version,
                "epoch": head.epoch,
                "newest": newest.step if newest else None,
                "steps": [builtins(live) for live in head.live],
                "retired": [builtins(gone) for gone in head.retired],
                "aside": [builtins(live) for live in head.aside],
                "uncommitted": [{"step": attempt.step, "attempt": attempt.name} for attempt in loose],
            }
        )
        return EXIT_OK
    rows = [_row(live, newest) for live in sorted(head.live, key=lambda live: live.step)]
    if rows:
        render.table(["", "step", "attempt", "trust", "size", "saved", "metrics", "pins"], rows, right=["step", "size"])
    else:
        render.say("no committed steps")
    total = sum(live.bytes for live in head.live)
    counts = f"{len(head.live)} steps, {render.size(total)}; epoch {head.epoch}, journal version {head.version}"
    more = [f"{len(loose)} uncommitted"] if loose else []
    more += [f"{len(head.aside)} quarantined and saved again"] if head.aside else []
    more += [f"{len(head.retired)} to be deleted (orchestrator gc)"] if head.retired else []
    render.say("; ".join([counts, *more]))
    return EXIT_OK


def _row(live: LiveStep, newest: LiveStep | None) -> list[str]:
    few = dict(list(live.metrics.items())[:METRICS_SHOWN])
    more = len(live.stored_metrics) - len(few) + live.metrics_omitted
    metrics = _shown_metrics(few) + (f" and {more} more" if more else "")
    mark = "*" if live == newest else ""  # what a restore takes
    saved = render.moment(live.time)
    return [
        mark,
        str(live.step),
        live.attempt,
        live.trust,
        render.size(live.bytes),
        saved,
        metrics,
        " ".join(live.pins),
    ]


def _shown_metrics(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={render.number(value)}" for name, value in metrics.items())


def inspect(root: str, flags: Flags) -> int:
    catalog = open_catalog(root)
    live = live_step(catalog, flags["step"])
    manifest = catalog.manifest(live)
    intent = catalog.intent(live, manifest)
    extra = catalog.extra(live, manifest)
    if flags["json"]:
        leaves = [builtins(leaf) | {"bytes": leaf_bytes(leaf)} for leaf in intent.tree.leaves]
        render.give(
            {
                "root": catalog.url,
                "step": builtins(live),
                "opened_by": intent.opened_by,
                "epoch": intent.epoch,
                "process_count": intent.process_count,
                "device_count": intent.device_count,
                "mesh": intent.mesh,
                "leaves": leaves,
                "metrics": extra.stored_metrics,
                "extra": extra.stored_extra,
                "files": [builtins(entry) for entry in manifest.files],
                "processes": _processes(manifest.hosts, manifest.seconds, catalog, live),
            }
        )
        return EXIT_OK
    mesh = " x ".join(f"{name}={count}" for name, count in intent.mesh.items()) or "no mesh"
    render.say(f"{catalog.url} {live.id.label}: {live.trust}, saved {render.moment(live.time)}")
    render.say(f"{intent.process_count} processes, {intent.device_count} devices, {mesh}; opened by {intent.opened_by}")
    if extra.stored_metrics:
        render.say(f"metrics: {_shown_metrics(extra.metrics)}")
    render.say("")
    rows = [
        [leaf.label, brief(leaf.kind, leaf.shape, leaf.dtype), leaf.sharding or leaf.value[:40], _shown_bytes(leaf)]
        for leaf in intent.tree.leaves
    ]
    render.table(["leaf", "type", "sharding or value", "size"], rows, right=["size"])
    render.say("")
    columns = ["process", "host", "files", "written", "stage", "write", "seal"]
    cells = []
    for told in _processes(manifest.hosts, manifest.seconds, catalog, live):
        times = [f"{told['seconds'].get(name, 0.0):.3f} s" for name in ("stage", "write", "seal")]
        cells.append([str(told["process"]), told["host"], str(told["files"]), render.size(told["bytes"]), *times])
    render.table(columns, cells, right=[column for column in columns if column != "host"])
    return EXIT_OK


def _processes(
    hosts: tuple[str, ...], seconds: tuple[dict[str, float], ...], catalog: Catalog, live: LiveStep
) -> list[dict[str, Any]]:
    told = []
    for index, (host, times) in enumerate(zip(hosts, seconds, strict=True)):
        found = catalog.receipt(live.id, index)
        files = found[0].files if found else ()
        small = found[0].small.values() if found else ()  # goes with the receipt
        written = sum(entry.bytes for entry in files) + sum(map(len, small))
        told.append({"process": index, "host": host, "files": len(files), "bytes": written, "seconds": times})
    return told


def _shown_bytes(leaf: LeafSpec) -> str:
    return render.size(leaf_bytes(leaf)) if leaf.kind_stored else ""


def log(root: str, flags: Flags) -> int:
    catalog = open_catalog(root)
    arguments.whole("--last", flags["last"])
    catalog.require_head()
    heads = list(catalog.entries())
    heads = heads[-flags["last"] :] if flags["last"] else heads
    if flags["json"]:
        fields = ("version", "epoch", "writer", "time", "event")
        render.give([{name: builtins(getattr(head, name)) for name in fields} for head in heads])
        return EXIT_OK
    rows = [
        [str(head.version), render.moment(head.time), str(head.epoch), *_story(head), head.writer] for head in heads
    ]
    render.table(["version", "time", "epoch", "event", "step", "what", "by"], rows, right=["version", "epoch", "step"])
    return EXIT_OK


def _story(head: Head) -> list[str]:
    event = head.event
    causes = [f"process {one.process} ({one.host}) in {one.phase}: {one.cause}" for one in event.failures]
    steps = ", ".join(map(str, event.steps))
    let_go = {"committed": "retired ", "retired": "", "collected": "", "recovered": "steps "}.get(event.kind)
    about = [f"{let_go}{steps}"] if steps and let_go is not None else []
    what = "; ".join(
        [*([event.attempt] if event.attempt else []), *([event.reason] if event.reason else []), *causes, *about]
    )
    return [event.kind, "" if event.step is None else str(event.step), what]


def gc(root: str, flags: Flags) -> int:
    catalog = open_catalog(root)
    head = catalog.require_head()
    keep = flags["keep_last"]
    if keep is not None:
        arguments.whole("--keep_last", keep, least=1)
    if keep is not None and not flags["dry_run"]:
        catalog.append(partial(journal.retire, keep=policy.last(keep)))
    if flags["quarantined"] is not None:
        discard = partial(journal.discard, step=int(flags["quarantined"]))
        _rehearse(catalog, discard) if flags["dry_run"] else catalog.append(discard)
    would_retire: tuple[int, ...] = (flags["quarantined"],) if flags["quarantined"] is not None else ()
    if keep is not None and flags["dry_run"]:
        following = journal.retire(head, catalog.stamp(), keep=policy.last(keep))
        would_retire += following.event.steps if isinstance(following, Head) else ()
    with render.progress() as display:
        bar = render.Bar(display, "deleting", None)
        done = collect(catalog, dry_run=flags["dry_run"], on_file=bar.file)
    if flags["json"]:
        render.give(
            {
                "dry_run": flags["dry_run"],
                "retired": list(would_retire) if flags["dry_run"] else [],
                "attempts": [builtins(gone) for gone in done.attempts],
                "files": done.files,
                "bytes": done.bytes,
                "failed": done.failed,
            }
        )
    else:
        verb = "would delete" if flags["dry_run"] else "deleted"
        for gone in done.attempts:
            render.say(f"{verb} {gone.id.label} ({gone.reason})")
        if would_retire and flags["dry_run"]:
            render.say(f"would retire steps {', '.join(map(str, would_retire))}")
        render.say(f"{verb} {done.files} files, {render.size(done.bytes)}, of {len(done.attempts)} attempts")
        for line in done.failed:
            render.say(f"not deleted: {line}")
    return EXIT_FAILED if done.failed else EXIT_OK


def _rehearse(catalog: Catalog, rule: journal.Rule) -> None:
    """Raises what the rule would reject with; writes nothing."""
    outcome = rule(catalog.require_head(), catalog.stamp())
    if isinstance(outcome, journal.Rejected):
        raise outcome.error


def pin(root: str, flags: Flags) -> int:
    return _change(root, flags, partial(journal.pin, step=_wanted(flags), name=_name(flags)))


def unpin(root: str, flags: Flags) -> int:
    return _change(root, flags, partial(journal.unpin, step=_wanted(flags), name=_name(flags)))


def quarantine(root: str, flags: Flags) -> int:
    catalog = open_catalog(root)
    live = journal.find(catalog.require_head(), _wanted(flags))
    if live is None:
        raise StepNotFound(f"{catalog.url}: step {flags['step']} is not in this run; see orchestrator ls")
    rule = partial(journal.quarantine, attempt=live.id, reason=flags["reason"], by_hand=True)
    return _change(root, flags, rule)


def release(root: str, flags: Flags) -> int:
    rule = partial(journal.release, step=_wanted(flags), attempt=flags["attempt"] or "", reason=flags["reason"])
    return _change(root, flags, rule)


def _change(root: str, flags: Flags, rule: journal.Rule) -> int:
    catalog = open_catalog(root)
    before = catalog.require_head()
    after = catalog.append(rule)
    assert after is not None  # there was a head to change
    live = journal.find(after, _wanted(flags))
    changed = after.version != before.version
    if flags["json"]:
        render.give({"changed": changed, "version": after.version, "step": builtins(live) if live else None})
    else:
        what = f"journal version {after.version}: {after.event.kind} step {flags['step']}"
        render.say(what if changed else f"step {flags['step']}: nothing to change")
    return EXIT_OK


def live_step(catalog: Catalog, step: int | None) -> LiveStep:
    """The given step, quarantined or not, or the newest. Raises StepNotFound."""
    head = catalog.require_head()
    live = journal.newest(head) if step is None else journal.find(head, step)
    if live is None:
        have = ", ".join(str(one.step) for one in head.live) or "no steps"
        raise StepNotFound(f"{catalog.url}: step {'(newest)' if step is None else step} is not there; it has: {have}")
    return live


def _wanted(flags: Flags) -> int:
    if flags["step"] is None:
        raise UsageError("--step is needed: which step")
    return int(flags["step"])


def _name(flags: Flags) -> str:
    if not flags["name"]:
        raise UsageError("--name=: expected the pin's name")
    return str(flags["name"])


def builtins(value: Any) -> Any:
    return msgspec.to_builtins(value)
