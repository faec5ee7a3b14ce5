"""Programs as people write them for Orbax's v1 API. tests/compat/test_v1.py runs each twice: as it stands, and with the
one import below changed. What a program returns must be equal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

saves = ocp.training.save_decision_policies
keeps = ocp.training.preservation_policies


def _mesh(*axes):
    return jax.make_mesh(axes, ("data", "model"))


def _state(step=0):
    weights = jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, NamedSharding(_mesh(4, 2), PartitionSpec("data")))
    return {"params": {"w": weights, "b": jnp.full(3, step, jnp.bfloat16)}, "table": np.arange(5) + step, "step": step}


def _abstract(tree):
    return jax.tree.map(
        lambda leaf: ocp.arrays.to_shape_dtype_struct(leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def one_checkpoint_with_and_without_a_target(directory):
    ocp.save(directory / "one", _state(3))
    whole = ocp.load(directory / "one")
    like = {**_state(), "params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}}
    other = NamedSharding(_mesh(2, 4), PartitionSpec(None, "model"))
    like["params"]["w"] = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=other)
    cast = ocp.load(directory / "one", like)
    return whole, cast, str(cast["params"]["w"].sharding.spec), cast["params"]["w"].sharding.mesh.shape["model"]


def a_save_in_the_background_and_its_replacement(directory):
    path = directory / "one"
    response = ocp.save_async(path, _state(1), custom_metadata={"run": "a"})
    nothing = response.result()
    try:
        ocp.save(path, _state(2))
    except ValueError as error:
        kind = isinstance(error, ValueError)
    first = ocp.load(path)
    ocp.save_pytree(path, _state(2), overwrite=True)
    return nothing, kind, first, ocp.load_pytree(path), ocp.metadata(path).custom_metadata


def objects_by_name(directory):
    path = directory / "many"
    given = {"model": _state(1)["params"], "optimizer": {"count": 3, "mu": np.ones(4)}, "notes": {"text": "as it was"}}
    ocp.save_checkpointables(path, given)
    some = ocp.load_checkpointables(path, {"optimizer": {"count": 0, "mu": np.zeros(4)}})
    described = ocp.checkpointables_metadata(path).metadata
    shapes = jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), described["model"])
    try:
        ocp.load_checkpointables(path, {"data": None})
    except KeyError:
        missing = "KeyError"
    by_name = ocp.load(path, checkpointable_name="optimizer")
    described["directories"] = [(path / name).is_dir() for name in ("model", "optimizer", "data")]
    return ocp.load_checkpointables(path), some, sorted(described), shapes, missing, by_name, ocp.load(path)


def json_by_the_name_of_its_object(directory):
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    with ocp.training.Checkpointer(directory, context=context) as checkpointer:
        checkpointer.save_checkpointables(2, {"config": {"layers": [1, None], "on": True}, "state": _state(2)})
        alone = checkpointer.load_checkpointables(2, {"config": None})
        described = checkpointer.checkpointables_metadata(2).metadata["config"]
        return alone, described, checkpointer.load_checkpointables(), checkpointer.load(2)


def part_of_a_tree(directory):
    path = directory / "one"
    ocp.save(path, _state(4))
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    target = {"params": {"w": _abstract(_state())["params"]["w"]}}
    with context:
        part = ocp.load(path, target)
    try:
        ocp.load(path, target)
    except ValueError:
        whole = "ValueError"
    left_out = ocp.load(path, {**_abstract(_state()), "table": ocp.PLACEHOLDER})
    return part, whole, left_out["table"] is ocp.PLACEHOLDER, left_out["params"]


def from_one_kind_of_leaf_to_another(directory):
    path = directory / "one"
    ocp.save(path, {"jax": jnp.arange(4.0), "numpy": np.arange(4.0, dtype=np.float32), "number": 3, "text": "abc"})
    sharding = NamedSharding(_mesh(4, 2), PartitionSpec("data"))
    like = {
        "jax": np.zeros(4, np.float32),
        "numpy": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding),
        "number": float,
        "text": str,
    }
    found = ocp.load(path, like)
    return found, type(found["number"]).__name__, found["numpy"].sharding == sharding


def what_is_stored_of_each_leaf(directory):
    path = directory / "one"
    context = ocp.Context()
    context.array.saving.storage_options.dtype = np.dtype("float32")
    half = ocp.options.ArrayOptions.Saving.StorageOptions(dtype=jnp.bfloat16)
    context.array.saving.scoped_storage_options_creator = lambda keys, _: half if "small" in str(keys) else None
    with context:
        ocp.save(path, {"small": jnp.arange(4.0), "large": np.arange(4)})
    return ocp.load(path)


def a_training_loop(directory):
    with ocp.training.Checkpointer(
        directory,
        save_decision_policy=saves.FixedIntervalPolicy(2),
        preservation_policy=keeps.AnyPreservationPolicy([keeps.LatestN(2), keeps.EveryNSteps(4)]),
        custom_metadata={"experiment": "a"},
    ) as checkpointer:
        none = checkpointer.latest
        saved = [checkpointer.save(step, _state(step), metrics={"loss": 1.0 / (step + 1)}) for step in range(7)]
        due = [checkpointer.should_save(step) for step in (6, 7, 8)]
    with ocp.training.Checkpointer(directory) as checkpointer:
        latest = checkpointer.latest
        steps = [each.step for each in checkpointer.checkpoints]
        losses = [each.metrics for each in checkpointer.checkpoints]
        loaded = checkpointer.load(latest, _abstract(_state()))
        kinds = type(latest).__name__, type(checkpointer.root_metadata()).__name__
        experiment = checkpointer.root_metadata().custom_metadata
        return none, saved, due, latest.step, steps, losses, loaded, checkpointer.load(4), kinds, experiment


def a_loop_that_does_not_wait(directory):
    policy = saves.AnySavePolicy([saves.InitialSavePolicy(), saves.SpecificStepsPolicy((3,))])
    answers, called = [], []
    checkpointer = ocp.training.Checkpointer(directory, save_decision_policy=policy)
    for step in range(5):
        response = checkpointer.save_checkpointables_async(step, {"state": _state(step), "data": {"position": step}})
        answers.append(response is not None)
        if response is not None:
            response.on_complete(called.append)
            answers.append(response.result(timeout=60))
    checkpointer.wait()
    idle = checkpointer.is_saving_in_progress()
    loaded = checkpointer.load_checkpointables(3, {"data": None})
    checkpointer.close()
    return answers, called, idle, loaded


def a_step_that_is_there_already(directory):
    with ocp.training.Checkpointer(directory) as checkpointer:
        checkpointer.save(0, _state(0))
        try:
            checkpointer.save(0, _state(9))
        except ocp.training.errors.StepAlreadyExistsError:
            kind = "StepAlreadyExistsError"
        first = checkpointer.load(0)
        replaced = checkpointer.save(0, _state(9), overwrite=True)
        missing = []
        for ask in (checkpointer.load, checkpointer.metadata, checkpointer.delete):
            try:
                ask(5)
            except ocp.training.errors.StepNotFoundError:
                missing.append("StepNotFoundError")
        return kind, first, replaced, checkpointer.load(), missing, checkpointer.delete(5, missing_ok=True)


def steps_that_are_deleted(directory):
    with ocp.training.Checkpointer(directory) as checkpointer:
        for step in range(3):
            checkpointer.save(step, _state(step))
        deleted = checkpointer.delete(2), checkpointer.delete_async(0).result()
        checkpointer.reload()
        return deleted, [each.step for each in checkpointer.checkpoints], checkpointer.load()


def what_metadata_tells(directory):
    with ocp.training.Checkpointer(directory) as checkpointer:
        checkpointer.save(0, _state(1), metrics={"loss": 0.5}, custom_metadata={"note": "x"})
        found = checkpointer.metadata(0)
        shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), found.metadata["params"])
        again = checkpointer.load(0, found.metadata)
        times = found.init_timestamp_nsecs is not None, found.commit_timestamp_nsecs is not None
        named = sorted(checkpointer.checkpointables_metadata(0).metadata)
        return found.step, found.metrics, found.custom_metadata, shapes, again, times, named, found.path.name


def by_the_path_of_a_step(directory):
    with ocp.training.Checkpointer(
        directory, step_name_format=ocp.path.step.standard_name_format(step_prefix="ckpt")
    ) as checkpointer:
        checkpointer.save(7, _state(7))
    names = sorted(path.name for path in directory.iterdir() if path.name.startswith("ckpt"))
    return names, ocp.load(directory / "ckpt_7"), ocp.load(directory / names[0], _abstract(_state()))


class Position:
    """An object that saves itself, as data loaders do."""

    def __init__(self, at):
        self.at = at

    async def save(self, directory):
        async def write():
            (await directory.await_creation() / "position.json").write_text(json.dumps(self.at))

        return write()

    async def load(self, directory):
        async def read():
            self.at = json.loads((directory / "position.json").read_text())

        return read()


def an_object_that_saves_itself(directory):
    with ocp.training.Checkpointer(directory) as checkpointer:
        checkpointer.save_checkpointables(1, {"state": _state(1), "data": Position(12)})
        found = Position(0)
        loaded = checkpointer.load_checkpointables(1, {"data": found, "state": _abstract(_state())})
        names = sorted(checkpointer.checkpointables_metadata(1).metadata)
        return found.at, loaded["data"] is found, loaded["state"], names


class Blob:
    def __init__(self, text):
        self.text = text


class BlobHandler:
    async def save(self, directory, checkpointable):
        async def write():
            (await directory.await_creation() / "blob.txt").write_text(checkpointable.text)

        return write()

    async def load(self, directory, abstract_checkpointable=None):
        async def read():
            return Blob((directory / "blob.txt").read_text())

        return read()

    async def metadata(self, directory):
        return {"length": len((directory / "blob.txt").read_text())}

    def is_handleable(self, checkpointable):
        return isinstance(checkpointable, Blob)

    def is_abstract_handleable(self, abstract_checkpointable):
        return isinstance(abstract_checkpointable, Blob) or abstract_checkpointable is Blob


def a_handler_of_ones_own(directory):
    registry = ocp.handlers.local_registry()
    registry.add(BlobHandler)
    context = ocp.Context()
    context.checkpointables.registry = registry
    with context:
        ocp.save_checkpointables(directory / "one", {"state": _state(), "blob": Blob("abc")})
        everything = ocp.load_checkpointables(directory / "one")
        described = ocp.checkpointables_metadata(directory / "one").metadata["blob"]
    try:
        ocp.save_checkpointables(directory / "two", {"blob": Blob("abc")})
    except KeyError:
        unknown = "KeyError"
    return everything["blob"].text, everything["state"], described, unknown


def an_nnx_model_and_its_optimizer(directory):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    with ocp.training.Checkpointer(directory, preservation_policy=keeps.LatestN(1)) as checkpointer:
        state = {"params": nnx.state(model), "optimizer": nnx.state(optimizer)}
        checkpointer.save_checkpointables(0, {"model": state}, overwrite=True)
        abstract = jax.eval_shape(lambda: state)
        loaded = checkpointer.load_checkpointables(abstract_checkpointables={"model": abstract})["model"]
    nnx.update(model, loaded["params"])
    return nnx.to_pure_dict(loaded["params"]), nnx.to_pure_dict(loaded["optimizer"]), model(jnp.ones((1, 2)))


def what_cannot_be_saved(directory):
    said = []
    for state in ({}, None, {"f": print}, {"c": 1j}):
        try:
            ocp.save(directory / "one", state)
        except ValueError:
            said.append("ValueError")
    for given in ({}, [], None, {"metrics": {"a": 1}}, {"": {"a": 1}}):
        try:
            ocp.save_checkpointables(directory / "one", given)
        except ValueError:
            said.append("ValueError")
    for ask in (ocp.load, ocp.load_checkpointables, ocp.metadata):
        try:
            ask(directory / "nowhere")
        except ocp.errors.InvalidLayoutError:
            said.append("InvalidLayoutError")
    return said


def by_the_names_of_orbax_0_11(directory):
    state = {"w": jnp.arange(8.0).reshape(4, 2), "step": 3, "rest": [np.ones(2), "x"]}
    said = []
    with ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=100)):
        ocp.save_pytree(directory / "one", state)
        said.append(ocp.load_pytree(directory / "one"))
    ocp.save_pytree(directory / "one", {"w": jnp.ones(2)}, overwrite=True)
    said.append(ocp.load_pytree(directory / "one", {"w": np.zeros(2)}))
    ocp.save_pytree_async(directory / "two", state).result()
    said.append(
        jax.tree.map(lambda leaf: getattr(leaf, "shape", None), ocp.pytree_metadata(directory / "two").metadata)
    )
    ocp.save_checkpointables(directory / "items", {"model": {"w": state["w"]}, "data": {"a": 1}})
    said += [
        ocp.load_checkpointables(directory / "items"),
        ocp.load_checkpointables(directory / "items", {"data": None}),
    ]
    policies = {"save_decision_policy": saves.FixedIntervalPolicy(2), "preservation_policy": keeps.LatestN(2)}
    with ocp.training.Checkpointer(directory / "run", **policies) as checkpointer:
        said.append([checkpointer.save_pytree(step, state, metrics={"loss": 1.0}) for step in range(3)])
        checkpointer.save_pytree_async(4, state).result()
        said.append(([each.step for each in checkpointer.checkpoints], checkpointer.latest.step))
        said += [checkpointer.load_pytree(4), sorted(checkpointer.checkpointables_metadata(2).metadata)]
    return said


OLDER = (by_the_names_of_orbax_0_11,)
LOOPS = (
    *OLDER,
    one_checkpoint_with_and_without_a_target,
    a_save_in_the_background_and_its_replacement,
    objects_by_name,
    json_by_the_name_of_its_object,
    part_of_a_tree,
    from_one_kind_of_leaf_to_another,
    what_is_stored_of_each_leaf,
    a_training_loop,
    a_loop_that_does_not_wait,
    a_step_that_is_there_already,
    steps_that_are_deleted,
    what_metadata_tells,
    by_the_path_of_a_step,
    an_object_that_saves_itself,
    a_handler_of_ones_own,
    an_nnx_model_and_its_optimizer,
    what_cannot_be_saved,
)
