"""How an agent behaves. Pure values, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from orchestrator.rules import arguments


@dataclass(frozen=True)
class Options:
    """How an agent behaves. All hosts of a job must be given the same, or they are rejected, with UsageError, at the
    start. Only events_dir, the metrics, traces and progress are each host's own; both bounds of host memory may differ.

    async_save: False makes `save` return only when the step is committed (or has failed).
    on_save_failure: "warn" logs and counts a failed save; "raise" raises SaveFailed at the next call.
    save_timeout_s: how long a save may take from staging to decision before silent hosts are named and it is aborted.
    rendezvous_timeout_s: how long to wait for other processes at collective points (start, restore, leaving).
    preemption_grace_s: how long to wait for the commit once hosts are being preempted (SIGTERM).
    failure_grace_s: once a process of the job has failed (an exception that nothing caught, `sys.exit` with a code that
    is not 0), the others end within seconds, with its exit code: how long a save in flight may take until then. None:
    they stay.
    chunks: how arrays are cut. "rows": as they are in memory, which saves, and restores onto the same mesh, quickest.
    "tiles": large ones along their other dimensions, too: a restore onto a mesh that cuts other dimensions than the
    saving one did reads little more than it needs, and not everything on every host.
    compression: zstd for array chunks. other_tree: allow saving a state tree that differs from the run's.
    host_bytes_max: how much of a state one process may hold for a save and not have written yet; None: all of it, which
    blocks the least. A larger state makes `save` wait for the store ("wait"), or is not saved ("skip"): when_full.
    restore_bytes_max: how much of a state that goes to accelerators one process may hold on the host while it restores;
    None: 256 MiB, as fast as with more. What one leaf has on this process goes alone if it is more.
    stage: how a state on accelerators leaves them. "device": `save` copies it there, which training hardly notices, and
    it goes to the host afterwards; "host": straight to page-locked host memory, for which a step that donates the state
    waits; "auto": "device" where there is room for the copy. stage_margin: the share of a device's memory that must
    stay free of it and of the most that training has used.
    attest: "save" has the devices compute a fingerprint of every array, independent of the sharding, records it and
    aborts the save if replicas of a shard differ; "full" also compares it after a restore.
    host_local: what happens where a leaf that every host has its own of (numpy, Python values, arrays and keys on one
    host's devices) has not the same value on all; process 0's is stored. "warn": a warning names leaf and hosts, once;
    "error": the save is aborted with it; "ignore": nothing is compared.
    load_once: a restore reads each chunk that several hosts need on one of them, and the devices exchange the parts. It
    pays where a store gives several hosts the same bytes more slowly than the devices exchange them. Measure it first:
    between processes of one machine it is 4 to 10 times slower than reading.
    upload_bytes_per_s: with `tiers`: how fast one process may send the store what it holds in memory; None: as fast as
    it goes. Saves that do not come from there, and the last ones of a job that is being preempted, are not bounded.
    events_dir: where this process's events are written; None: `events/` below a root on a file system, nowhere for an
    object store; "": nowhere.
    metrics_port: answer Prometheus on this port of `metrics_address` (0: any free one, which is logged); None: do not.
    metrics_file: keep Prometheus' text format in this file, for node_exporter's textfile collector.
    quarantine_keep_s: how long the data of a quarantined attempt is kept; None: until somebody deletes it by name
    (`orchestrator gc --quarantined=STEP`) or releases it.
    traces: OpenTelemetry spans of saves and restores, to the program's own tracer provider.
    progress: process 0 says on standard error which step is restored, with a bar if that takes long, which steps are
    saved, and at the end which are not, unless absl's log shows it there; at most a line a second. None: on a terminal
    and in IPython.
    """

    async_save: bool = True
    on_save_failure: Literal["warn", "raise"] = "warn"
    save_timeout_s: float = 600.0
    rendezvous_timeout_s: float = 300.0
    preemption_grace_s: float = 120.0
    failure_grace_s: float | None = 30.0
    chunks: Literal["rows", "tiles"] = "rows"
    compression: bool = False
    other_tree: bool = False
    host_bytes_max: int | None = None
    when_full: Literal["wait", "skip"] = "wait"
    restore_bytes_max: int | None = None
    stage: Literal["auto", "device", "host"] = "auto"
    stage_margin: float = 0.1
    attest: Literal["off", "save", "full"] = "off"
    host_local: Literal["warn", "error", "ignore"] = "warn"
    load_once: bool = False
    upload_bytes_per_s: int | None = None
    quarantine_keep_s: float | None = None
    events_dir: str | None = None
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"
    metrics_file: str | None = None
    traces: bool = False
    progress: bool | None = None

    def __repr__(self) -> str:
        changed = (field for field in fields(self) if getattr(self, field.name) != field.default)
        return f"Options({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in changed)})"

    def __post_init__(self) -> None:
        for name in ("async_save", "compression", "other_tree", "load_once", "traces"):
            arguments.flag(name, getattr(self, name))
        if self.progress is not None:
            arguments.flag("progress", self.progress)
        arguments.choice("on_save_failure", self.on_save_failure, "warn", "raise")
        arguments.choice("chunks", self.chunks, "rows", "tiles")
        arguments.choice("when_full", self.when_full, "wait", "skip")
        arguments.choice("stage", self.stage, "auto", "device", "host")
        arguments.share("stage_margin", self.stage_margin)
        arguments.choice("attest", self.attest, "off", "save", "full")
        arguments.choice("host_local", self.host_local, "warn", "error", "ignore")
        for name in ("host_bytes_max", "restore_bytes_max", "upload_bytes_per_s"):
            if getattr(self, name) is not None:
                arguments.whole(name, getattr(self, name), least=1)
        if self.metrics_port is not None:
            arguments.whole("metrics_port", self.metrics_port, most=65535)
        if not isinstance(self.metrics_address, str):
            raise arguments.rejection("metrics_address", self.metrics_address, "the name or number of an address")
        for name in ("events_dir", "metrics_file"):
            if getattr(self, name) is not None:
                arguments.path(name, getattr(self, name))
        if self.failure_grace_s is not None:
            arguments.seconds("failure_grace_s", self.failure_grace_s)
        if self.quarantine_keep_s is not None:
            arguments.seconds("quarantine_keep_s", self.quarantine_keep_s, most=10**10)
        for name in ("save_timeout_s", "rendezvous_timeout_s", "preemption_grace_s"):
            arguments.seconds(name, getattr(self, name))
