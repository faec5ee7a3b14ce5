"""`orchestrator prefetch`: bring what a restore will need into this host's memory tier while JAX starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from orchestrator import environment
from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.errors import EXIT_FAILED, EXIT_OK, UsageError
from orchestrator.rules import contract
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.contract import JobContract
from orchestrator.rules.tier_environment import TierEnvironment, tier_environment
from orchestrator.storage.peer import Peer

_PEER_S = 10.0


class Prefetched(Result, frozen=True):
    """`prefetch`. kind: `held` (in memory of hosts), `committed` (in the store), '' where there is nothing to fetch.
    here_bytes: was here before. others_bytes: other hosts have it, or fetch it. problems: what could not be had, which
    is left to the restore."""

    root: str
    host: int
    hosts: int
    step: int | None
    attempt: str
    kind: str
    peers_bytes: int
    store_bytes: int
    here_bytes: int
    others_bytes: int
    seconds: float
    problems: tuple[str, ...]


def run(root: str, flags: Flags) -> Prefetched:
    from orchestrator.run.prefetch import Here, Prefetch

    began = time.monotonic()
    if flags["timeout_s"] <= 0:
        raise UsageError(f"--timeout_s={flags['timeout_s']:g}: expected a positive number of seconds")
    if flags["bytes_max"] is not None and flags["bytes_max"] < 1:
        raise UsageError(f"--bytes_max={flags['bytes_max']}: expected a positive number of bytes")
    host, hosts = _place(flags, os.environ)
    said = tier_environment(os.environ)
    store = open_store(root)
    with render.bar("prefetch", None, "bytes") as bar:
        fetching = Prefetch(
            store,
            lambda run: Here(flags["directory"], host, hosts, _peers(said, run), flags["bytes_max"]),
            back=environment.step_back(),
            timeout_s=flags["timeout_s"],
            on_total=lambda total: bar.reach(0, total),
            on_bytes=bar.add,
        )
        found = fetching.run()
    return Prefetched(
        root=store.url,
        host=host,
        hosts=hosts,
        step=found.step,
        attempt=found.attempt,
        kind=found.kind,
        peers_bytes=found.peers_bytes,
        store_bytes=found.store_bytes,
        here_bytes=found.here_bytes,
        others_bytes=found.others_bytes,
        seconds=round(time.monotonic() - began, 3),
        problems=tuple(found.problems),
    )


def _peers(said: TierEnvironment, run: str) -> list[Peer]:
    """The tier servers of other hosts, where a launcher has told of them."""
    if said.secret is None:
        return []
    return [Peer(address, said.secret, run, _PEER_S) for address in said.peers if address not in ("", said.server)]


def _place(flags: Flags, environ: Mapping[str, str]) -> tuple[int, int]:
    """Which host this is, and of how many. Raises UsageError."""
    host, hosts = flags["host"], flags["hosts"]
    if host is None and hosts is None:
        host, hosts = _found(environ)
    if host is None or hosts is None:
        raise UsageError("--host and --hosts: both are needed, or neither where a launcher tells")
    if not 0 <= host < hosts:
        raise UsageError(f"--host={host}: expected 0 to {hosts - 1}, as --hosts={hosts}")
    return host, hosts


def _found(environ: Mapping[str, str]) -> tuple[int, int]:
    """As the process of the job that runs beside it, which is the only one of this host."""
    place = contract.from_environment(environ)
    if isinstance(place, JobContract):
        return place.process_index, place.process_count
    for index, count in (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        if environ.get(index, "").isdecimal() and environ.get(count, "").isdecimal():
            return int(environ[index]), int(environ[count])
    if environ.get("TPU_WORKER_HOSTNAMES") and environ.get("TPU_WORKER_ID", "").isdecimal():  # of one slice
        hosts = len(environ["TPU_WORKER_HOSTNAMES"].split(","))
        slices, own = environ.get("MEGASCALE_NUM_SLICES", "1"), environ.get("MEGASCALE_SLICE_ID", "0")
        if slices.isdecimal() and own.isdecimal():
            return int(own) * hosts + int(environ["TPU_WORKER_ID"]), int(slices) * hosts
    if place is not None:
        raise UsageError("which host this is cannot be told; say --host and --hosts")
    return 0, 1


def show(made: Prefetched, flags: Flags) -> Iterator[render.Shown]:
    if made.step is None:
        yield f"{made.root}: nothing to fetch"
        return
    where = AttemptId(made.step, made.attempt).label
    kind = "held in memory" if made.kind == "held" else "committed"
    got = made.peers_bytes + made.store_bytes
    yield f"{where}, {kind}: host {made.host} of {made.hosts}"
    if got:
        rate = f"{render.size(int(got / max(made.seconds, 0.001)))}/s"
        yield (
            f"  fetched {render.size(got)} in {render.duration(made.seconds)}, {rate}: "
            f"{render.size(made.peers_bytes)} from peers, {render.size(made.store_bytes)} from the store"
        )
    here, others = render.size(made.here_bytes), render.size(made.others_bytes)
    yield f"  here before {here}; with other hosts, or left to them {others}"
    for problem in made.problems:
        yield render.toned(f"  left to the restore: {problem}", "warn")


def exit_code(made: Prefetched) -> int:
    """1 if something could not be had; a job starts whatever it is."""
    return EXIT_FAILED if made.problems else EXIT_OK


COMMAND = Command(
    run,
    show,
    "bring what a restore will need into this host's memory",
    flags=(
        Flag("directory", str, None, "the tier's directory; ORCHESTRATOR_TIER_DIR or /dev/shm without it", path=True),
        Flag("host", int, None, "which host this is, from 0; as the launcher tells without it"),
        Flag("hosts", int, None, "how many fetch; as the launcher tells without it"),
        Flag("bytes_max", int, None, "what this run's tiers may take here; as a job here was told without it"),
        Flag("timeout_s", float, 600.0, "what is not there by then is left to the restore"),
    ),
    examples=(
        "orchestrator prefetch /data/run",
        "orchestrator prefetch gs://bucket/run --host=3 --hosts=16 --json",
    ),
    exit_code=exit_code,
    detail="Run it on each host once, beside the start of the job's processes: the newest step that is whole in memory "
    "of the hosts, else the newest committed one, of which each host fetches a share. It writes to the tier alone; "
    "a restore takes what is there, and the rest from peers and the store.",
)
