"""A process that cannot read a run, and what it makes of it: each probe's outcome, sent to whoever started it.

It is forked from a server that has imported everything and started nothing, so that credentials and environment are
read by each child for itself, quickly. Nothing here may start JAX, a thread or a client while it is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import pkgutil
import resource
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import gcsfs  # noqa: F401  # so that no child has to
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401
from absl import logging
from fsspec import config

import orchestrator as oc
from orchestrator.cli.main import main as cli

for _found in pkgutil.walk_packages(oc.__path__, "orchestrator."):  # what is imported when it is needed, too
    if not _found.name.endswith("__main__"):
        importlib.import_module(_found.name)

CHILDREN = "tests.proof.unreadable_child"  # this module, as the server is to import it
_IMPORTED_BY = os.getpid()
NOBODY = 65534


@dataclass(frozen=True)
class Job:
    """What to do, and what is wrong meanwhile. `environ`: None unsets. `rules`: of the shim, armed before each probe.
    `rearm`: (URL, body) to PUT to the emulator before each. `store`: our own client uses its real credentials, with the
    store at this URL. `descriptors`, `memory_bytes`: so many are left. `user`: whom to be."""

    root: str
    probes: tuple[str, ...]
    environ: Mapping[str, str | None] = field(default_factory=dict)
    rules: str = ""
    rearm: tuple[str, bytes] | None = None
    store: str = ""
    descriptors: int | None = None
    memory_bytes: int | None = None
    user: int | None = None


def state(step: int) -> dict[str, Any]:
    """Large enough for a data file of its own, and a value that the store's tree holds."""
    return {"w": np.full(512, step, np.float32), "b": np.full(7, step, jnp.bfloat16), "count": step}


def saved_state(step: int) -> dict[str, Any]:
    return {name: value if name == "count" else jnp.asarray(value) for name, value in state(step).items()}


# No arrays: nothing shall be compiled for them.
LIKE = {"w": jax.ShapeDtypeStruct((512,), np.float32), "b": jax.ShapeDtypeStruct((7,), jnp.bfloat16), "count": 0}


def is_state(found: Any, step: int) -> bool:
    return found["count"] == step and all(np.array_equal(found[name], state(step)[name]) for name in ("w", "b"))


def _told(restored: oc.Restored | None) -> dict[str, Any]:
    if restored is None:
        return {"step": None}
    return {"step": restored.step, "right": is_state(restored.state, restored.step)}


def _restore(root: str) -> dict[str, Any]:
    with oc.Agent(root) as agent:
        return _told(agent.restore(LIKE))


def _read(root: str) -> dict[str, Any]:
    return _told(oc.open_run(root).restore())


def _command(*words: str) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli(["orchestrator", *words])
    told = {"code": code, "text": (out.getvalue() + err.getvalue())[:4000]}
    with contextlib.suppress(ValueError):
        told["json"] = json.loads(out.getvalue())
    return told


PROBES: dict[str, Callable[[str], dict[str, Any]]] = {
    "doctor": lambda root: _command("doctor", root, "--read_only", "--json"),
    "reader": _read,
    "verify": lambda root: _command("verify", root, "--all", "--json"),
    "restore": _restore,
    "again": _restore,
}


def play(job: Job, told: Connection) -> None:
    """Send (probe, outcome, seconds) of each probe, and how often the shim has met its rules as `met`."""
    if os.getpid() == _IMPORTED_BY:  # the server passes over what it cannot import, and all would take seconds
        raise RuntimeError(f"the server of children has not imported {CHILDREN}")
    for name, value in job.environ.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if job.store:
        os.environ.pop("STORAGE_EMULATOR_HOST", None)
        config.conf["gcs"] = config.conf["gs"] = {"endpoint_url": job.store}
    logging.set_verbosity(logging.FATAL)
    jax.devices()  # before anything is limited: this is about reading
    _limit(job)
    hits = 0
    for name in job.probes:
        _arm(job)
        started = time.monotonic()
        try:
            outcome = PROBES[name](job.root)
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            outcome = {"kinds": kinds, "text": str(error)[:2000]}
        told.send((name, outcome, time.monotonic() - started))
        hits += ctypes.CDLL(None).failing_files_hits() if job.rules else 0
    told.send(("met", {"hits": hits}, 0.0))
    told.close()
    os._exit(0)  # what was limited is needed for an orderly end


def _limit(job: Job) -> None:
    if job.user is not None:
        os.setgroups([])
        os.setgid(job.user)
        os.setuid(job.user)
    if job.descriptors is not None:
        most = max(map(int, os.listdir("/proc/self/fd"))) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for descriptor in taken[: job.descriptors]:
            os.close(descriptor)
    if job.memory_bytes is not None:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + job.memory_bytes, used + job.memory_bytes))


def _arm(job: Job) -> None:
    if job.rules:
        assert ctypes.CDLL(None).failing_files_arm(job.rules.encode()) == job.rules.count("\n")
    if job.rearm:
        url, body = job.rearm
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(urllib.request.Request(url, body, method="PUT"), timeout=30).read()
