"""Writes directories as the Orbax that is installed beside it does, each with what it was made from: DIR.json.

    python adopt_writer.py FOLDER

Run by `adopt_matrix` with the Python of another environment: it imports nothing of the package, and asks each version
of Orbax (0.4.8 to 0.12) for what it has. A layout that this version has not is passed over, and said.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

STEPS = (10, 20)
Items = dict[str, tuple[Any, Any]]  # name -> handler, value


class NotThere(Exception):
    """This version of Orbax has no such layout."""


# What is saved.


def params(step: int) -> dict[str, Any]:
    return {"w": jnp.arange(12.0).reshape(4, 3) + step, "b": {"x": jnp.full((3,), step, jnp.int32)}}


def sharded(step: int) -> dict[str, Any]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    return {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8) + step, place), "b": params(step)["b"]}


def dtypes(step: int) -> dict[str, Any]:
    names = ("bfloat16", "float16", "bool", "int8", "uint8", "int16", "uint32", "complex64")
    return {name: jnp.asarray(np.arange(6).reshape(2, 3) + step).astype(name) for name in names}


def nested(step: int) -> dict[str, Any]:
    return {
        "layers": [np.arange(step, step + 3), (jnp.float32(2.5), jnp.ones((2, 1)))],
        "none": None,
        "empty": {},
        "nothing": [],
        "count": step,
        "rate": 0.25,
        "scalar": jnp.int32(step),
        "deep": {"a": {"b": {"d": jnp.ones(2)}}},
    }


def optimizer(step: int) -> dict[str, Any]:
    import optax

    return {"params": params(step), "optimizer": optax.adam(1e-3).init(params(step))}


# What it was made from.


def digest(value: Any) -> str:
    if isinstance(value, bool | int | float | str):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return f"{array.dtype.name}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def leaves(tree: Any) -> dict[str, str]:
    """Path of each leaf -> what it is."""
    found = {}
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
        found["/".join(map(str, names))] = digest(value)
    return found


# How it is saved.


def handler(name: str, **options: Any) -> Any:
    """Of this version, with those options. Raises NotThere."""
    made = getattr(ocp, f"{name}CheckpointHandler", None)
    if made is None or not set(options) <= set(inspect.signature(made.__init__).parameters):
        raise NotThere
    return made(**options)


def saved_as(each: Any, value: Any) -> Any:
    name = type(each).__name__.removesuffix("CheckpointHandler") + "Save"
    made = getattr(getattr(ocp, "args", None), name, None)
    if made is None:
        raise NotThere
    return made(value)


def manage(
    folder: Path, items: Callable[[int], Items], *, single: bool = False, metrics: bool = False, **options: Any
) -> None:
    """A CheckpointManager's run of STEPS. A single item is called `default`."""
    if metrics:
        options |= {"best_fn": lambda found: found["loss"]}
    allowed = set(inspect.signature(ocp.CheckpointManagerOptions).parameters)
    options = {name: value for name, value in options.items() if name in allowed}
    first = {name: each for name, (each, _) in items(STEPS[0]).items()}
    more = {"metrics": {"loss": 0.5}} if metrics else {}
    made = ocp.CheckpointManagerOptions(**options)
    if "item_handlers" in inspect.signature(ocp.CheckpointManager.__init__).parameters:
        given = first["default"] if single else first
        manager = ocp.CheckpointManager(folder, item_handlers=given, options=made)
        for step in STEPS:
            args = {name: saved_as(each, value) for name, (each, value) in items(step).items()}
            manager.save(step, args=args["default"] if single else ocp.args.Composite(**args), **more)
    else:
        checkpointers = {name: ocp.Checkpointer(each) for name, each in first.items()}
        manager = ocp.CheckpointManager(folder, checkpointers["default"] if single else checkpointers, made)
        for step in STEPS:
            values = {name: value for name, (_, value) in items(step).items()}
            manager.save(step, values["default"] if single else values, **more)
    if hasattr(manager, "wait_until_finished"):
        manager.wait_until_finished()
    manager.close()


def described(items: Callable[[int], Items], *, metrics: bool = False) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for step in STEPS:
        about: dict[str, Any] = {"trees": {}, "json": {}, "metrics": {"loss": 0.5} if metrics else {}}
        for name, (each, value) in items(step).items():
            if "Json" in type(each).__name__:
                about["json"][name] = value
            else:
                about["trees"][name] = leaves(value)
        steps[str(step)] = about
    return {"steps": steps}


def managed(
    make: Callable[[], Callable[[int], Items]], *, single: bool = True, metrics: bool = False, **options: Any
) -> Callable[[Path], Any]:
    def write(folder: Path) -> dict[str, Any]:
        items = make()
        manage(folder, items, single=single, metrics=metrics, **options)
        return described(items, metrics=metrics)

    return write


def alone(kind: str, state: Callable[[int], Any], **options: Any) -> Callable[[], Callable[[int], Items]]:
    """A single item."""

    def make() -> Callable[[int], Items]:
        handler(kind, **options)
        return lambda step: {"default": (handler(kind, **options), state(step))}

    return make


def several(json_name: str | None = None) -> Callable[[int], Items]:
    return lambda step: {
        "state": (handler("Standard"), params(step)),
        "ema": (handler("PyTree"), {"w": jnp.zeros(3)}),
        "data": (handler("Json", **({"filename": json_name} if json_name else {})), {"epoch": step, "names": ["a"]}),
    }


def checkpoint(kind: str, state: Callable[[int], Any]) -> Callable[[Path], Any]:
    """A directory that is one step."""

    def write(folder: Path) -> dict[str, Any]:
        value = state(7)
        checkpointer = ocp.Checkpointer(handler(kind))
        checkpointer.save(folder.absolute(), value)
        return {
            "steps": {"7": {"trees": {"default": leaves(value)}, "json": {}, "metrics": {}}},
            "flags": ["--as_step=7"],
        }

    return write


def side_by_side(chosen: bool) -> Callable[[Path], Any]:
    def write(folder: Path) -> dict[str, Any]:
        items = alone("Standard", params)()
        others = alone("Standard", dtypes)()
        for name, each in (("eval", others), ("train", items)):  # old managers take no other steps beside theirs
            manage(folder / name, each, single=True, step_prefix=name)
            for step in list((folder / name).iterdir()):
                step.rename(folder / step.name)
            (folder / name).rmdir()
        return described(items) | {"flags": ["--prefix=train"] if chosen else []}

    return write


def aggregated(folder: Path) -> dict[str, Any]:
    """Small arrays in the file `checkpoint`, as versions before 0.5 did for whoever asked."""
    if "aggregate" not in inspect.signature(ocp.SaveArgs).parameters:
        raise NotThere
    save_args = jax.tree_util.tree_map(lambda _: ocp.SaveArgs(aggregate=True), params(7))
    target = (folder / "7" / "default").absolute()
    target.parent.mkdir(parents=True)
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(target, params(7), save_args=save_args)
    return {"steps": {"7": {"trees": {"default": leaves(params(7))}, "json": {}, "metrics": {}}}}


def flax_legacy(folder: Path) -> dict[str, Any]:
    """Flax's own msgpack, before it had Orbax: files, and no directories."""
    import flax
    from flax.training import checkpoints

    flax.config.update("flax_use_orbax_checkpointing", False)
    checkpoints.save_checkpoint(folder.absolute(), params(7), 7)
    return {"steps": {}}


def flax_orbax(folder: Path) -> dict[str, Any]:
    import flax
    from flax.training import checkpoints

    flax.config.update("flax_use_orbax_checkpointing", True)
    for step in STEPS:
        checkpoints.save_checkpoint(folder.absolute(), params(step), step, keep=9)
    return described(alone("PyTree", params)())


def key_item(folder: Path, typed: bool) -> dict[str, Any]:
    if not hasattr(getattr(ocp, "args", None), "JaxRandomKeySave"):
        raise NotThere
    made = ocp.handlers.JaxRandomKeyCheckpointHandler

    def items(step: int) -> Items:
        key = jax.random.key(step) if typed else jax.random.PRNGKey(step)
        return {"state": (handler("Standard"), params(step)), "rng": (made(), key)}

    manage(folder, items)
    return described(items)


def numpy_key_item(folder: Path) -> dict[str, Any]:
    if not hasattr(getattr(ocp, "args", None), "NumpyRandomKeySave"):
        raise NotThere
    made = ocp.handlers.NumpyRandomKeyCheckpointHandler

    def items(step: int) -> Items:
        state = np.random.RandomState(step).get_state(legacy=False)
        return {"state": (handler("Standard"), params(step)), "rng": (made(), state)}

    manage(folder, items)
    return {"steps": {}}


def own_handler(folder: Path) -> dict[str, Any]:
    """An item that only its own handler reads."""
    described_ = managed(lambda: several(), single=False)(folder)
    for step in STEPS:
        item = folder / str(step) / "vocabulary"
        item.mkdir()
        (item / "words.bin").write_bytes(b"\x00\x01")
    return {**described_, "steps": {}}


def typed_keys(step: int) -> dict[str, Any]:
    return {"key": jax.random.key(step), "keys": jax.random.split(jax.random.key(step), 3), "w": jnp.ones(2)}


def v1() -> Any:
    try:
        import orbax.checkpoint.experimental.v1 as found
    except ImportError as error:
        raise NotThere from error
    return found


def v1_pytree(folder: Path) -> dict[str, Any]:
    v1().save_pytree(folder.absolute(), params(7))
    return {
        "steps": {"7": {"trees": {v1_item(folder): leaves(params(7))}, "json": {}, "metrics": {}}},
        "flags": ["--as_step=7"],
    }


def v1_item(step: Path) -> str:
    """What this version calls the one tree of a checkpoint."""
    (name,) = (path.name for path in step.iterdir() if (path / "_METADATA").exists())
    return name


def v1_json_items(folder: Path) -> dict[str, Any]:
    data = {"epoch": 3, "names": ["a", None]}
    ocp1 = v1()
    registry = ocp1.handlers.local_registry()
    registry.add(ocp1.handlers.JsonHandler, checkpointable_name="data")
    context = ocp1.Context()
    context.checkpointables.registry = registry
    with context:
        ocp1.save_checkpointables(folder.absolute(), {"state": params(7), "data": data})
    about = {"trees": {"state": leaves(params(7))}, "json": {"data": data}, "metrics": {}}
    return {"steps": {"7": about}, "flags": ["--as_step=7"]}


def v1_training(folder: Path) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    with v1().training.Checkpointer(folder.absolute()) as checkpointer:
        for step in STEPS:
            checkpointer.save_pytree(step, params(step), metrics={"loss": 0.5})
            steps[str(step)] = {
                "trees": {v1_item(folder / str(step)): leaves(params(step))},
                "json": {},
                "metrics": {"loss": 0.5},
            }
    return {"steps": steps}


def json_alone(step: int) -> Items:
    return {"data": (handler("Json"), {"epoch": step})}


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "one item, Standard": managed(alone("Standard", params)),
    "one item, PyTree": managed(alone("PyTree", params)),
    "a directory for each array": managed(alone("PyTree", params, use_ocdbt=False)),
    "zarr3": managed(alone("PyTree", params, use_zarr3=True)),
    "zarr3, a directory for each array": managed(alone("PyTree", params, use_zarr3=True, use_ocdbt=False)),
    "without compression": managed(alone("PyTree", params, use_compression=False, use_ocdbt=False)),
    "sharded on 4 x 2 devices": managed(alone("Standard", sharded)),
    "sharded, a directory for each array": managed(alone("PyTree", sharded, use_ocdbt=False)),
    "dtypes": managed(alone("Standard", dtypes)),
    "lists, tuples, None, empty nodes, numbers": managed(alone("PyTree", nested)),
    "optax's state": managed(alone("PyTree", optimizer)),
    "typed keys in the tree": managed(alone("Standard", typed_keys)),
    "items: Standard, PyTree, JSON": managed(lambda: several(), single=False),
    "JSON in a file of another name": managed(lambda: several("conf.json"), single=False),
    "JSON alone": managed(lambda: json_alone, single=False),
    "metrics": managed(alone("Standard", params), metrics=True),
    "prefix": managed(alone("Standard", params), step_prefix="ckpt"),
    "fixed length": managed(alone("Standard", params), step_format_fixed_length=8),
    "prefix and fixed length": managed(alone("Standard", params), step_prefix="ckpt", step_format_fixed_length=6),
    "an array as item": managed(lambda: lambda step: {"default": (handler("Array"), jnp.arange(3.0) + step)}),
    "JaxRandomKeySave, typed": lambda folder: key_item(folder, True),
    "JaxRandomKeySave, raw": lambda folder: key_item(folder, False),
    "NumpyRandomKeySave": numpy_key_item,
    "an item of an own handler": own_handler,
    "one checkpoint, Standard": checkpoint("Standard", params),
    "one checkpoint, PyTree": checkpoint("PyTree", nested),
    "prefixes side by side, one chosen": side_by_side(True),
    "prefixes side by side": side_by_side(False),
    "arrays in the file `checkpoint`": aggregated,
    "no description of the tree": managed(alone("PyTree", params, write_tree_metadata=False)),
    "Flax's steps by Orbax": flax_orbax,
    "Flax's msgpack": flax_legacy,
    "v1: save_pytree": v1_pytree,
    "v1: save_checkpointables with JSON": v1_json_items,
    "v1: training.Checkpointer": v1_training,
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, write) in enumerate(LAYOUTS.items()):
        target = folder / f"{number:02d}"
        shutil.rmtree(target, ignore_errors=True)
        about: dict[str, Any] = {"layout": name}
        try:
            about |= write(target)
        except Exception as error:  # what a version of Orbax cannot write is no directory to adopt
            shutil.rmtree(target, ignore_errors=True)
            about["not_written"] = f"{type(error).__name__}: {error}"[:300]
        target.with_suffix(".json").write_text(json.dumps(about))
        print(f"{number:02d} {name}: {about.get('not_written', 'written')}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
