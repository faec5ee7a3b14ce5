"""`orchestrator plan`: what restoring a step on a mesh would read, hold and take. Needs no devices; writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import EVENTS, STEP, Command, Flag, Flags, Result, live_step, open_store
from orchestrator.cli.held import Chosen, HeldHere
from orchestrator.errors import EXIT_FAILED, EXIT_OK
from orchestrator.observe.event_log import directory_of, read
from orchestrator.observe.timeline import Timeline
from orchestrator.rules import arguments
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import TreeSpec
from orchestrator.rules.restore_cost import Measured, Speed, Target, forecast, parse_bytes, parse_mesh, speed
from orchestrator.rules.restore_sources import MEMORY, PEERS, STORE, forecast_sources, holders, hosts_of
from orchestrator.storage import local_path

_ROWS = 32


class HostPlan(Result, frozen=True):
    """One process. `reads`: chunks asked for. `peak_bytes`: of host memory, beside what the program uses. `sources`:
    how many bytes come from this host's "memory", from "peers" and from the "store"."""

    process: int
    read_bytes: int
    reads: int
    array_bytes: int
    device_bytes: int
    peak_bytes: int
    sources: dict[str, int]


class RestorePlan(Result, frozen=True):
    """`plan`. `seconds`: None where this run has no measured restore. `fits`: None where there was nothing given to fit
    into. `sources`: of all hosts, as in each."""

    root: str
    step: int
    attempt: str
    mesh: dict[str, int]
    devices: int
    state_bytes: int
    read_bytes: int
    amplification: float
    seconds: float | None
    basis: str
    fits: bool | None
    problems: tuple[str, ...]
    hosts: tuple[HostPlan, ...]
    sources: dict[str, int]


def run(root: str, flags: Flags) -> RestorePlan:
    store = open_store(root)
    step = HeldHere(store).choose(flags["step"]) or Chosen(store.step(live_step(store, flags["step"])))
    live, intent = step.stored.live, step.stored.intent
    axes = parse_mesh(flags["mesh"]) if flags["mesh"] else intent.mesh
    if flags["processes"] is not None:
        arguments.whole("--processes", flags["processes"], least=1)
    target = Target(axes, flags["processes"] or intent.process_count)
    memory, reserve = _memory(flags)
    restores = Timeline().add(read(directory_of(store.url, flags["events_dir"]))).restores
    measured = [
        Measured((each.epoch, each.step), each.machine, each.seconds, each.array_s, each.read_bytes)
        for each in restores
    ]
    pace = speed(measured, target.processes)
    costs = forecast(intent.tree, target)
    peaks = [cost.peak_bytes(files=local_path(store.url) is not None) for cost in costs.costs]
    problems = (*costs.problems, *_too_big(peaks, memory, reserve))
    sources = _sources(step, intent.tree, target)
    hosts = [
        HostPlan(process, cost.read_bytes, cost.reads, cost.array_bytes, cost.device_bytes, peak, dict(found))
        for process, (cost, peak, found) in enumerate(zip(costs.costs, peaks, sources, strict=True))
    ]
    return RestorePlan(
        root=store.url,
        step=live.step,
        attempt=live.attempt,
        mesh=dict(axes),
        devices=target.devices,
        state_bytes=costs.state_bytes,
        read_bytes=costs.read_bytes,
        amplification=costs.amplification,
        seconds=pace.seconds(costs.costs) if pace else None,
        basis=_basis(pace),
        fits=False if problems else None if memory is None else True,
        problems=problems,
        hosts=tuple(hosts),
        sources=dict(sum(sources, Counter())),
    )


def _memory(flags: Flags) -> tuple[int | None, int]:
    """(memory of a host if it was given, what of it the program uses), in bytes. Raises UsageError."""
    memory = parse_bytes("host_memory", flags["host_memory"]) if flags["host_memory"] else None
    return memory, parse_bytes("program_memory", flags["program_memory"])


def _sources(step: Chosen, tree: TreeSpec, target: Target) -> list[Counter[str]]:
    if not step.in_memory:
        return forecast_sources(tree, target, {}, [], hosts_of(None, target.processes))
    writers = {key: receipt.process for receipt in step.stored.receipts() for key in receipt.places}
    held_by = holders(step.placed, step.stored.manifest.process_count)
    return forecast_sources(tree, target, writers, held_by, hosts_of(step.placed, target.processes))


def _too_big(peaks: list[int], memory: int | None, reserve: int) -> list[str]:
    required = max(peaks) + reserve
    if memory is None or required <= memory:
        return []
    who, program = peaks.index(max(peaks)), render.size(reserve)
    return [
        f"process {who} needs {render.size(required)} of host memory ({program} of it for the program), a host has "
        f"{render.size(memory)}; use more processes, or split more axes"
    ]


def _basis(pace: Speed | None) -> str:
    if pace is None:
        return "no restore of this run has been measured"
    rate = f"{render.size(pace.machine_bytes_per_s)}/s on each machine"
    return f"from {render.counted(pace.restores, 'restore')} of this run: {render.duration(pace.fixed_s)}, then {rate}"


def show(made: RestorePlan, flags: Flags) -> Iterator[render.Shown]:
    mesh = Target(made.mesh, len(made.hosts)).label
    where = AttemptId(made.step, made.attempt).label
    processes = render.counted(len(made.hosts), "process", "processes")
    yield f"{made.root} {where} on {mesh}: {render.counted(made.devices, 'device')}, {processes}"
    rows = [
        [
            str(host.process),
            render.size(host.read_bytes),
            str(host.reads),
            render.size(host.array_bytes),
            render.size(host.peak_bytes),
            render.size(host.device_bytes),
        ]
        for host in made.hosts[:_ROWS]
    ]
    columns = ["process", "reads", "requests", "arrays", "peak memory", "on each device"]
    yield render.table(columns, rows, right=columns)
    if len(made.hosts) > _ROWS:
        yield f"... and {len(made.hosts) - _ROWS} more"
    read = f"{render.size(made.read_bytes)} read for {render.size(made.state_bytes)} of state"
    yield f"{read}: amplification {made.amplification:.2f}"
    if set(made.sources) - {STORE}:
        came = [
            f"{render.size(made.sources[kind])} from {kind}" for kind in (MEMORY, PEERS, STORE) if kind in made.sources
        ]
        yield f"if the hosts stay: {', '.join(came)}"
    took = "unknown" if made.seconds is None else render.duration(made.seconds)
    yield f"expected time: {took} ({made.basis})"
    for problem in made.problems:
        yield f"does not fit: {problem}"
    if made.fits:
        memory, reserve = _memory(flags)
        yield f"fits: {render.size(memory or 0)} on each host, {render.size(reserve)} of it for the program"


def exit_code(made: RestorePlan) -> int:
    """1 if the state does not fit the mesh or the memory."""
    return EXIT_FAILED if made.problems else EXIT_OK


COMMAND = Command(
    run,
    show,
    "what a restore on another mesh would read, hold and take",
    flags=(
        STEP,
        Flag("mesh", str, None, "axes of the new mesh, as data=4,model=2; as saved without it"),
        Flag("processes", int, None, "processes of the new job; as saved without it"),
        Flag("host_memory", str, None, "memory of each host, as 64GiB: say whether it fits"),
        Flag("program_memory", str, "1GiB", "what of that the program uses beside the restore"),
        EVENTS,
    ),
    examples=(
        "orchestrator plan /data/run --mesh=data=4,model=2 --processes=4",
        "orchestrator plan /data/run --mesh=data=8 --processes=2 --host_memory=64GiB",
    ),
    exit_code=exit_code,
)
