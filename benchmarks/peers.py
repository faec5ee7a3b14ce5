"""What is compared: each saves a state, waits until it is durable, and restores it.

A peer is opened outside the timing; `save` returns when training could go on, `wait` when it is durable on all
processes, `restore` when the arrays are on the devices of `target`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from benchmarks.shapes import own_arrays


class Peer(Protocol):
    def save(self, state: dict[str, Any]) -> None: ...
    def wait(self) -> None: ...
    def restore(self, target: dict[str, Any]) -> Any: ...
    def close(self) -> None: ...


class Ours:
    def __init__(self, directory: Path) -> None:
        import orchestrator as oc

        self._agent = oc.Agent(directory, save=oc.every(1), options=oc.Options(on_save_failure="raise"))

    def save(self, state: dict[str, Any]) -> None:
        self._agent.save(1, state)

    def wait(self) -> None:
        self._agent.wait_until_finished()

    def restore(self, target: dict[str, Any]) -> Any:
        restored = self._agent.restore(like=target)
        assert restored is not None
        return restored.state

    def close(self) -> None:
        self._agent.close()


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

    asynchronous = False

    def __init__(self, directory: Path) -> None:
        import torch.distributed.checkpoint as dcp

        self._dcp, self._directory, self._future = dcp, str(directory), None

    def _tensors(self, state: dict[str, Any], empty: bool = False) -> dict[str, Any]:
        import torch
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = _torch_mesh()
        tensors = {}
        for name, leaf in state.items():
            shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            replicated = leaf.sharding.is_fully_replicated
            parts = [np.asarray(shard.data) for shard in (shards[:1] if replicated else shards)]
            raw = [torch.from_numpy(part.view(np.int16 if part.dtype.itemsize == 2 else part.dtype)) for part in parts]
            local = torch.cat(raw) if len(raw) > 1 else raw[0]
            placement = [Replicate() if replicated else Shard(0)]
            whole = torch.empty_like(local) if empty else local
            tensors[name] = DTensor.from_local(whole, mesh, placement, run_check=False)
        return tensors

    def prepare(self, state: dict[str, Any]) -> None:
        """Outside the timing: torch's own copy of the state, and empty tensors to read into."""
        self._state, self._target = self._tensors(state), self._tensors(state, empty=True)

    def save(self, state: dict[str, Any]) -> None:
        if self.asynchronous:
            self._future = self._dcp.async_save(self._state, checkpoint_id=self._directory)
        else:
            self._dcp.save(self._state, checkpoint_id=self._directory)

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()

    def restore(self, target: dict[str, Any]) -> Any:
        self._dcp.load(self._target, checkpoint_id=self._directory)
        return None

    def close(self) -> None:
        self._state = self._target = {}


class TorchDcpAsync(TorchDcp):
    asynchronous = True


def _torch_mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


class Raw:
    """The machine's own limit: the bytes to one file, fsync; read back into fresh memory while they are cached."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / str(os.getpid())
        self._parts: list[Any] = []

    def prepare(self, state: dict[str, Any]) -> None:
        self._parts = [part.reshape(-1).view(np.uint8) for part in own_arrays(state)]

    def save(self, state: dict[str, Any]) -> None:
        with self._path.open("wb", buffering=1 << 20) as file:
            for part in self._parts:
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())

    def wait(self) -> None:
        return

    def restore(self, target: dict[str, Any]) -> Any:
        read = []
        with self._path.open("rb", buffering=1 << 20) as file:
            for part in self._parts:
                buffer = np.empty(len(part), np.uint8)
                file.readinto(buffer.data)
                read.append(buffer)
        return None

    def close(self) -> None:
        self._parts = []


PEERS: dict[str, type[Any]] = {
    "ours": Ours,
    "Orbax default": OrbaxDefault,
    "Orbax tuned": OrbaxFiles,
    "torch DCP": TorchDcp,
    "torch DCP async": TorchDcpAsync,
    "raw limit": Raw,
}
TUNED_FOR_LEAVES = {"Orbax tuned": OrbaxRaw}


def peers_for(shape: str) -> dict[str, type[Any]]:
    chosen = PEERS | (TUNED_FOR_LEAVES if shape == "leaves" else {})
    try:
        import torch.distributed.checkpoint  # noqa: F401
    except ImportError:
        return {name: peer for name, peer in chosen.items() if not name.startswith("torch")}
    return chosen
