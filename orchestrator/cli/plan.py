"""`orchestrator plan`: what restoring a step on a mesh would read, hold and take. Needs no devices; writes nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.cli import render
from orchestrator.cli.commands import live_step, open_catalog
from orchestrator.errors import EXIT_FAILED, EXIT_OK
from orchestrator.observe.event_log import directory_of, read
from orchestrator.observe.timeline import Story
from orchestrator.rules import arguments
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.restore_cost import Cost, Measured, Speed, Target, forecast, parse_bytes, parse_mesh, speed

_ROWS = 32


class HostPlan(msgspec.Struct, forbid_unknown_fields=True):
    """One process. `reads`: chunks asked of the store. `peak_bytes`: of host memory, beside what the program uses."""

    process: int
    read_bytes: int
    reads: int
    array_bytes: int
    device_bytes: int
    peak_bytes: int


class Plan(msgspec.Struct, forbid_unknown_fields=True):
    """`seconds`: None where this run has no measured restore. `fits`: None where nothing was given to fit into."""

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
    problems: list[str]
    hosts: list[HostPlan]


def plan(root: str, flags: dict[str, Any]) -> int:
    """Exit code 1 if the state does not fit the mesh or the memory."""
    catalog = open_catalog(root)
    live = live_step(catalog, flags["step"])
    intent = catalog.intent(live, catalog.manifest(live))
    axes = parse_mesh(flags["mesh"]) if flags["mesh"] else intent.mesh
    if flags["processes"] is not None:
        arguments.whole("--processes", flags["processes"], least=1)
    target = Target(axes, flags["processes"] or intent.process_count)
    memory = parse_bytes("host_memory", flags["host_memory"]) if flags["host_memory"] else None
    reserve = parse_bytes("program_memory", flags["program_memory"])
    told = Story().tell(read(directory_of(catalog.url, flags["events_dir"])))
    measured = [
        Measured((each.epoch, each.step), each.machine, each.seconds, each.array_s, each.read_bytes)
        for each in told.restores
    ]
    pace = speed(measured, target.processes)
    costs = forecast(intent.tree, target)
    peaks = [cost.peak_bytes(files=catalog.url.startswith("file://")) for cost in costs.costs]
    problems = [*costs.problems, *_too_big(peaks, memory, reserve)]
    made = Plan(
        root=catalog.url,
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
        hosts=[_host(process, cost, peak) for process, (cost, peak) in enumerate(zip(costs.costs, peaks, strict=True))],
    )
    if flags["json"]:
        render.give(msgspec.to_builtins(made))
    else:
        _show(made, target, memory, reserve)
    return EXIT_FAILED if problems else EXIT_OK


def _host(process: int, cost: Cost, peak: int) -> HostPlan:
    return HostPlan(process, cost.read_bytes, cost.reads, cost.array_bytes, cost.device_bytes, peak)


def _too_big(peaks: list[int], memory: int | None, reserve: int) -> list[str]:
    needed = max(peaks) + reserve
    if memory is None or needed <= memory:
        return []
    who, program = peaks.index(max(peaks)), render.size(reserve)
    return [
        f"process {who} needs {render.size(needed)} of host memory ({program} of it for the program), a host has "
        f"{render.size(memory)}; use more processes, or split more axes"
    ]


def _basis(pace: Speed | None) -> str:
    if pace is None:
        return "no restore of this run has been measured"
    rate = f"{render.size(pace.machine_bytes_per_s)}/s on each machine"
    return f"from {pace.restores} restores of this run: {render.duration(pace.fixed_s)}, then {rate}"


def _show(made: Plan, target: Target, memory: int | None, reserve: int) -> None:
    where = AttemptId(made.step, made.attempt).label
    render.say(f"{made.root} {where} on {target.shown}: {made.devices} devices, {target.processes} processes")
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
    render.table(columns, rows, right=columns)
    if len(made.hosts) > _ROWS:
        render.say(f"... and {len(made.hosts) - _ROWS} more")
    read = f"{render.size(made.read_bytes)} read for {render.size(made.state_bytes)} of state"
    render.say(f"{read}: amplification {made.amplification:.2f}")
    took = "unknown" if made.seconds is None else render.duration(made.seconds)
    render.say(f"expected time: {took} ({made.basis})")
    for problem in made.problems:
        render.say(f"does not fit: {problem}")
    if made.fits:
        render.say(f"fits: {render.size(memory or 0)} on each host, {render.size(reserve)} of it for the program")
