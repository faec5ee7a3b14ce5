"""What `orchestrator report` says, as data: its page is made of this, and `--json` prints it."""

from __future__ import annotations

import msgspec

from orchestrator.cli.command import Result
from orchestrator.rules.json_numbers import StoredNumber


class SavePart(Result, frozen=True, array_like=True, forbid_unknown_fields=False):
    """One process's part of a save. Each phase's beginning, and the end, in seconds after the save began; -1: not."""

    process: int
    began: float
    writing: float
    sealing: float
    waiting: float
    committing: float
    ended: float
    blocked: float
    bytes: int


class ReportedSave(Result, frozen=True):
    """`outcome`: committed, aborted, or unknown (the job died). `state`: live, retired or gone, of a committed one."""

    step: int
    attempt: str
    epoch: int
    began: float
    outcome: str
    decided: float | None
    bytes: int
    reason: str = ""
    state: str = ""
    trust: str = ""
    pins: tuple[str, ...] = ()
    metrics: dict[str, StoredNumber] = msgspec.field(default_factory=dict)
    parts: tuple[SavePart, ...] = ()


class ReportedEpoch(Result, frozen=True):
    """An incarnation. `lost_s`: what the restart to it cost: the time before it since the former one's end, unless that
    had closed in order, start-up and restore, and what was trained again. `closed`: it has ended in order."""

    epoch: int
    opened: float
    by: str
    processes: int | None
    from_step: int | None
    restore_s: float | None
    lost_s: float
    closed: bool = False


class Incident(Result, frozen=True):
    time: float
    kind: str
    step: int | None
    attempt: str | None
    text: str
    by: str


class Goodput(Result, frozen=True):
    """Where the run's `wall_s` went: `rules.goodput` says what the kinds are. `restarts_s`: what was down, done again,
    and starting after the first start. `share`: training's of all but `idle_s`; None where the run is empty."""

    wall_s: float
    blocked_s: float
    restarts_s: float
    share: float | None
    training_s: float = 0.0
    stalled_s: float = 0.0
    again_s: float = 0.0
    starting_s: float = 0.0
    down_s: float = 0.0
    idle_s: float = 0.0


class TimeSpan(Result, frozen=True, array_like=True, forbid_unknown_fields=False):
    """A stretch of time that was neither training nor blocked by a save. Seconds since 1970."""

    kind: str
    began: float
    ended: float
    epoch: int


class Finding(Result, frozen=True):
    """One sentence for who opens the page. tone: bad, warn, good or plain. place: the part of the page that shows it;
    `began` and `ended`: when."""

    tone: str
    text: str
    place: str
    began: float | None = None
    ended: float | None = None


class IntervalGoodput(Result, frozen=True):
    """What saving every `interval_s` would have as goodput, by Daly's model and what this run has measured. `mark`:
    `optimum`, or `this run` (the median between its saves)."""

    interval_s: float
    share: float
    mark: str


class LeafSharding(Result, frozen=True):
    """`split`: mesh axes that split each dimension; None if it is not a sharded array."""

    label: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    split: tuple[tuple[str, ...], ...] | None


class ReportedMesh(Result, frozen=True):
    step: int
    axes: dict[str, int]
    devices: int
    processes: int
    leaves: tuple[LeafSharding, ...]
    leaf_count: int


class RunReport(Result, frozen=True):
    """`report`: all that the page shows. Times are seconds since 1970; the page shows them at `utc_offset_s`."""

    root: str
    made: float
    epoch: int
    version: int
    newest: int | None
    newest_time: float | None
    hosts: dict[str, str]
    saves: tuple[ReportedSave, ...]
    epochs: tuple[ReportedEpoch, ...]
    incidents: tuple[Incident, ...]
    goodput: Goodput
    mesh: ReportedMesh | None
    intervals: tuple[IntervalGoodput, ...] = ()
    verdict: Finding | None = None
    findings: tuple[Finding, ...] = ()
    spans: tuple[TimeSpan, ...] = ()
    utc_offset_s: int = 0
    zone: str = "UTC"
