"""What is compared by `benchmarks.tier_cost`: each holds a step in its hosts' memory.

A peer is opened outside the timing. `hold` returns when training could go on; `is_done` says whether this process's
part is safe; `finish` is called on all once all are.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

ARRAYS = 16


def store(base: Path) -> Path:
    """On a disk: what hosts hold is in memory."""
    return Path(tempfile.gettempdir(), base.name)


class JaxTraining:
    """A state over the hosts, and a step in which all meet. replicas: how often the devices hold the state."""

    def __init__(self, size: int, hosts: int, replicas: int) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        self.mesh = jax.make_mesh((replicas, hosts // replicas), ("replica", "data"))
        rows = NamedSharding(self.mesh, PartitionSpec("data"))
        shape = (size // ARRAYS // 4096, 1024)
        noise = np.random.default_rng(7)  # nothing that compresses

        def part(at: Any) -> Any:
            return noise.random((len(range(shape[0])[at[0]]), 1024), np.float32)

        self.state = {f"w{number}": jax.make_array_from_callback(shape, rows, part) for number in range(ARRAYS)}
        self._everywhere = NamedSharding(self.mesh, PartitionSpec(("replica", "data")))
        self._hosts, self._device = hosts, jax.local_devices()[0]

        def step(leaf: Any, flags: Any) -> Any:
            return leaf + jnp.float32(1), flags.sum()

        self._step = jax.jit(step, donate_argnums=0)

    def step(self, done: bool) -> bool:
        """One step; whether all are done."""
        import jax
        import numpy as np

        mine = jax.device_put(np.array([done], np.int32), self._device)
        flags = jax.make_array_from_single_device_arrays((self._hosts,), self._everywhere, [mine])
        self.state["w0"], total = self._step(self.state["w0"], flags)
        return int(total) == self._hosts


class TorchTraining:
    """The same for PyTorch: each process has its share."""

    def __init__(self, size: int, hosts: int, replicas: int) -> None:
        import torch

        shape = (size // ARRAYS // 4096 // hosts, 1024)
        self.state = {f"w{number}": torch.rand(shape) for number in range(ARRAYS)}
        self._hosts = hosts

    def step(self, done: bool) -> bool:
        import torch
        import torch.distributed as dist

        self.state["w0"].add_(1)
        flags = torch.tensor([int(done)])
        dist.all_reduce(flags)
        return int(flags) == self._hosts


class Ours:
    """Held steps with one copy of each part on another host."""

    training: ClassVar[type[Any]] = JaxTraining
    package: ClassVar[str] = "jax"
    replicas: ClassVar[int] = 1
    copies: ClassVar[int] = 1

    def __init__(self, base: Path, index: int, training: Any) -> None:
        os.environ["ORCHESTRATOR_TIER_DIR"] = str(base / f"host-{index}")
        os.environ["ORCHESTRATOR_DOMAIN"] = f"node=host-{index}"
        import orchestrator as oc
        from orchestrator.observe.events import subscribe

        self._heard: dict[int, Any] = {}
        subscribe(self._hear)
        tiers = [oc.memory(every=1, copies=self.copies, keep=1)]
        self._agent = oc.Agent(store(base), save=oc.every(10**9), tiers=tiers)
        assert self._agent.restore(like=training.state) is None
        self._agent.save(0, training.state)  # the store's first; from now on nothing is due there
        self._agent.wait_until_finished()

    def _hear(self, event: Any) -> None:
        if type(event).__name__ in ("StepHeld", "StepNotHeld"):
            self._heard[event.step] = event

    def hold(self, step: int, state: Any) -> None:
        self._step = step
        self._agent.save(step, state)

    def is_done(self) -> bool:
        event = self._heard.get(self._step)
        if event is not None and type(event).__name__ == "StepNotHeld":
            raise RuntimeError(event.reason)
        return event is not None

    def finish(self) -> None:
        return


class OursAlone(Ours):
    """Without copies: what is left of the cost then."""

    copies = 0


class NvrxSync:
    """NVIDIA NVRx's local checkpointing, each part on two ranks (`CliqueReplicationStrategy`), as it comes: its
    state dict asserts CUDA tensors: `nvrx_state` has one that does not."""

    training: ClassVar[type[Any]] = TorchTraining
    package: ClassVar[str] = "nvidia_resiliency_ext"
    replicas: ClassVar[int] = 1
    asynchronous: ClassVar[bool] = False

    def __init__(self, base: Path, index: int, training: Any) -> None:
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

        from benchmarks.nvrx_state import OnCpu

        directory = base / f"host-{index}"
        directory.mkdir(parents=True, exist_ok=True)
        strategy = CliqueReplicationStrategy.from_replication_params(1, 2)
        self._kind, self._manager = OnCpu, LocalCheckpointManager(directory, repl_strategy=strategy)

    def hold(self, step: int, state: Any) -> None:
        self._manager.save(self._kind(dict(state)), step)

    def is_done(self) -> bool:
        return True

    def finish(self) -> None:
        return


class NvrxAsync(NvrxSync):
    """Written by a process that it forks. `torch.cuda.synchronize` is replaced by nothing, as it fails without CUDA;
    CPU tensors are not copied, so what is written are the tensors as they are by then."""

    def hold(self, step: int, state: Any) -> None:
        import torch
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import TemporalAsyncCaller

        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment, unused-ignore]
        request = self._manager.save(self._kind(dict(state)), step, is_async=True).freeze()
        self._request, self._caller = request, TemporalAsyncCaller()
        self._caller.schedule_async_call(request._replace(call_idx=step, finalize_fns=[]))

    def is_done(self) -> bool:
        return bool(self._caller.is_current_async_call_done(False, True))

    def finish(self) -> None:
        self._request.execute_finalize_fns(validate_matching_call_idx=False)


class OrbaxEmergency:
    """Orbax's emergency CheckpointManager: the state is on two slices, and the hosts of the second hold it in memory;
    nothing is sent then. Those of the first save to the store alone, and nothing is due there."""

    training: ClassVar[type[Any]] = JaxTraining
    package: ClassVar[str] = "orbax"
    replicas: ClassVar[int] = 2

    def __init__(self, base: Path, index: int, training: Any) -> None:
        import jax
        import orbax.checkpoint as ocp
        from absl import flags
        from orbax.checkpoint._src.multihost import multihost
        from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

        flags.FLAGS.mark_as_parsed()
        multihost.initialize_distributed_to_device_ids()
        local = base / f"host-{index}"
        local.mkdir(parents=True, exist_ok=True)
        store(base).mkdir(parents=True, exist_ok=True)
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), training.state
        )
        options = emergency.CheckpointManagerOptions(
            local=emergency.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1),
            persistent=emergency.PersistentCheckpointOptions(save_interval_steps=10**9, max_to_keep=1),
        )
        self._ocp = ocp
        self._manager = emergency.CheckpointManager(local, store(base), training.mesh, target, options=options)
        inner = self._manager._checkpoint_manager
        self._local = None if self._manager.in_primary_slice else inner._local_checkpoint_manager

    def hold(self, step: int, state: Any) -> None:
        self._manager.save(step, args=self._ocp.args.Composite(state=self._ocp.args.PyTreeSave(dict(state))))

    def is_done(self) -> bool:
        return self._local is None or not self._local.is_saving_in_progress()

    def finish(self) -> None:
        return


PEERS: dict[str, type[Any]] = {
    "ours": Ours,
    "ours, no copies": OursAlone,
    "NVRx": NvrxSync,
    "NVRx async": NvrxAsync,
    "Orbax emergency": OrbaxEmergency,
}


@functools.cache
def installed(name: str) -> bool:
    return importlib.util.find_spec(PEERS[name].package) is not None
