"""What may be lost together with a host: its node, its rack, its slice. Pure.

Who says so, the first that knows a level counts:

| what it finds                                          | node            | rack                   | slice          |
|--------------------------------------------------------|-----------------|------------------------|----------------|
| `ORCHESTRATOR_DOMAIN=slice=s0,rack=r3,node=n17`        | what it says    | what it says           | what it says   |
| `ORCHESTRATOR_DOMAIN=r3`                               | the one level that the job asks for is `r3`               |
| `MEGASCALE_SLICE_ID` (TPUs on several slices)          |                 |                        | its value      |
| Slurm's `SLURM_TOPOLOGY_ADDR`, pattern `switch...node` |                 | the leaf switch        |                |
| the same, pattern `block.node`                         |                 | the block              | the block      |
| otherwise                                              | the machine     |                        |                |

Slurm sets `SLURM_TOPOLOGY_ADDR=core.leaf3.node17` with `SLURM_TOPOLOGY_ADDR_PATTERN=switch.switch.node`. The last part
is the node's name, which may have dots itself; a cluster without a topology has `node17` and `node`. Only what the
orchestrator's own variable says is checked: what others have set, and cannot be read, is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.environment import DOMAIN
from orchestrator.errors import UsageError

LEVELS = ("node", "rack", "slice")  # from the smallest on
HOST = "host"  # below all of them: several hosts may share a node
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


@dataclass(frozen=True)
class Domains:
    """What one host is in; '' where nobody knows."""

    node: str = ""
    rack: str = ""
    slice: str = ""

    def of(self, level: str) -> str:
        return {"node": self.node, "rack": self.rack, "slice": self.slice}.get(level, "")

    def __str__(self) -> str:
        return ",".join(f"{level}={self.of(level)}" for level in reversed(LEVELS) if self.of(level))


@dataclass(frozen=True)
class Site:
    """A host, as copies are placed: its name, which no other one has, and what may be lost with it."""

    name: str
    domains: Domains = Domains()

    def at(self, level: str) -> str:
        """Its domain at a level, '' if that is not known; a host is its own at the level `host`."""
        return self.name if level == HOST else self.domains.of(level)


def of_environment(environ: Mapping[str, str], machine: str, asked: str) -> Domains:
    """The domains of the host that has these variables. machine: what its node is called if nobody says. asked: the
    level that a bare word stands for. Raises UsageError for what the orchestrator's own variable cannot mean."""
    found = {"node": machine, "rack": "", "slice": environ.get("MEGASCALE_SLICE_ID", "")}
    found |= _of_slurm(environ.get("SLURM_TOPOLOGY_ADDR", ""), environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", ""))
    return Domains(**(found | _given(environ.get(DOMAIN, ""), asked)))


def _of_slurm(address: str, pattern: str) -> dict[str, str]:
    kinds = pattern.split(".")
    parts = address.split(".", len(kinds) - 1)
    if len(kinds) < 2 or len(parts) != len(kinds) or kinds[-1] != "node":
        return {}
    above = ".".join(part for part in parts[:-1] if part)  # the top of a tree may have no name
    if not above or set(kinds[:-1]) not in ({"switch"}, {"block"}):
        return {}
    return {"rack": above, "slice": above} if kinds[0] == "block" else {"rack": above}


def _given(text: str, asked: str) -> dict[str, str]:
    if not text:
        return {}
    if _NAME.fullmatch(text):
        return {asked: text}
    found: dict[str, str] = {}
    for part in text.split(","):
        level, _, name = part.strip().partition("=")
        if level not in LEVELS or level in found or not _NAME.fullmatch(name):
            raise UsageError(
                f"{DOMAIN}={text[:200]!r}: expected slice=NAME,rack=NAME,node=NAME, any of them once, or one NAME: "
                "letters, digits and . _ : / @ -"
            )
        found[level] = name
    return found


def told_apart(sites: Sequence[Site], level: str) -> str:
    """Why these hosts cannot be told apart at a level; '' if they can."""
    unknown = [site.name for site in sites if not site.at(level)]
    if unknown:
        more = f" and {len(unknown) - 3} others" if len(unknown) > 3 else ""
        return f"the {level} of {', '.join(unknown[:3])}{more} is not known"
    names = {site.at(level) for site in sites}
    return f"all hosts are in one {level}, {names.pop()}" if len(names) == 1 else ""


def level_used(sites: Sequence[Site], asked: str) -> tuple[str, str]:
    """The largest level, up to the one asked for, at which hosts can be told apart; and why not at the one that was
    asked for, '' if at that."""
    problem = ""
    for level in reversed(LEVELS[: LEVELS.index(asked) + 1]):
        why = told_apart(sites, level)
        if not why:
            return level, problem
        problem = problem or why
    return HOST, problem
