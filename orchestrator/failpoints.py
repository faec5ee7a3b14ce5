"""Named places where a test can make this process die, stop, wait or fail. Off, and one dict look-up, when unset.

    ORCHESTRATOR_FAILPOINTS="commit.before=kill;receipt.write=enospc@process=2@step=4;storage.write=delay:0.5@nth=3"

Each rule is `place=action`, then conditions: `@process=I`, `@step=N`, `@epoch=E`, `@restart=R` (the launcher's count),
`@nth=K` (only the K-th time the others hold). Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `delay:S`, `error`
(a StorageError), `enospc` and `eio` (OSErrors), `memory` (MemoryError), `short` (half of the bytes are written, then
ENOSPC). Any thread.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.environment import FAILPOINTS, RESTART_COUNT
from orchestrator.errors import StorageError, UsageError

PLACES = frozenset(
    {
        "epoch.before",
        "epoch.after",
        "save.stage",
        "save.write",
        "save.seal",
        "intent.before",
        "intent.after",
        "receipt.write",
        "receipt.after",
        "receipt.handed",
        "group.sign",
        "group.signed",
        "finalize.before",
        "finalize.merged",
        "manifest.before",
        "manifest.after",
        "commit.before",
        "commit.after",
        "abort.before",
        "abort.after",
        "upload.record",
        "upload.file",
        "upload.seal",
        "upload.tree",
        "upload.finalized",
        "collect.before",
        "collect.file",
        "collect.deleted",
        "collect.after",
        "restore.chosen",
        "restore.read",
        "restore.after",
        "storage.write",
        "storage.sync",
        "storage.link",
        "storage.linked",
    }
)
ACTIONS = frozenset({"kill", "stop", "delay", "error", "enospc", "eio", "memory", "short"})
CONDITIONS = frozenset({"process", "step", "epoch", "restart", "nth"})


@dataclass
class _Rule:
    place: str
    action: str
    seconds: float
    conditions: dict[str, int]
    hits: int = 0


_rules: dict[str, list[_Rule]] = {}
_here: dict[str, int] = {}  # process, step and epoch, as far as they are known
_lock = threading.Lock()


def parse(text: str) -> dict[str, list[_Rule]]:
    """The rules in `text`, by place. Raises UsageError naming what is wrong."""
    rules: dict[str, list[_Rule]] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        place, _, rest = item.partition("=")
        action, *raw = rest.split("@")
        verb, _, argument = action.partition(":")
        if place not in PLACES:
            raise UsageError(f"{FAILPOINTS}: no place {place!r}; choose from {', '.join(sorted(PLACES))}")
        if verb not in ACTIONS:
            raise UsageError(f"{FAILPOINTS}: {place}: no action {verb!r}; choose from {', '.join(sorted(ACTIONS))}")
        try:
            conditions = {name: int(value) for name, _, value in (part.partition("=") for part in raw)}
            seconds = float(argument) if argument else 0.0
        except ValueError as error:
            raise UsageError(f"{FAILPOINTS}: {item!r}: {error}") from error
        if unknown := conditions.keys() - CONDITIONS:
            raise UsageError(f"{FAILPOINTS}: {item!r}: no condition {min(unknown)!r}")
        rules.setdefault(place, []).append(_Rule(place, verb, seconds, conditions))
    return rules


def configure(environ: Mapping[str, str], process: int) -> None:
    """Take the rules from the environment, for this process index."""
    with _lock:
        _rules.clear()
        _rules.update(parse(environ.get(FAILPOINTS, "")))
        _here.clear()
        _here.update(process=process, restart=int(environ.get(RESTART_COUNT, "0")))


def note(**here: int) -> None:
    """Tell where this process is (`step`, `epoch`), for the conditions."""
    if _rules:
        _here.update(here)


def hit(place: str, half: Callable[[], object] | None = None) -> None:
    """Do what a rule for `place` says. `half` writes the first half of what is about to be written, for `short`.

    Raises what the rule asks for: OSError, StorageError or MemoryError.
    """
    for rule in _rules.get(place, ()):
        with _lock:
            others = {name: value for name, value in rule.conditions.items() if name != "nth"}
            if any(_here.get(name) != value for name, value in others.items()):
                continue
            rule.hits += 1
            if rule.conditions.get("nth", rule.hits) != rule.hits:
                continue
        _act(rule, half)


def _act(rule: _Rule, half: Callable[[], object] | None) -> None:
    text = f"failpoint {rule.place}={rule.action}"
    match rule.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            time.sleep(rule.seconds)
        case "error":
            raise StorageError(text)
        case "memory":
            raise MemoryError(text)
        case "eio":
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {text}")
        case _:
            if half and rule.action == "short":
                half()
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {text}")
