"""Every save and restore works under every setting of JAX that a program has around it, and leaves it as it was."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import orchestrator as oc
import orchestrator.compat as ocp
from orchestrator.arrays import jax_internals
from orchestrator.arrays.jax_context import in_own_context, own_context
from tests.support.ambient import AMBIENT, MESHES, mesh_of, settings_now
from tests.support.leaf_values import same
from tests.support.runs import now
from tests.test_layout_rules import sources

SHARDED, ROWS, REPLICATED = PartitionSpec("data", "model"), PartitionSpec("data"), PartitionSpec()


def every_leaf(kind: AxisType) -> dict[str, Any]:
    """Leaves of every kind and placement, among them what a debugging aid takes for a fault."""
    mesh = mesh_of(kind)

    def put(value: Any, spec: PartitionSpec, **more: Any) -> Any:
        return jax.device_put(value, NamedSharding(mesh, spec, **more))

    table = np.arange(64, dtype=np.float32).reshape(8, 8)
    with jax_internals.enable_x64():
        wide = {"i64": jnp.arange(8) + 2**40, "f64": jnp.arange(8.0) / 3, "c128": jnp.ones(3, jnp.complex128)}
    return {
        **wide,
        "sharded": put(table, SHARDED),
        "rows": put(table.astype(jnp.bfloat16), ROWS),
        "replicated": put(table, REPLICATED),
        "offloaded": put(table, ROWS, memory_kind="pinned_host"),
        "one device": jnp.ones(3, jnp.complex64),
        "nan": put(np.full((4, 2), np.nan, np.float32), ROWS),
        "inf": jnp.full(3, -jnp.inf, jnp.bfloat16),
        "int4": jnp.arange(-3, 3).astype(jnp.int4),
        "bool": jnp.array([True, False]),
        "scalar": jnp.float32(2.5),
        "empty": put(np.zeros((0, 4), np.float32), REPLICATED),
        "key": jax.random.key(7),
        "keys": put(jax.random.split(jax.random.key(3), 4), ROWS),
        "numpy": np.array([np.nan, -0.0]),
        "numpy scalar": np.int64(2**40),
        "count": 5,
        "rate": 0.1,
        "none": None,
    }


STATES = {kind: every_leaf(kind) for kind in (AxisType.Auto, AxisType.Explicit)}


@pytest.mark.parametrize(
    ("kind", "setting"),
    [*((AxisType.Auto, one) for one in AMBIENT), *((AxisType.Explicit, one) for one in ("nothing", *MESHES))],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_leaf_comes_back_under_every_setting_which_is_as_before(
    root: Path, tmp_path: Path, kind: AxisType, setting: str
) -> None:
    state = STATES[kind]
    columns = NamedSharding(mesh_of(kind), PartitionSpec(None, "data"))
    other = {
        **state,
        "rows": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=columns),
        "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(jax.devices()[1])),
        "scalar": 1.0,
    }
    with AMBIENT[setting]():
        before = settings_now()
        with oc.Agent(root, save=oc.every_seconds(0.001), options=now(attest="full")) as agent:
            assert agent.save(1, state)
            back, elsewhere = agent.restore(state), agent.restore(other, cast=True)
            assert not agent.reached_preemption(1)
        read = oc.open_run(root).restore(state, attest=True)
        host = oc.open_run(root).restore(attest=True)
        with ocp.CheckpointManager(tmp_path / "compat") as manager:
            manager.save(1, args=ocp.args.StandardSave({"rows": state["rows"], "key": state["key"]}))
            manager.wait_until_finished()
            plain = manager.restore(1)
        assert settings_now() == before
    assert back is not None and elsewhere is not None
    same(back.state, state)
    same(read.state, state)
    for name, value in state.items():
        if isinstance(value, jax.Array):
            assert back.state[name].sharding == value.sharding, name
    assert (elsewhere.state["rows"].sharding, elsewhere.state["scalar"]) == (columns, 2.5)
    assert (elsewhere.state["count"].dtype, int(elsewhere.state["count"])) == (jnp.int32, 5)
    assert np.array_equal(host.state["nan"], np.asarray(state["nan"]), equal_nan=True)
    same(plain, {"rows": state["rows"], "key": state["key"]})


def test_inside_of_a_transformation_a_restore_says_where_to_call_it(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jnp.ones(2)})

        def step(x: Any) -> Any:
            agent.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
            return x

        with pytest.raises(oc.UsageError, match=r"outside of jax\.jit"):
            jax.jit(step)(1.0)
        assert agent.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}) is not None


def test_the_own_context_is_of_one_thread_and_ends_with_an_error_too() -> None:
    seen = []
    with jax.disable_jit(), jax.set_mesh(mesh_of(AxisType.Explicit)):
        before = settings_now()
        with own_context(), own_context():
            inside = settings_now()
            other = threading.Thread(target=lambda: seen.append(settings_now()))
            other.start()
            other.join()

            @in_own_context
            def failing() -> None:
                raise KeyError(str(jax_internals.mesh_that_is_set().empty))

            with pytest.raises(KeyError, match="True"):
                failing()
            assert settings_now() == inside
        assert settings_now() == before != inside
    assert not seen[0]["jax_disable_jit"] and not seen[0]["jax_enable_x64"]


# Targets without real devices.

MESH = {kind: mesh_of(kind) for kind in STATES}


def targets_of(kind: AxisType) -> dict[str, Any]:
    """A target's leaf -> what it is restored to, under `jax.set_mesh`."""
    mesh, abstract = MESH[kind], AbstractMesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    return {
        "eval_shape": (jax.eval_shape(lambda: jax.lax.broadcast(jnp.zeros((8, 8)), ())), None),
        "spec": (jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=SHARDED), NamedSharding(mesh, SHARDED)),
        "abstract": (
            jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(abstract, SHARDED)),
            NamedSharding(mesh, SHARDED),
        ),
        "of no mesh": (
            jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(AbstractMesh((), ()), REPLICATED)),
            SingleDeviceSharding(jax.local_devices()[0]),
        ),
    }


@pytest.mark.parametrize("kind", STATES, ids=lambda kind: kind.name)
def test_targets_over_abstract_meshes_are_restored_onto_the_mesh_that_is_set(root: Path, kind: AxisType) -> None:
    table = np.arange(64, dtype=np.float32).reshape(8, 8)
    with jax.set_mesh(MESH[kind]):
        given = targets_of(kind)
        names_mesh = isinstance(given["eval_shape"][0].sharding, NamedSharding)  # not before 0.8
        whole = NamedSharding(MESH[kind], REPLICATED) if names_mesh else SingleDeviceSharding(jax.devices()[0])
        given["eval_shape"] = (given["eval_shape"][0], whole)
        state = {name: jax.device_put(table, NamedSharding(MESH[kind], ROWS)) for name in given}
        like = {name: target for name, (target, _) in given.items()}
        with oc.Agent(root, options=now(attest="full")) as agent:
            agent.save(1, state)
            found = [agent.restore(like), oc.open_run(root).restore(like)]
        with ocp.CheckpointManager(root.parent / "compat") as manager:
            manager.save(1, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            through_orbax = manager.restore(1, args=ocp.args.StandardRestore(like))
    expected = {name: sharding for name, (_, sharding) in given.items()}
    saved = NamedSharding(MESH[kind], ROWS)  # is what Orbax takes where a target names none
    through = expected if names_mesh else {**expected, "eval_shape": saved}
    for states, shardings in (
        *((restored.state, expected) for restored in found if restored),
        (through_orbax, through),
    ):
        for name, sharding in shardings.items():
            assert states[name].sharding.is_equivalent_to(sharding, 2), name
            assert np.array_equal(np.asarray(states[name]), table)


@pytest.mark.parametrize(
    ("set_one", "sharding", "says"),
    [
        (
            False,
            "abstract",
            r"w: .*abstract mesh \(data=2, model=2\), and no mesh is set; restore inside of jax.set_mesh",
        ),
        (True, "abstract", r"w: .*and the mesh that is set is \(x=3\); .*or give the target NamedSharding"),
        (False, "odd", r"w: .*7"),
    ],
)
def test_a_sharding_that_cannot_be_had_is_a_mismatch_naming_the_leaf(
    root: Path, set_one: bool, sharding: str, says: str
) -> None:
    class Target:  # jax.ShapeDtypeStruct itself rejects some
        shape, dtype = (7,), np.dtype(np.float32)

    abstract = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    target: Any = jax.ShapeDtypeStruct((7,), jnp.float32)
    shardings = {"abstract": NamedSharding(abstract, REPLICATED), "odd": NamedSharding(MESH[AxisType.Auto], ROWS)}
    target = jax.ShapeDtypeStruct((7,), jnp.float32, sharding=shardings[sharding])
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jnp.zeros(7)})
        with AMBIENT["set_mesh(another)" if set_one else "nothing"]():
            for restore in (agent.restore, oc.open_run(root).restore):
                with pytest.raises(oc.Mismatch, match=says):
                    restore({"w": target})
        assert agent.all_steps() == [1]


# Nothing of JAX is run outside of it.

ROOTS = ("jax", "jnp", "lax", "multihost_utils", "_xla", "_callbacks")
PURE = (  # what moves nothing and runs nothing
    *("jax.tree", "jax.tree_util", "jax.sharding", "jax.dtypes", "jax.errors", "jax.ShapeDtypeStruct", "jax.Array"),
    *("jax.process_index", "jax.process_count", "jax.device_count", "jax.local_devices", "jax.devices"),
    *("jax.core.Tracer", "jnp.issubdtype", "jnp.finfo", "jnp.iinfo", "jnp.integer", "jnp.floating"),
    *("jnp.complexfloating", "_xla.HostBufferSemantics", "jax.__version_info__"),
    *("jax.monitoring",),
)
# Functions that are not `in_own_context` themselves, as only functions that are call them (or programs, when traced).
CALLED_INSIDE = {
    "arrays.jax_internals": "arrays_of_shards",
    "arrays.fingerprint": "_take _from_host _launch _together _program _bits _sum _mix",
    "arrays.reading.device_arrays": "_values _key _empty_array _spread",
    "arrays.reading.exchange": "_moved _from_carrier _on_others",
    "arrays.reading.owned_memory": "_program",
    "arrays.writing.copy_programs": "_copied _joined _as_bits",
    "arrays.writing.own_copies": "take",
    "arrays.writing.snapshot_feed": "_deliver",
    "arrays.writing.warm_up": "_try page_lock",
    "arrays.writing.write": "_host_bytes",
    "arrays.writing.write_plan": "as_stored",
    "job.collectives": "__init__ _total",
}
# Functions that read the settings of the program itself.
OUTSIDE_ON_PURPOSE = {
    "arrays.jax_internals": "enable_x64 mesh_that_is_set",
    "job.startup": "surroundings",
    "job.rendezvous": "join_failure_reports",
    "job.joining": "join _connect initialize _detect",
}


def operations(node: ast.AST) -> set[str]:
    """What of JAX a function uses, but for what is pure."""
    named = [ast.unparse(inner) for inner in ast.walk(node) if isinstance(inner, ast.Attribute)]
    used = {name for name in named if name.partition(".")[0] in ROOTS}
    return {name for name in used if not any(name == pure or name.startswith(f"{pure}.") for pure in PURE)} - {
        name.rpartition(".")[0] for name in used
    }


def outside(module: str, source: str) -> list[str]:
    """Functions of a module that run something of JAX, neither in our own context nor known to be called in it."""
    tree = ast.parse(source)
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    known = f"{CALLED_INSIDE.get(module, '')} {OUTSIDE_ON_PURPOSE.get(module, '')}".split()
    return [
        f"{module}.{node.name}: {', '.join(sorted(found))}"
        for body in bodies
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name not in known and (found := operations(node))
        if not any(ast.unparse(one) == "in_own_context" for one in node.decorator_list)
    ]


def test_whatever_runs_an_operation_of_jax_does_so_in_the_own_context() -> None:
    modules = {name.removeprefix("orchestrator."): text for name, text in sources().items() if "orchestrator." in name}
    found = [line for name, text in modules.items() if name != "arrays.jax_context" for line in outside(name, text)]
    assert found == []
    assert all(f"def {name}(" in modules[module] for module, names in CALLED_INSIDE.items() for name in names.split())


def test_the_finder_sees_a_function_that_runs_jax_outside_of_it() -> None:
    source = "def f(x):\n    return jax.device_put(x)\n@in_own_context\ndef g(x):\n    return jnp.stack(x)"
    assert outside("new", source) == ["new.f: jax.device_put"]
