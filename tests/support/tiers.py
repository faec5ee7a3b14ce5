"""Small runs in one process that hold steps in memory, in `tier` beside the run's root."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import orchestrator as oc
from orchestrator.job import tier_hosts
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.run import tier_directory
from tests.support.runs import LIKE, state, store_of

Value = TypeVar("Value")


def agent(root: Path, every: int = 2, save: int = 10, **tier: Any) -> oc.Agent:
    place = root.parent / "tier"
    place.mkdir(exist_ok=True)
    return oc.Agent(root, save=oc.every(save), tiers=[oc.memory(every=every, directory=place, **tier)])


def train(running: oc.Agent, *steps: int) -> None:
    for step in steps:
        running.save(step, state(step), process_state=f"at {step}".encode(), extra={"at": step})
        running._saves.settle()
        running._holding.settle()


def crash(running: oc.Agent) -> None:
    """As far as what is stored goes: a program that dies releases nothing."""
    running.finish()


def held_dir(root: Path) -> Path:
    run = tier_directory.identity(store_of(root))
    assert run
    return Path(tier_directory.of_process(str(root.parent / "tier"), run, 0))


def crashed_at_14(root: Path) -> Path:
    """A run that saved steps 0 and 10 and holds 12 and 14."""
    running = agent(root)
    assert running.restore(LIKE) is None
    train(running, *range(15))
    crash(running)
    return root


class Together:
    """Processes of one job in this one: each on a thread, with a rendezvous that gathers by a barrier. before: called
    by each process before it meets the others in a round, with its name."""

    def __init__(self, count: int, before: Callable[[str, int], None] = lambda name, process: None) -> None:
        self.count, self.messages, self.before = count, [None] * count, before
        self.barrier = threading.Barrier(count, timeout=60)
        self.members = [Member(self, process) for process in range(count)]

    def each(self, call: Callable[[Any], Value]) -> list[Value]:
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(call, self.members))


class Member(SingleProcess):
    def __init__(self, job: Together, process: int) -> None:
        super().__init__()
        self.job, self.process, self.count = job, process, job.count
        self.hosts = {index: f"host-{index}" for index in range(job.count)}

    def gather(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        self.job.before(name, self.process)
        self.job.messages[self.process] = value
        self.job.barrier.wait()
        found = json.loads(json.dumps(self.job.messages))
        self.job.barrier.wait()
        return list(found)

    def broadcast(self, name: str, value: Any, timeout_s: float) -> Any:
        return self.gather(name, value, timeout_s)[0]


class SomeHosts:
    """A crashed run whose held steps' files are spread over the tiers of several hosts, below `folder`, one process on
    each. Where a file is, each test says: any file may be in any part."""

    def __init__(self, root: Path, folder: Path, count: int) -> None:
        self.root, self.folder, self.count = root, folder, count
        held = held_dir(root)
        self.run, self.base = held.parent.name, held.parent.parent.name
        self.files = {
            str(path.relative_to(held)): path.read_bytes() for path in sorted(held.rglob("*")) if path.is_file()
        }
        shutil.rmtree(held.parent)
        for host in range(count):
            self.tier(host).mkdir(parents=True)

    def tier(self, host: int) -> Path:
        return self.folder / f"host-{host}"

    def place(self, host: int, process: int, chosen: Callable[[str], bool], body: bytes | None = None) -> list[Path]:
        """Put files into the directory of a process on a host; `body`: with these bytes."""
        part = self.tier(host) / self.base / self.run / f"process-{process:05d}"
        part.mkdir(parents=True, exist_ok=True)
        for each in (part, part.parent, part.parent.parent):
            each.chmod(0o700)
        placed = []
        for name in filter(chosen, self.files):
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name] if body is None else body)
            placed.append(path)
        return placed

    def restore(self, count: int = 0, **options: Any) -> list[Any]:
        """On `count` processes, one on each host, with servers of their own."""
        with self.servers(Together(count or self.count)) as job:
            return self.restore_with(job, **options)

    def restore_with(self, job: Together, **options: Any) -> list[Any]:
        def restore(me: Member) -> Any:
            asked = RestoreOptions(60.0, record=False, **options)
            memory = oc.memory(directory=self.tier(me.process))
            return restore_together(store_of(self.root), me, None, asked, None, memory)

        return job.each(restore)

    @contextmanager
    def servers(self, job: Together) -> Iterator[Together]:
        """The servers that the first restore of this job starts are ended with the context."""
        try:
            yield job
        finally:
            for me in job.members:
                tier_hosts.left(me)
