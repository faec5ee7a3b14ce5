"""What is compared: each saves a state, waits until it is durable, and restores it.

A peer is opened outside the timing; `save` returns when training could go on, `wait` when it is durable on all
processes, `restore` when the arrays are on the devices of `target`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from benchmarks.shapes import is_replicated, own_arrays
from orchestrator.observe.events import Event, StepRestored, subscribe


class Peer(Protocol):
    def save(self, state: dict[str, Any]) -> None: ...
    def wait(self) -> None: ...
    def restore(self, target: dict[str, Any]) -> Any: ...
    def close(self) -> None: ...


class Ours:
    """`reported_bytes`: what its events say that the last restore read."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        import orchestrator as oc

        options = oc.Options(on_save_failure="raise", **self.options)
        self._agent = oc.Agent(directory, save=oc.every(1), options=options)
        self.reported_bytes = self._step = 0
        self._unsubscribe = subscribe(self._hear)

    def _hear(self, event: Event) -> None:
        if isinstance(event, StepRestored):
            self.reported_bytes = event.read_bytes

    def save(self, state: dict[str, Any]) -> None:
        self._agent.save(1, state)

    def wait(self) -> None:
        self._agent.wait_until_finished()

    def restore(self, target: dict[str, Any]) -> Any:
        restored = self._agent.restore(like=target)
        assert restored is not None
        return restored.state

    def close(self) -> None:
        self._unsubscribe()
        self._agent.close()


class OursOnce(Ours):
    """What several processes need is read by one of them. Saves, and restores as they were saved, are as ever."""

    options: ClassVar[dict[str, Any]] = {"load_once": True}
    only: ClassVar[tuple[str, ...]] = ("other mesh",)


class OursLater(Ours):
    """The second save of a job: the first one opens the run, for which the processes meet a few times."""

    only: ClassVar[tuple[str, ...]] = ("blocked", "durable")

    def prepare(self, state: dict[str, Any]) -> None:
        self.save(state)
        self.wait()

    def save(self, state: dict[str, Any]) -> None:
        self._step += 1
        self._agent.save(self._step, state)


class OursTiled(Ours):
    """With chunks that have little of each dimension."""

    options: ClassVar[dict[str, Any]] = {"chunks": "tiles"}


class OrbaxDefault:
    """CheckpointManager as it comes: OCDBT, zarr2, zstd."""

    handler: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        handler = ocp.PyTreeCheckpointHandler(**self.handler)
        self._manager = ocp.CheckpointManager(directory, item_handlers=handler)

    def save(self, state: dict[str, Any]) -> None:
        self._manager.save(1, args=self._ocp.args.PyTreeSave(state))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, target: dict[str, Any]) -> Any:
        restore_args = self._ocp.checkpoint_utils.construct_restore_args(target)
        return self._manager.restore(1, args=self._ocp.args.PyTreeRestore(item=target, restore_args=restore_args))

    def close(self) -> None:
        self._manager.close()


class OrbaxFiles(OrbaxDefault):
    """Tuned for large arrays: a file for each chunk, no compression."""

    handler: ClassVar[dict[str, Any]] = {"use_ocdbt": False, "use_compression": False}


class OrbaxRaw(OrbaxDefault):
    """Tuned for small leaves: OCDBT without compression."""

    handler: ClassVar[dict[str, Any]] = {"use_compression": False}


class TorchDcp:
    """PyTorch's distributed checkpoint over gloo: the same bytes as DTensors, each process its own rows."""

    package: ClassVar[str] = "torch"
    asynchronous: ClassVar[bool] = False

    def __init__(self, directory: Path) -> None:
        self._directory, self._future = str(directory), None

    def prepare(self, state: dict[str, Any]) -> None:
        """Outside the timing: torch's own copy of the state, and empty tensors to read into."""
        import torch

        local = {name: _local_tensor(leaf) for name, leaf in state.items()}
        self._replicated = is_replicated(state)
        self._state = self._placed(local)
        self._target = self._placed({name: torch.empty_like(tensor) for name, tensor in local.items()})

    def _placed(self, local: dict[str, Any]) -> dict[str, Any]:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        placement = [Replicate() if self._replicated else Shard(0)]
        return {name: DTensor.from_local(tensor, mesh, placement, run_check=False) for name, tensor in local.items()}

    def save(self, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        if self.asynchronous:
            self._future = dcp.async_save(self._state, checkpoint_id=self._directory)
        else:
            dcp.save(self._state, checkpoint_id=self._directory)

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()
            self._future = None  # it holds the copy that was written

    def restore(self, target: dict[str, Any]) -> Any:
        import torch.distributed.checkpoint as dcp

        dcp.load(self._target, checkpoint_id=self._directory)
        return None

    def close(self) -> None:
        self._state = self._target = {}


class TorchDcpAsync(TorchDcp):
    asynchronous = True


class TorchSnapshot(TorchDcp):
    """torchsnapshot over gloo: plain tensors, each process its own rows; replicated ones are said to be so."""

    package = "torchsnapshot"

    def _placed(self, local: dict[str, Any]) -> dict[str, Any]:
        from torchsnapshot import StateDict

        return {"state": StateDict(**local)}

    def save(self, state: dict[str, Any]) -> None:
        from torchsnapshot import Snapshot

        take = Snapshot.async_take if self.asynchronous else Snapshot.take
        self._pending = take(self._directory, self._state, replicated=["**"] if self._replicated else [])

    def wait(self) -> None:
        """torchsnapshot syncs nothing. `durable` means the same for all, so what it wrote is synced here."""
        import torch.distributed as dist

        if self.asynchronous:
            self._pending.wait()
        self._pending = None  # it holds the copy that was written
        files = sorted(file for file in Path(self._directory).rglob("*") if file.is_file())
        for file in files[dist.get_rank() :: dist.get_world_size()]:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def restore(self, target: dict[str, Any]) -> Any:
        from torchsnapshot import Snapshot

        Snapshot(self._directory).restore(self._target)
        return None


class TorchSnapshotAsync(TorchSnapshot):
    asynchronous = True


def _local_tensor(leaf: Any) -> Any:
    """This process's rows of an array as a torch tensor with memory of its own, as training there would have it."""
    import torch

    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    parts = [np.asarray(shard.data) for shard in (shards[:1] if leaf.sharding.is_fully_replicated else shards)]
    # torch has no view of ml_dtypes; what is saved are bytes.
    bits = np.int16 if leaf.dtype.itemsize == 2 else leaf.dtype
    return torch.cat([torch.from_numpy(part.view(bits)) for part in parts])


class Raw:
    """The machine's own limit: each process's share of the bytes to one file, fsync; what it needs read back, still
    cached, into fresh memory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._parts: list[Any] = []

    def prepare(self, state: dict[str, Any]) -> None:
        import jax

        self._parts = [part.reshape(-1).view(np.uint8) for part in own_arrays(state)]
        self._written = self._directory / str(jax.process_index())
        # Of replicated arrays each process writes its share and needs all.
        needed = range(jax.process_count()) if is_replicated(state) else [jax.process_index()]
        self._needed = [self._directory / str(index) for index in needed]

    def memcpy(self) -> Any:
        """A copy of what this process writes, in fresh memory: the least that taking it from the devices can cost."""
        return [part.copy() for part in self._parts]

    def save(self, state: dict[str, Any]) -> None:
        with self._written.open("wb", buffering=1 << 20) as file:
            for part in self._parts:
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())

    def wait(self) -> None:
        return

    def restore(self, target: dict[str, Any]) -> Any:
        return [np.fromfile(path, np.uint8) for path in self._needed]

    def close(self) -> None:
        self._parts = []


PEERS: dict[str, type[Any]] = {
    "ours": Ours,
    "ours, later save": OursLater,
    "ours, load_once": OursOnce,
    "ours, tiles": OursTiled,
    "Orbax default": OrbaxDefault,
    "Orbax tuned": OrbaxFiles,
    "torch DCP": TorchDcp,
    "torch DCP async": TorchDcpAsync,
    "torchsnapshot": TorchSnapshot,
    "torchsnapshot async": TorchSnapshotAsync,
    "raw limit": Raw,
}
TUNED_FOR_LEAVES = {"Orbax tuned": OrbaxRaw}


def peers_for(shape: str) -> dict[str, type[Any]]:
    """Those that are installed. Small leaves are cut and read in one way, whatever the options."""
    chosen = PEERS | (TUNED_FOR_LEAVES if shape == "leaves" else {})
    left_out = ("ours, load_once", "ours, tiles") if shape == "leaves" else ()
    return {name: peer for name, peer in chosen.items() if name not in left_out and installed(peer)}


def only(peer: Any) -> tuple[str, ...]:
    """The columns that a peer is measured for; (): all of them."""
    columns: tuple[str, ...] = getattr(peer, "only", ())
    return columns


def missing() -> dict[str, list[str]]:
    """Packages that are not installed, and the peers that are left out for it."""
    absent: dict[str, list[str]] = {}
    for name, peer in PEERS.items():
        if not installed(peer):
            absent.setdefault(peer.package, []).append(name)
    return absent


def installed(peer: type[Any]) -> bool:
    return importlib.util.find_spec(getattr(peer, "package", "numpy")) is not None
