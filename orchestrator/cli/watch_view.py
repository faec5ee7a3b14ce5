"""What `orchestrator watch` reports: a run at one moment."""

from __future__ import annotations

from orchestrator.cli.command import Result
from orchestrator.cli.held import HeldNow
from orchestrator.cli.watch_verdict import Verdict


class HostNow(Result, frozen=True):
    """`state`: a save's phase, training, restored, starting or left; `since_s`: for how long. `silent`: nothing was
    heard of its process for 15 s, which `heard_s` says. `condition`: moving, starting (the first step is not done),
    waiting (for `waits_for`, perhaps in `barrier`), stuck, frozen (or dead, where its machine cannot be asked), dead or
    left. `idle_s`: for how long its main
    thread has reported nothing. `late_s`: by how much its newest pulse was late."""

    process: int
    host: str
    state: str
    step: int | None
    since_s: float
    heard_s: float
    silent: bool
    written_bytes: int
    bytes_per_s: float | None
    condition: str
    waits_for: tuple[int, ...]
    idle_s: float
    barrier: str
    late_s: float


class CommitNow(Result, frozen=True):
    step: int
    attempt: str
    time: float
    bytes: int
    save_s: float | None


class Quarantined(Result, frozen=True):
    step: int
    attempt: str
    reason: str


class SlowestHost(Result, frozen=True):
    """Of the newest save in which hosts can be compared: `seconds` of this host, and the median of the
    others'."""

    process: int
    host: str
    step: int
    seconds: float
    median_s: float


class RunNow(Result, frozen=True):
    """`watch`: a run at one moment. `loss_s`: age of the newest restorable state: what is lost if the job dies now, and
    `loss_steps` of training; `restart_s`: how long the newest start took until training went on. `commits`: the newest
    restorable ones. `why`: of the verdict. `step`, `step_s`: training's own, and seconds for each. `next_save_step`,
    `next_save_s`: when one is due, by the distance of the last ones. `free_bytes`: where the run is, None in a bucket;
    `next_bytes`: what the next save needs, by the last ones. `held`: steps in memory, on this machine."""

    root: str
    time: float
    epoch: int
    version: int
    processes: int | None
    newest: int | None
    loss_s: float | None
    hosts: tuple[HostNow, ...]
    commits: tuple[CommitNow, ...]
    slowest: SlowestHost | None
    verdict: Verdict
    why: str
    step: int | None
    step_s: float | None
    next_save_step: int | None
    next_save_s: float | None
    loss_steps: int | None
    restart_s: float | None
    free_bytes: int | None
    next_bytes: int
    quarantined: tuple[Quarantined, ...]
    held: tuple[HeldNow, ...] = ()
