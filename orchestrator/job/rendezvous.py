"""What a job's processes exchange: collectives on the main thread, quick signals from any. The only importer of
`multihost_utils` and of the coordination service's client.

Main thread only: `broadcast`, `gather`, `preempted`. Each is a collective: every process must call it, in the same
order. A bounded, named barrier of the coordination service always comes first, so that a dead host is named instead of
hanging the pod in a device collective. Any thread: `post` and `poll`, a small shared key-value store. The truth is
always in storage: a lost signal only makes things slower.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from orchestrator import environment
from orchestrator.arrays import jax_internals
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.errors import UsageError, WaitTimeout
from orchestrator.job import bounded_calls, peer_failure, sigterm
from orchestrator.job.collectives import Bytes, collectives
from orchestrator.observe import heartbeat
from orchestrator.rules import contract
from orchestrator.rules.records import Json

QUICK_S = 1.0  # for one signal; storage is polled as often
_FIRST_BYTES = 252  # of a message, of which there is one of each process; most are shorter
_FIRST_BYTES_OF_ONE = 4092  # of one for all
_LENGTH_BYTES = 4


class Rendezvous(Protocol):
    """`process`: this process's index of `count`; `hosts`: every process's host name, by index."""

    process: int
    count: int
    hosts: dict[int, str]

    def broadcast(self, name: str, value: Json, timeout_s: float) -> Json:
        """Process 0's `value`, on every process. Raises WaitTimeout naming the processes that did not arrive."""

    def gather(self, name: str, value: Json, timeout_s: float) -> list[Json]:
        """Every process's `value`, by index, on every process. Raises WaitTimeout."""

    def preempted(self, step: int) -> bool:
        """True on all processes at the same step once any of them has got SIGTERM."""

    def post(self, key: str, value: str) -> None:
        """Make `value` visible to other processes' `poll`. Best effort: never raises."""

    def forget(self, prefix: str) -> None:
        """Remove what was posted below `prefix`. Best effort."""

    def poll(self, prefix: str) -> dict[str, str]:
        """Keys posted below `prefix` (which ends in `/`), by their last part. Best effort: may miss."""


def connect(timeout_s: float) -> Rendezvous:
    """The rendezvous of this job: of all its processes if `jax.distributed` is initialized, else of this one alone.

    Raises UsageError where this process is one of several that have not joined: before anything is read or written.
    """
    if jax_internals.process_of_job() is None:
        _check_alone()
    if jax.process_count() == 1:
        return SingleProcess()
    join_failure_reports()
    return ManyProcesses(timeout_s)


def _check_alone() -> None:
    """One of several that takes itself for a job of one would fence the others, and be fenced by them."""
    evidence = contract.several(os.environ)
    if not evidence:
        if jax.process_count() == 1:  # on TPU hosts JAX may know more
            return
        evidence = f"jax.process_count() is {jax.process_count()}"
    raise UsageError(
        f"this process is one of several of a job ({evidence}), but has not joined them: jax.distributed is not "
        "initialized.\n  Put this before anything else of JAX:\n"
        "    import orchestrator as oc\n"
        "    oc.initialize()\n"
        "  If each of the processes is a job of its own, with a root of its own (a sweep), set "
        f"{contract.PROCESS_COUNT}=1 in its environment"
    )


def collectives_listen_on(address: str) -> None:
    """Have JAX's collectives between CPUs (Gloo) listen on `address`, instead of on whatever the machine's name stands
    for: in a job whose processes are all on this machine nobody else has business there. Before JAX has a backend."""
    jax_internals.collectives_listen_on(address)


def join_failure_reports() -> None:
    """If `jax.distributed` is initialized for several processes, have them learn of each other's failures. Idempotent.
    Not where the job is to outlive a lost process (`jax_enable_recoverability`)."""
    me = jax_internals.process_of_job()
    recoverable = getattr(jax.config, "jax_enable_recoverability", False)
    if me is not None and me[1] > 1 and not recoverable:
        peer_failure.join(ServiceBoard(*me), host_name())


def host_name() -> str:
    """The name that messages use for this host: ORCHESTRATOR_HOST_NAME, or the machine's."""
    return os.environ.get(environment.HOST_NAME) or socket.gethostname()


def slices(count: int) -> tuple[int, ...]:
    """The slice that each of `count` processes is in, as its devices have it; () where they have none."""
    found = {device.process_index: getattr(device, "slice_index", None) for device in jax.devices()}
    known = [found.get(process) for process in range(count)]
    return tuple(index for index in known if index is not None) if None not in known else ()


def listen(me: Rendezvous) -> sigterm.Listening:
    """Handle SIGTERM so that `me.preempted` reports it, from now until `stop`. For whoever can save."""
    several = isinstance(me, ManyProcesses)
    if several and not jax_internals.has_preemption_service():
        return sigterm.Listening()  # nobody could have the others agree; `preempted` says so
    return sigterm.listen(jax_agrees=several)


class SingleProcess:
    """A job of one process: nothing is exchanged. Whether SIGTERM has come is `sigterm`'s to know."""

    def __init__(self) -> None:
        self.process, self.count, self.hosts = 0, 1, {0: host_name()}
        self._posted: dict[str, str] = {}

    def broadcast(self, name: str, value: Json, timeout_s: float) -> Json:
        return value

    def gather(self, name: str, value: Json, timeout_s: float) -> list[Json]:
        return [value]

    def preempted(self, step: int) -> bool:
        return sigterm.asked()

    def post(self, key: str, value: str) -> None:
        self._posted[key] = value

    def forget(self, prefix: str) -> None:
        self._posted = {key: value for key, value in self._posted.items() if not key.startswith(prefix)}

    def poll(self, prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): value for key, value in list(self._posted.items()) if key.startswith(prefix)}


class ManyProcesses:
    """All processes of an initialized `jax.distributed` job."""

    _leaving = False  # all have agreed to, at one step; of the process, for all rendezvous in it

    def __init__(self, timeout_s: float) -> None:
        self.process, self.count = jax.process_index(), jax.process_count()
        self.hosts: dict[int, str] = {}
        self._client: Any = jax_internals.coordination_client()
        self._board = ServiceBoard(self.process, self.count)
        self._barriers = 0
        self._collectives = collectives()
        self.hosts = dict(enumerate(self.gather("hosts", host_name(), timeout_s)))

    def _barrier(self, name: str, timeout_s: float) -> None:
        # The number keeps ids unique; it agrees because collectives come in the same order everywhere.
        self._barriers += 1
        barrier = f"orchestrator/{self._barriers}/{name}"
        try:
            with heartbeat.waiting(name):
                self._client.wait_at_barrier(barrier, timeout_in_ms=max(1, int(timeout_s * 1000)))
        except Exception as error:  # jaxlib raises JaxRuntimeError for every status; the text tells them apart
            raise WaitTimeout(f"{name}: {self._who(str(error))} did not arrive within {timeout_s:g} s") from error
        peer_failure.passed_barrier()

    def _who(self, text: str) -> str:
        # jaxlib 0.10.2 gives each late task a line of its own, as `2` or as `/job:jax_worker/replica:0/task:2`.
        tasks = sorted({int(index) for index in re.findall(r"^(?:\S*/task:)?(\d+)$", text, re.MULTILINE)})
        if not tasks:
            return f"other processes (the coordination service says: {text.splitlines()[0][:200]})"
        named = ", ".join(f"{index} ({self.hosts[index]})" if index in self.hosts else str(index) for index in tasks)
        return f"processes [{named}]"

    @in_own_context
    def broadcast(self, name: str, value: Json, timeout_s: float) -> Json:
        self._barrier(name, timeout_s)
        body = json.dumps(value).encode() if self.process == 0 else b""
        (received,) = _exchanged(body, lambda row: self._collectives.broadcast(row)[None], _FIRST_BYTES_OF_ONE)
        return json.loads(received)

    @in_own_context
    def gather(self, name: str, value: Json, timeout_s: float) -> list[Json]:
        self._barrier(name, timeout_s)
        received = _exchanged(json.dumps(value).encode(), self._collectives.gathered, _FIRST_BYTES)
        return [json.loads(body) for body in received]

    @in_own_context
    def preempted(self, step: int) -> bool:
        # The step that all agree on is one of the agent that is open now; one that is opened afterwards counts its own.
        if not ManyProcesses._leaving and not jax_internals.has_preemption_service():
            logging.log_first_n(
                logging.WARNING,
                "JAX's preemption service is off (jax_enable_preemption_service): nobody listens for SIGTERM, and "
                "reached_preemption stays False",
                1,
            )
        elif not ManyProcesses._leaving:
            ManyProcesses._leaving = bool(multihost_utils.reached_preemption_sync_point(step))
        return ManyProcesses._leaving

    def post(self, key: str, value: str) -> None:
        self._board.post(key, value)

    def forget(self, prefix: str) -> None:
        self._board.forget(prefix)

    def poll(self, prefix: str) -> dict[str, str]:
        return self._board.poll(prefix)


class ServiceBoard:
    """The key-value store of JAX's coordination service. It needs no barrier, and does not know the others' hosts."""

    def __init__(self, process: int, count: int) -> None:
        self.process, self.count = process, count
        self._client: Any = jax_internals.coordination_client()
        self._one_call = threading.Lock()
        bounded_calls.prepare()

    @property
    def connected(self) -> bool:
        return jax_internals.coordination_client() is self._client

    def skip_exit_barrier(self) -> None:
        """Let this process end without waiting for the others."""
        jax_internals.skip_exit_barrier()

    def post(self, key: str, value: str) -> None:
        self._quickly(lambda: self._client.key_value_set(key, value, allow_overwrite=True))

    def forget(self, prefix: str) -> None:
        self._quickly(lambda: self._client.key_value_delete(prefix))

    def poll(self, prefix: str) -> dict[str, str]:
        pairs = self._quickly(lambda: self._client.key_value_dir_get(prefix)) or []
        return {key.removeprefix(prefix): value for key, value in pairs}

    def _quickly(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, None if it fails or takes longer than QUICK_S. These calls have no timeout of their own,
        and the service lives in process 0: when that one is stopped they hang, and the caller has a deadline to keep.
        At most one is under way."""

        def alone() -> Any:
            # Taken where it is released: a call that finds no thread to run on must not keep it.
            if not self._one_call.acquire(timeout=QUICK_S):
                return None
            try:
                return call()  # best effort by contract; no such directory is an error too
            finally:
                self._one_call.release()

        return bounded_calls.within(QUICK_S, alone)


def _exchanged(body: bytes, collective: Callable[[Bytes], Bytes], first_bytes: int) -> list[bytes]:
    """All processes' bodies, of any lengths, by a collective that takes arrays of one length and gives rows of them.
    One call, which takes milliseconds, does for short ones: each goes behind its length; a second brings the rest."""
    head = len(body).to_bytes(_LENGTH_BYTES, "little") + body[:first_bytes]
    rows = collective(_padded(head, _LENGTH_BYTES + first_bytes))
    sizes = [int.from_bytes(row[:_LENGTH_BYTES].tobytes(), "little") for row in rows]
    bodies = [row[_LENGTH_BYTES:].tobytes() for row in rows]
    left = max(sizes) - first_bytes
    if left > 0:
        rest = collective(_padded(body[first_bytes:], left))
        bodies = [first + row.tobytes() for first, row in zip(bodies, rest, strict=True)]
    return [whole[:size] for whole, size in zip(bodies, sizes, strict=True)]


def _padded(body: bytes, size: int) -> Bytes:
    return np.frombuffer(body.ljust(size, b"\0"), np.uint8)
