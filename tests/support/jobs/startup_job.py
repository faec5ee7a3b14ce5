"""Three processes that start in many rows, one after the other: at roots that are one place and at roots that are not,
configured alike and not.

python startup_job.py INDEX COUNT PORT FOLDER OWN BUCKET
    FOLDER    the same directory for all; FOLDER/seed is a run, FOLDER/cwd-0 to -2 are there
    OWN       a directory that is another one for each process, whatever it is called
    BUCKET    gs:// prefix that all reach
Prints one JSON object a row: what was raised or saved, what was said, and after how long.
"""

# ruff: noqa: E402  (JAX is configured from the arguments, so it is imported after them)
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

index, count, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
folder, own, bucket = Path(sys.argv[4]), Path(sys.argv[5]), sys.argv[6]
os.environ["ORCHESTRATOR_HOST_NAME"] = f"host-{index}"

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_platforms", "cpu")
where = f"127.0.0.1:{port}"
jax.distributed.initialize(where, count, index, coordinator_bind_address=where)

import orbax.checkpoint as ocp
from absl import logging as absl_logging

import orchestrator as oc
from orchestrator import compat
from orchestrator.job import one_root
from orchestrator.storage import PosixStorage
from tests.support.fakes import HookedStorage

one_root.SEEN_WITHIN_S = 0.3
STATE = {"w": jnp.zeros(512), "count": 0}  # as in FOLDER/seed
said: list[str] = []


class Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if "differ" in record.getMessage():
            said.append(record.getMessage())


absl_logging.get_absl_logger().addHandler(Said())


def mine(*values: Any) -> Any:
    """This process's one of values that are given for processes 0, 1 and so on; the last one's for all further."""
    return values[min(index, len(values) - 1)]


def agent(root: str | Path, act: Callable[[oc.Agent], Any], options: Any = None, **given: Any) -> dict[str, Any]:
    together = {"async_save": False, "on_save_failure": "raise", "events_dir": "", "rendezvous_timeout_s": 60}
    made: oc.Agent | None = None
    try:
        with oc.Agent(root, options=oc.Options(**{**together, **(options or {})}), **given) as made:
            return {"value": act(made), "steps": made.all_steps(), "epoch": made.epoch}
    except oc.OrchestratorError as error:
        return {"kind": type(error).__name__, "text": str(error), "epoch": made.epoch if made else None}


def save(made: oc.Agent) -> bool:
    return made.save(1, STATE)


def restore(made: oc.Agent) -> int | None:
    found = made.restore(STATE)
    return found.step if found else None


def from_relative(directory: str) -> dict[str, Any]:
    before = os.getcwd()
    os.chdir(folder / directory)
    try:
        return agent("run", save)
    finally:
        os.chdir(before)


def copied(name: str, *processes: int) -> Path:
    if index in processes:
        shutil.copytree(folder / "seed", own / name)
    return own / name


def with_environ(name: str, value: str | None) -> dict[str, Any]:
    if value:
        os.environ[name] = value
    try:
        return agent(folder / "alike", restore)
    finally:
        os.environ.pop(name, None)


def with_x64(on: bool) -> dict[str, Any]:
    jax.config.update("jax_enable_x64", on)
    try:
        return agent(folder / "x64", save)
    finally:
        jax.config.update("jax_enable_x64", False)


def manager(root: Path, **options: Any) -> dict[str, Any]:
    try:
        with compat.CheckpointManager(root, options=ocp.CheckpointManagerOptions(**options)) as made:
            return {"steps": made.all_steps()}
    except oc.OrchestratorError as error:
        return {"kind": type(error).__name__, "text": str(error), "epoch": None}


def without_a_right(name: str, *operations: str) -> dict[str, Any]:
    """At a root where process 2 has no right to these."""

    def hook(operation: str, key: str) -> None:
        if operation in operations and index == 2:
            raise oc.StorageError(f"{operation} {key}: EACCES (Permission denied)")

    return agent(folder / name, save, storage=HookedStorage(PosixStorage(str(folder / name)), before=hook))


latest = oc.Agent.latest_step
ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "alike": lambda: agent(
        folder / "alike",
        save,
        options={"events_dir": str(own / "events"), "metrics_file": mine(None, str(own / "metrics")), "traces": False},
        keep=oc.best("loss", 2) | oc.last(1),
        save=oc.at({3, 1, 1000 + 7}) | oc.every_seconds(9),
    ),
    "not shared: save": lambda: agent(own / "save", save),
    "not shared: restore": lambda: agent(own / "restore", restore),
    "one is elsewhere": lambda: agent(mine(folder / "one", folder / "one", own / "one"), save),
    "relative": lambda: from_relative(f"cwd-{index}"),
    "relative, in one directory": lambda: from_relative("cwd-0"),
    "copies of a run: restore": lambda: agent(copied("copy", 0, 1, 2), restore),
    "copies of a run: save": lambda: agent(copied("copy again", 0, 1, 2), lambda made: made.save(9, STATE)),
    "a run for process 0 only": lambda: agent(copied("zero", 0), latest),
    "a run for process 2 only": lambda: agent(copied("two", 2), latest),
    "a bucket": lambda: agent(f"{bucket}/{mine('a', 'a', 'b')}", save),
    "no right to write": lambda: without_a_right("rights", "create"),
    "no right to read": lambda: without_a_right("rights", "list", "get"),
    "no right to read a run": lambda: without_a_right("seed", "list", "get"),
    "save": lambda: agent(folder / "no", save, save=mine(oc.every(1), oc.every(5), oc.every(1))),
    "keep": lambda: agent(folder / "no", save, keep=mine(None, oc.last(2))),
    "options": lambda: agent(
        folder / "no", save, options={"attest": mine("off", "off", "full"), "save_timeout_s": mine(60.0, 61.0, 60.0)}
    ),
    "tiers": lambda: agent(
        folder / "tiers",
        save,
        tiers=mine([oc.memory(directory=own)], [oc.memory(directory=own, copies=2, domain="rack")], []),
    ),
    "x64": lambda: with_x64(index == 1),
    "environment": lambda: with_environ("ORCHESTRATOR_STORE_DEADLINE_S", mine(None, "33", None)),
    "compat: options": lambda: manager(folder / "no", max_to_keep=mine(3, 4)),
    "compat: a reader": lambda: manager(copied("reader", 0), read_only=True),
    "in the end": lambda: agent(folder / "alike", restore),
}
for name, row in ROWS.items():
    said.clear()
    started = time.monotonic()
    told = row()
    told |= {"event": name, "process": index, "s": round(time.monotonic() - started, 2), "said": list(said)}
    told["own"] = sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file())
    told["roots"] = sorted(path.name for path in own.iterdir())
    print(json.dumps(told), flush=True)
