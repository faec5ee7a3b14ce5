"""Plays every way of not being able to read, and looks whether anything good was given up for it.

    python -m tests.proof.unreadable --report=unreadable.md [--only=REGEX] [--write=docs/integrity.md]

For each way: a run with two steps is put where nobody else is, the way is set, and a process that meets it diagnoses,
reads, verifies and restores. Then the cause is taken away and the run is restored plainly. `judge` is the contract:
what cannot be read raises, what is read is the newest step, and only what is really damaged is quarantined.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing as mp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from urllib.parse import quote

from absl import logging

import orchestrator as oc
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage
from tests.proof import unreadable_child as child
from tests.proof.unreadable_judge import LIMIT_S, ORDER, Outcome, judge, report, said, summary, verdict
from tests.proof.unreadable_ways import DAMAGED, GS, LOCAL, ODD, WAYS, Way
from tests.support.endpoints import Endpoints
from tests.support.environ import environ
from tests.support.gcs import BUCKET, REPO, emulator
from tests.support.reporting import put

STORE_DEADLINE_S = 1.5  # as ORCHESTRATOR_STORE_DEADLINE_S
_AT_ONCE = 8  # most of the time is waiting
_SHIM = "failing_files"


class LocalFiles:
    """A run on a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return str(self.root)

    def names(self, below: str = "") -> list[str]:
        found = (self.root / below).rglob("*")
        return sorted(str(path.relative_to(self.root)) for path in found if path.is_file())

    def digests(self) -> dict[str, str]:
        return {key: hashlib.sha256(self.get(key)).hexdigest() for key in self.names()}

    def get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def put(self, key: str, body: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(body)

    def remove(self, key: str) -> None:
        (self.root / key).unlink()


class BucketFiles:
    """A run in the emulator's bucket."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.url = f"gs://{BUCKET}/{prefix}"

    def _path(self, key: str) -> str:
        return f"/storage/v1/b/{BUCKET}/o/{quote(f'{self.prefix}/{key}', safe='')}"

    @property
    def group(self) -> str:
        """Of the emulator's rules."""
        return self.prefix.partition("/")[0]

    def names(self, below: str = "") -> list[str]:
        return list(self.digests(below))

    def digests(self, below: str = "") -> dict[str, str]:
        """By the store's own checksums."""
        listed = json.loads(emulator().ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={self.prefix}/{below}")[2])
        return {item["name"].removeprefix(f"{self.prefix}/"): item["crc32c"] for item in listed.get("items", ())}

    def get(self, key: str) -> bytes:
        status, _, body = emulator().ask("GET", self._path(key) + "?alt=media")
        assert status == 200, body
        return body

    def put(self, key: str, body: bytes) -> None:
        name = quote(f"{self.prefix}/{key}", safe="")
        status, _, told = emulator().ask("POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}", body)
        assert status == 200, told

    def remove(self, key: str) -> None:
        assert emulator().ask("DELETE", self._path(key))[0] == 204


class Bench:
    """Everything that the ways share: the emulator, the odd endpoints, a run to copy, and the server of children."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.chmod(0o755)
        self.shim = _shim(folder)
        emulator()
        self._endpoints = Endpoints(folder)
        template = LocalFiles(folder / "template")
        with oc.Agent(template.url, options=oc.Options(async_save=False, on_save_failure="raise")) as agent:
            for step in (1, 2):
                assert agent.save(step, child.saved_state(step), process_state=b"reader at %d" % step)
        self._template = {key: template.get(key) for key in template.names() if not key.startswith("events/")}
        self._processes = mp.get_context("forkserver")
        self._processes.set_forkserver_preload([child.CHILDREN])
        with environ({**({"LD_PRELOAD": self.shim} if self.shim else {}), "PYTHONPATH": _python_path()}):
            forkserver.ensure_running()

    def close(self) -> None:
        self._endpoints.close()

    def play(self, way: Way) -> Outcome:
        """Set the way, look what a process makes of it, take the way off, and restore."""
        run, outcome = self._run(way.place), Outcome(way)
        if way.prepare:
            way.prepare(run if way.expected == DAMAGED else run.root)
        before = {} if way.expected == ODD else run.digests()
        self._probe(way, run, outcome)
        if way.place == GS:
            outcome.met = outcome.met or emulator().hits(run.group)
            emulator().set_rules(run.group)
        after = run.digests() if before else {}
        outcome.lost = [key for key, digest in before.items() if after.get(key) != digest]
        if way.prepare:
            self._undo(run)
        self._look(run, outcome)
        told, _, _ = self._told(child.Job(run.url, ("restore", "verify", "again"), self._environ(Way(way.place, ""))))
        outcome.back, outcome.lifted = (said(told.get(name, ({}, 0.0))[0]) for name in ("restore", "again"))
        return outcome

    def _undo(self, run: Any) -> None:
        """Everything is as it was saved; what has been journalled since stays."""
        journal = {key: run.get(key) for key in run.names("journal/")}
        if isinstance(run, LocalFiles):
            shutil.rmtree(run.root)
        for key, body in {**self._template, **journal}.items():
            run.put(key, body)

    def empty(self, place: str) -> Any:
        """Where nobody else has a run."""
        name = uuid.uuid4().hex
        return BucketFiles(f"{name}/run") if place == GS else LocalFiles(self._folder / name / "run")

    def probe(self, way: Way, run: Any, probes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """What a process that meets the way makes of any run."""
        return {name: told for name, (told, _) in self._told(self._job(way, run, probes))[0].items()}

    def _run(self, place: str) -> Any:
        run = self.empty(place)
        for key, body in self._template.items():
            run.put(key, body)
        return run

    def _environ(self, way: Way) -> dict[str, str | None]:
        """What a process that is to meet the way has in its environment."""
        names = self._endpoints.names
        return {
            **emulator().environ,
            "ORCHESTRATOR_STORE_DEADLINE_S": str(STORE_DEADLINE_S),
            # Nothing may leave this machine, nor find its own credentials.
            **{"https_proxy": names["rejecting"], "no_proxy": "127.0.0.1", "GCE_METADATA_ROOT": "127.0.0.1:1"},
            **{"GCE_METADATA_HOST": "127.0.0.1:1", "GCE_METADATA_IP": "127.0.0.1:1"},
            **{"CLOUDSDK_CONFIG": str(self._folder), "HOME": str(self._folder)},
            **{name: value and value.format_map(names) for name, value in way.environ.items()},
        }

    def _job(self, way: Way, run: Any, probes: tuple[str, ...]) -> child.Job:
        return child.Job(
            run.url,
            probes,
            self._environ(way),
            rules="".join(f"{rule}\n" for rule in way.rules) if way.place == LOCAL else "",
            rearm=_rearm(run, way.rules) if way.place == GS and way.rules else None,
            store=emulator().url if way.real_credentials else "",
            descriptors=way.descriptors,
            memory_bytes=way.memory_bytes,
            user=child.NOBODY if way.unprivileged else None,
        )

    def _probe(self, way: Way, run: Any, outcome: Outcome) -> None:
        # Proven damage is left to `restore` to find, all else to `verify`.
        order = ("doctor", "reader", "restore", "verify") if way.expected == DAMAGED else ORDER
        told, outcome.exit, outcome.met = self._told(self._job(way, run, order))
        outcome.probes = {name: probe for name, (probe, _) in told.items()}
        outcome.seconds = {name: took for name, (_, took) in told.items()}

    def _told(self, job: child.Job) -> tuple[dict[str, tuple[dict[str, Any], float]], int | None, int]:
        """By probe: its outcome, and the seconds that it took; the child's exit code, None if it had to be killed; how
        often a rule of its was met."""
        receive, send = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=child.play, args=(job, send), daemon=True)
        process.start()
        send.close()
        end = time.monotonic() + LIMIT_S
        told = {}
        with contextlib.suppress(EOFError):
            while receive.poll(max(0.0, end - time.monotonic())):
                name, probe, took = receive.recv()
                told[name] = probe, took
        receive.close()
        process.join(max(0.1, end - time.monotonic()))
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        met = told.pop("met", ({"hits": 0}, 0.0))[0]["hits"]
        return told, code, met

    def _look(self, run: Any, outcome: Outcome) -> None:
        journal_store = JournalStore(open_storage(run.url), "unreadable")
        heads: list[Head] = list(journal_store.entries())
        new = [head.event for head in heads if f"journal/{head.version:020d}.json" not in self._template]
        outcome.events = [event.kind for event in new]
        outcome.reasons = [event.reason for event in new if event.kind == "quarantined"]
        outcome.quarantined = sorted(live.step for live in heads[-1].live if not live.restorable)


def _rearm(run: BucketFiles, rules: Sequence[dict[str, Any]]) -> tuple[str, bytes]:
    """The request that sets these rules, for this run's objects."""
    mine = [
        {**rule, "name": f"^{run.prefix}/.*{rule['name']}" if rule["name"] else f"^{run.prefix}/"} for rule in rules
    ]
    return f"{emulator().url}/_emulator/rules/{run.group}", json.dumps(mine).encode()


def _shim(folder: Path) -> str:
    """The library that makes files fail; '' where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return ""
    source, made = Path(__file__).with_name(f"{_SHIM}.c"), folder / f"{_SHIM}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(made), "-ldl"], check=True, timeout=60)
    return str(made)


def _python_path() -> str:
    return os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])


def play_all(bench: Bench, ways: Sequence[Way]) -> dict[str, Outcome]:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="way") as pool:
        return {outcome.way.label: outcome for outcome in pool.map(bench.play, ways)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression of labels")
    parser.add_argument("--report", type=Path, help="where all tables go")
    parser.add_argument("--write", type=Path, help="a page of the documentation that gets the short table")
    args = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    with tempfile.TemporaryDirectory(prefix="unreadable-") as folder:
        bench = Bench(Path(folder))
        ways = [way for way in WAYS if re.search(args.only, way.label) and (bench.shim or not way.needs_shim)]
        started = time.monotonic()
        outcomes = list(play_all(bench, ways).values())
        bench.close()
    table = report(outcomes)
    print(table, f"{time.monotonic() - started:.0f} s", sep="\n")
    if args.report:
        args.report.write_text(table)
    if args.write:
        put(args.write, "make unreadable", f"{summary(outcomes)}\n{verdict(outcomes)}")
    return 1 if any(map(judge, outcomes)) else 0


if __name__ == "__main__":
    sys.exit(main())
