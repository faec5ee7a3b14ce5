"""What we use of JAX's and Orbax's internals: that it is still there, takes what we give it, and does what we rely on.

Red here after an upgrade: read the changed source, fix `arrays/jax_internals`, then raise the bounds in
pyproject.toml. Everything else in the package uses public names only.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax._src import core, distributed, xla_bridge
from jax._src.lib import _jax, xla_client
from jax.experimental import multihost_utils
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.metadata import sharding as sharding_metadata

from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import flatten
from orchestrator.job import leaving
from tests.support.runs import merge_alone

ROOT = Path(__file__).parents[2]
WATCHED = {  # private names that the package may import: each has a test below
    "jax._src.mesh",
    "jax._src.api",
    "jax._src.core",
    "jax._src.dispatch",
    "jax._src.distributed",
    "jax._src.lib._jax",
    "jax._src.lib.xla_client",
    "jax._src.xla_bridge",
    "orbax.checkpoint._src.metadata.sharding",
    "orbax.checkpoint.experimental.v1._src.context.context",
    "orbax.checkpoint.experimental.v1._src.handlers.registration",
}


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_every_private_import_of_the_package_is_watched_here() -> None:
    found = set()
    for path in (ROOT / "orchestrator").rglob("*.py"):
        source = path.read_text()
        assert "._arrays" not in source or path.name == "jax_internals.py", path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and "._src" in node.module:
                found |= {f"{node.module}.{alias.name}".replace("jax._src.distributed.", "") for alias in node.names}
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if "._src" in alias.name}
    assert "jax._src.distributed" in found
    assert found <= WATCHED


# The job.


def test_jax_knows_whether_it_has_its_devices_already() -> None:
    program = """if True:
        import jax
        from orchestrator.arrays import jax_internals
        before = jax_internals.has_backend()
        jax.devices()
        print(before, jax_internals.has_backend())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False True\n"


# The coordination service.


@pytest.fixture(scope="module")
def clients() -> Iterator[list[Any]]:
    """Two connected clients of one coordination service, in this process."""
    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, 2)
    made = [_jax.get_distributed_runtime_client(address, index) for index in range(2)]
    together([client.connect for client in made])
    yield made
    together([client.shutdown for client in made])
    service.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(calls: list[Any]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_the_coordination_client_is_where_we_look_for_it() -> None:
    assert distributed.global_state.client is None  # no jax.distributed in this process
    assert {"client", "service", "initialize", "preemption_sync_manager", "coordinator_address"} <= set(
        dir(distributed.global_state)
    )


def registered(hook: Any) -> Any:
    """What was registered to run as threads end: Python keeps it in a partial, later ones (3.13) in a lambda."""
    return hook.func if isinstance(hook, functools.partial) else inspect.getclosurevars(hook).nonlocals["func"]


def test_python_runs_our_end_before_pools_take_no_more_work() -> None:
    """Without it the last save of a program that does not close its agent is lost: test_leaving has the cases."""
    assert leaving._before_threads_end is threading._register_atexit  # type: ignore[attr-defined]
    hooks = [registered(hook).__module__ for hook in threading._threading_atexits]  # type: ignore[attr-defined]
    assert "concurrent.futures.thread" in hooks


def test_a_posted_value_is_seen_by_others_can_be_overwritten_and_forgotten_by_prefix(clients: list[Any]) -> None:
    first, second = clients
    assert second.key_value_dir_get("run/5/receipt/") == []
    first.key_value_set("run/5/receipt/0", "no", allow_overwrite=True)
    first.key_value_set("run/5/receipt/0", "yes", allow_overwrite=True)
    second.key_value_set("run/5/receipt/1", "ü" * 100_000, allow_overwrite=True)
    first.key_value_set("run/50/receipt/0", "other", allow_overwrite=True)
    assert sorted(second.key_value_dir_get("run/5/receipt/")) == [
        ("run/5/receipt/0", "yes"),
        ("run/5/receipt/1", "ü" * 100_000),
    ]
    first.key_value_delete("run/5/")
    assert second.key_value_dir_get("run/5/receipt/") == []
    assert second.key_value_dir_get("run/50/receipt/") == [("run/50/receipt/0", "other")]


def test_a_barrier_lets_all_pass_together_and_its_timeout_says_deadline(clients: list[Any]) -> None:
    together([lambda client=client: client.wait_at_barrier("all", timeout_in_ms=10_000) for client in clients])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"DEADLINE_EXCEEDED(.|\n)*1/2"):
        clients[0].wait_at_barrier("alone", timeout_in_ms=200)


TWO_PROCESSES = """
import sys, json, jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), coordinator_bind_address=sys.argv[1])
from orchestrator.errors import WaitTimeout
from orchestrator.job.rendezvous import connect
me = connect(30.0)
said = {"hosts": me.hosts, "preempted": me.preempted(1)}
said["broadcast"] = me.broadcast("which", {"from": me.process, "text": "x" * 5000}, 30.0)["from"]
said["gather"] = me.gather("who", {"is": [me.process] * (1 + 50 * me.process)}, 30.0)[1]["is"][-1]
# As JSON, of all lengths about the one up to which a message goes in one call; of both processes alike, or not.
lengths = [(size, size + more) for size in range(249, 253) for more in (0, 1, 500)]
said["lengths"] = lengths == [tuple(map(len, me.gather("size", "x" * pair[me.process], 30.0))) for pair in lengths]
about = [size for size, _ in lengths] + [*range(4088, 4094)]  # the same, of messages of one process
said["broadcasts"] = all(len(me.broadcast("size", "x" * size, 30.0)) == size for size in about)
from orchestrator.job.collectives import collectives
row = __import__("numpy").full(4, me.process + 1, "u1")  # of each process: nothing of process 1's is in what 0 sends
said["rows"] = [collectives().broadcast(row).tolist(), collectives().gathered(row).tolist()]
for text in ("coming", "here"):
    me.post(f"test/{me.process}", text)
if me.process == 0:
    try:
        me.gather("leave together", None, 1.0)
    except WaitTimeout as error:
        said["error"] = str(error)
    me.post("done/0", "yes")
else:
    for _ in range(3000):
        if me.poll("done/"):
            break
        __import__("time").sleep(0.01)
said["poll"] = me.poll("test/")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Any]]:
    """What two real processes saw; process 1 does not come to the last meeting."""
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "ORCHESTRATOR_HOST_NAME": f"host-{index}", "PYTHONPATH": str(ROOT)},
        )
        for index in range(2)
    ]
    try:
        outcomes = [process.communicate(timeout=90) for process in running]
    finally:
        for process in running:
            process.kill()
    last_lines = [out.strip().rpartition("\n")[2] for out, _ in outcomes]  # Gloo prints to stdout too
    for line, (_, err) in zip(last_lines, outcomes, strict=True):
        assert line.startswith("{"), err
    return [json.loads(line) for line in last_lines]


def test_two_processes_agree_through_collectives_and_signal_through_the_service(
    two_processes: list[dict[str, Any]],
) -> None:
    for said in two_processes:
        assert said["hosts"] == {"0": "host-0", "1": "host-1"}
        assert (said["broadcast"], said["gather"], said["preempted"]) == (0, 1, False)
        assert said["lengths"] and said["broadcasts"] and said["rows"] == [[1] * 4, [[1] * 4, [2] * 4]]
    assert two_processes[0]["poll"] == {"0": "here", "1": "here"}


def test_a_process_that_does_not_come_to_a_meeting_is_named(two_processes: list[dict[str, Any]]) -> None:
    assert two_processes[0]["error"] == "leave together: processes [1 (host-1)] did not arrive within 1 s"


EXIT_HANDLERS = """
import atexit, sys
registered, register = [], atexit.register
atexit.register = lambda function, *args: (registered.append(function), register(function, *args))[1]
import jax
from jax._src import api, dispatch, distributed
from orchestrator.job.rendezvous import ServiceBoard
print(api.clean_up in registered, dispatch.wait_for_tokens in registered)
distributed.State.shutdown = lambda state: print("waited")
if sys.argv[1] == "skip":
    ServiceBoard(0, 2).skip_exit_barrier()
"""


def test_what_waits_for_other_processes_at_exit_is_where_we_take_it_out() -> None:
    for how, said in (("wait", ["True True", "waited"]), ("skip", ["True True"])):
        command = [sys.executable, "-c", EXIT_HANDLERS, how]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
        assert done.stdout.splitlines() == said, done.stderr
    state = distributed.global_state
    assert {"preemption_sync_manager", "client", "service", "process_id", "num_processes"} <= set(dir(state))


def test_gloo_is_made_by_a_function_that_takes_an_address() -> None:
    """`tests/job/test_networks.py` sees it listen there."""
    assert "hostname: str | None" in str(_jax.make_gloo_tcp_collectives.__doc__)
    made = inspect.getsource(xla_bridge.make_cpu_client)  # before 0.9 it takes the module by another name
    assert re.search(r"\b(_jax|xla_client\._xla)\.make_gloo_tcp_collectives\(", made)
    assert xla_client._xla is _jax and getattr(xla_bridge, "_jax", _jax) is _jax


def test_multihost_utils_takes_what_we_give_it() -> None:
    assert len(parameters(multihost_utils.reached_preemption_sync_point)) == 1


# Device arrays out of host buffers.


def test_one_call_makes_an_array_of_all_its_shards_without_a_copy() -> None:
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), PartitionSpec())
    raw = np.zeros(4096 + 64, np.uint8)
    first = -raw.ctypes.data % 64
    host = raw[first : first + 4096].view(np.float32)
    aval = core.ShapedArray(host.shape, host.dtype)
    devices = list(sharding.mesh.devices.flat)
    array = xla_client.batched_device_put(aval, sharding, [host, host], devices, True)
    assert (array.shape, array.dtype, array.sharding, array.committed) == (host.shape, host.dtype, sharding, True)
    assert [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards] == [host.ctypes.data] * 2
    add = jax.jit(lambda value: value + 1, donate_argnums=0)
    added = add(add(array))
    assert array.is_deleted() and not host.any()  # both devices share the buffer: neither may change it
    assert all((np.asarray(shard.data) == 2).all() for shard in added.addressable_shards)


def test_it_can_copy_instead_and_then_donating_the_array_reuses_its_memory() -> None:
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), PartitionSpec("data"))
    shards, devices = [np.full(512, number, np.float32) for number in range(2)], list(sharding.mesh.devices.flat)
    how = xla_client.HostBufferSemantics.IMMUTABLE_ONLY_DURING_CALL
    aval = core.ShapedArray((1024,), shards[0].dtype)
    array = xla_client.batched_device_put(aval, sharding, shards, devices, True, False, how)
    for shard in shards:
        shard[:] = -1
    held = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    added = jax.jit(lambda value: value + 1, donate_argnums=0)(array)
    assert np.asarray(added).tolist() == [1.0] * 512 + [2.0] * 512
    assert [shard.data.unsafe_buffer_pointer() for shard in added.addressable_shards] == held


def test_a_buffer_callback_allocates_arrays_that_nobody_touches() -> None:
    """`owned` reads chunks into them. Not private, but experimental: without it everything would be copied."""
    form = jax.ShapeDtypeStruct((64 << 20,), np.uint8)
    allocate = jax.jit(lambda: buffer_callback(lambda context, results: None, [form, form])())
    made = jax.block_until_ready(allocate())
    assert len({array.unsafe_buffer_pointer() for array in made}) == 2
    before = resident_bytes()
    more = jax.block_until_ready(allocate())
    assert resident_bytes() - before < 64 << 20, "it is not written to"
    assert len({array.unsafe_buffer_pointer() for array in [*made, *more]}) == 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_shards_of_an_array_are_where_we_look_for_them(mesh8: jax.sharding.Mesh) -> None:
    for spec in (PartitionSpec("data"), PartitionSpec(), PartitionSpec("data", "model")):
        array = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh8, spec))
        held: Any = array._arrays
        assert all(one is again for one, again in zip(held, array._arrays, strict=True))  # a copy begun is found again
        for one, shard in zip(held, array.addressable_shards, strict=True):
            assert one.unsafe_buffer_pointer() == shard.data.unsafe_buffer_pointer()
            assert one.device == shard.device


# Orbax's format.


def saved_by_orbax(tree: Any, directory: Path) -> None:
    directory.mkdir()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    futures = asyncio.run(handler.async_save(epath.Path(directory), args=ocp.args.PyTreeSave(tree)))
    for future in futures or ():
        future.result(timeout=30)
    handler.finalize(epath.Path(directory))
    handler.close()


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_our_metadata_is_what_orbaxs_own_handler_writes_for_the_same_tree(
    tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    sharded = jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh8, PartitionSpec("data", "model")))
    tree = {
        "a": {"b": sharded, "n": np.arange(3)},
        "pairs": [Pair(jnp.ones((2, 2), jnp.bfloat16), 3), optax.EmptyState(), Pair(1.5, True)],
        "none": [None, {}, (), []],
        "text": {"s": 'he said "ü"', "a/b": "nested"},
        "key": jax.random.key(7),
        "scalar": jnp.zeros(()),
        7: jnp.zeros(1),
    }
    tree = {str(key): value for key, value in tree.items()}
    saved_by_orbax(tree, tmp_path / "theirs")
    writer = ArrayWriter(ArrayOptions(), 0)
    pending = writer.stage(f"file://{tmp_path}/ours", flatten(tree))
    pending.finish(60)
    merge_alone(pending)
    for name in ("_METADATA", "_sharding", "_strings.json", "array_metadatas/process_0"):
        theirs, ours = (json.loads((tmp_path / who / name).read_text()) for who in ("theirs", "ours"))
        assert ours == theirs, name
    theirs, ours = (ocp.PyTreeCheckpointer().restore(tmp_path / who) for who in ("theirs", "ours"))
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)


def test_orbax_tells_the_context_in_force_and_whose_handler_an_object_is_for() -> None:
    from orbax.checkpoint import v1

    from orchestrator.arrays.format import orbax_v1

    class Handler:
        async def save(self, directory: Any, checkpointable: Any) -> Any: ...
        async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any: ...
        async def metadata(self, directory: Any) -> Any: ...
        def is_handleable(self, checkpointable: Any) -> bool:
            return isinstance(checkpointable, set)

        def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
            return isinstance(abstract_checkpointable, set)

    registry = v1.handlers.local_registry()
    registry.add(Handler)
    registry.add(v1.handlers.JsonHandler, checkpointable_name="config")
    given = v1.options.CheckpointablesOptions(registry=registry)  # the name by which Orbax 0.11 takes them, too
    context, other = v1.Context(checkpointables_options=given), v1.Context()
    assert orbax_v1.context(other) is other
    with context:
        assert orbax_v1.context(other) is context
    assert isinstance(orbax_v1.handler_for_save(context, "a", {1}), Handler)
    assert orbax_v1.is_tree_handler(orbax_v1.handler_for_save(context, "a", {"w": 1}))
    assert orbax_v1.is_json_handler(orbax_v1.handler_for_save(context, "config", {"w": 1}))
    typestr = f"{Handler.__module__}.{Handler.__qualname__}"
    assert isinstance(orbax_v1.handler_for_load(context, "a", None, typestr), Handler)
    assert isinstance(orbax_v1.handler_for_load(context, "a", {1}, None), Handler)
    with pytest.raises(KeyError):
        orbax_v1.handler_for_save(other, "a", {1})


def test_a_sharding_can_be_told_to_plain_orbax(mesh8: jax.sharding.Mesh) -> None:
    sharding = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("data", None))
    described = sharding_metadata.from_jax_sharding(sharding)
    assert described is not None
    text = json.loads(described.to_serialized_string())
    assert (text["sharding_type"], text["axis_names"], text["shape"]) == ("NamedSharding", ["data", "model"], [4, 2])
    assert sharding_metadata.from_serialized_string(described.to_serialized_string()).to_jax_sharding() == sharding
