"""How an attempt ended: what the coordinator decides and posts to the other processes, and what a save resolves to."""

from __future__ import annotations

import msgspec

from orchestrator.rules.records import Cause


class Committed(msgspec.Struct, frozen=True, tag="committed", tag_field="outcome"):
    """The step is in the journal. Known on process 0, 0 elsewhere: state_bytes, of all its files; stage_s, of the
    process that took longest to stage; quarantined, attempts of the run, whoever set them aside (-1 elsewhere)."""

    state_bytes: int = 0
    stage_s: float = 0.0
    quarantined: int = -1


class Aborted(msgspec.Struct, frozen=True, tag="aborted", tag_field="outcome"):
    """Nothing was saved. `reason` names the processes at fault and what they reported."""

    reason: str
    cause: Cause = Cause.FAILED


class Fenced(msgspec.Struct, frozen=True, tag="fenced", tag_field="outcome"):
    """A newer incarnation has opened its epoch, which `reason` names: this one can save nothing any more."""

    reason: str


Outcome = Committed | Aborted | Fenced
