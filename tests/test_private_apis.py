"""What we use of JAX's and Orbax's internals: that it is still there, takes what we give it, and does what we rely on.

Red here after an upgrade: read the changed source, mend `rendezvous` or `arrays`, then raise the bounds in
pyproject.toml. Everything else in the package uses public names only.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax._src import distributed
from jax._src.lib import _jax
from jax.experimental import multihost_utils
from orbax.checkpoint._src.handlers import base_pytree_checkpoint_handler
from orbax.checkpoint._src.metadata import array_metadata, array_metadata_store
from orbax.checkpoint._src.metadata import sharding as sharding_metadata

ROOT = Path(__file__).parent.parent
WATCHED = {  # private names that the package may import: each has a test below
    "jax._src.distributed",
    "orbax.checkpoint._src.metadata.array_metadata",
    "orbax.checkpoint._src.metadata.array_metadata_store",
    "orbax.checkpoint._src.metadata.sharding",
}


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_every_private_import_of_the_package_is_watched_here() -> None:
    found = set()
    for path in (ROOT / "orchestrator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and "._src" in node.module:
                found |= {f"{node.module}.{alias.name}".replace("jax._src.distributed.", "") for alias in node.names}
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if "._src" in alias.name}
    assert "jax._src.distributed" in found
    assert found <= WATCHED


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
    assert {"client", "service", "initialize"} <= set(dir(distributed.global_state))


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
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from orchestrator.errors import WaitTimeout
from orchestrator.rendezvous import connect
me = connect(30.0)
said = {"hosts": me.hosts, "preempted": me.preempted(1)}
said["broadcast"] = me.broadcast("which", {"from": me.process, "text": "x" * 5000}, 30.0)["from"]
said["gather"] = me.gather("who", {"is": [me.process] * (1 + 50 * me.process)}, 30.0)[1]["is"][-1]
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


def test_two_processes_agree_through_multihost_utils_and_signal_through_the_service(
    two_processes: list[dict[str, Any]],
) -> None:
    for said in two_processes:
        assert said["hosts"] == {"0": "host-0", "1": "host-1"}
        assert (said["broadcast"], said["gather"], said["preempted"]) == (0, 1, False)
    assert two_processes[0]["poll"] == {"0": "here", "1": "here"}


def test_a_process_that_does_not_come_to_a_meeting_is_named(two_processes: list[dict[str, Any]]) -> None:
    assert two_processes[0]["error"] == "leave together: processes [1 (host-1)] did not arrive within 1 s"


def test_multihost_utils_takes_what_we_give_it() -> None:
    assert multihost_utils.broadcast_one_to_all(np.int32(7)) == 7
    assert np.asarray(multihost_utils.process_allgather(np.arange(2, dtype=np.uint8))).ravel().tolist() == [0, 1]
    assert len(parameters(multihost_utils.reached_preemption_sync_point)) == 1


# Orbax's handler layer.


def test_the_handler_takes_our_arguments_and_saves_without_a_barrier() -> None:
    assert parameters(ocp.PyTreeCheckpointHandler) >= {
        *("use_ocdbt", "use_zarr3", "use_compression", "type_handler_registry")
    }
    assert parameters(ocp.PyTreeCheckpointHandler.async_save) >= {"directory", "args"}
    assert inspect.iscoroutinefunction(ocp.PyTreeCheckpointHandler.async_save)
    for handler in (ocp.PyTreeCheckpointHandler, base_pytree_checkpoint_handler.BasePyTreeCheckpointHandler):
        for method in (handler.async_save, handler.finalize):
            source = inspect.getsource(method)
            assert "barrier" not in source and "sync_global" not in source, f"{handler.__name__}.{method.__name__}"


def test_a_type_handler_has_four_methods_and_a_registry_takes_pairs() -> None:
    assert ocp.type_handlers.TypeHandler.__abstractmethods__ == {"typestr", "serialize", "deserialize", "metadata"}
    registry = ocp.type_handlers.create_type_handler_registry((str, ocp.type_handlers.StringHandler()))
    assert isinstance(registry.get(str), ocp.type_handlers.StringHandler)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_one_process_writes_only_below_its_own_prefixes_until_finalize_merges_them(tmp_path: Path) -> None:
    """`own_files` says which files a process promises; the rest is the coordinator's."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    directory = epath.Path(tmp_path / "state")
    directory.mkdir()
    arguments = ocp.args.PyTreeSave({"w": jnp.arange(1000.0), "name": "x"})
    futures = asyncio.run(handler.async_save(directory, args=arguments))
    for future in futures or ():
        future.result(timeout=30)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert "ocdbt.process_0" in names
    assert (tmp_path / "state" / "array_metadatas" / "process_0").is_file()
    assert "manifest.ocdbt" not in names
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "state" / "ocdbt.process_0").rglob("*")}
    handler.finalize(directory)
    handler.close()
    assert (tmp_path / "state" / "manifest.ocdbt").is_file()
    assert {path: path.stat().st_mtime_ns for path in written} == written  # the merged store refers to them
    plain = ocp.PyTreeCheckpointer().restore(str(tmp_path / "state"))
    assert np.asarray(plain["w"]).tolist() == list(range(1000)) and plain["name"] == "x"


def test_array_metadata_tells_which_arrays_are_prng_keys(tmp_path: Path) -> None:
    assert array_metadata.RANDOM_KEY_IMPL == "random_key_impl"
    assert parameters(array_metadata.ArrayMetadata) >= {
        *("param_name", "shape", "dtype", "write_shape", "chunk_shape", "use_ocdbt", "use_zarr3", "ext_metadata")
    }
    described = array_metadata.ArrayMetadata(
        param_name="key",
        shape=(2,),
        dtype=np.dtype("uint32"),
        write_shape=(2,),
        chunk_shape=(2,),
        use_ocdbt=True,
        use_zarr3=True,
        ext_metadata={array_metadata.RANDOM_KEY_IMPL: "fry"},
    )
    store = array_metadata_store.Store()
    asyncio.run(store.write(epath.Path(tmp_path), [described], 3))
    (written,) = json.loads((tmp_path / "array_metadatas" / "process_3").read_text())["array_metadatas"]
    assert written["array_metadata"]["param_name"] == "key"
    assert written["array_metadata"]["ext_metadata"] == {"random_key_impl": "fry"}


def test_a_sharding_can_be_told_to_plain_orbax(mesh8: jax.sharding.Mesh) -> None:
    sharding = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("data", None))
    described = sharding_metadata.from_jax_sharding(sharding)
    assert described is not None
    text = json.loads(described.to_serialized_string())
    assert (text["sharding_type"], text["axis_names"], text["shape"]) == ("NamedSharding", ["data", "model"], [4, 2])
    assert sharding_metadata.from_serialized_string(described.to_serialized_string()).to_jax_sharding() == sharding
