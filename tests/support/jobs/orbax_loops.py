"""Training loops as people write them for Orbax. tests/compat/test_compat.py runs each twice: as it stands, and with
the one import below changed. What a loop returns must be equal."""

import datetime
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen, nnx
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec


def sharded_state_with_an_interval(directory):
    """One unnamed item, on a mesh; stopped, and come back on another mesh."""

    def place(value, axes):
        mesh = jax.make_mesh(axes, ("data", "model"))
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec("data", "model")))

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=3)
    saved = []
    with ocp.CheckpointManager(directory, options=options) as manager:
        state = {"w": place(jnp.zeros((8, 4)), (4, 2)), "step": 0, "history": [jnp.zeros(2), (np.arange(3),)]}
        for step in range(1, 11):
            state = {**state, "w": state["w"] + step, "step": step}
            if manager.save(step, args=ocp.args.StandardSave(state)):
                saved.append(step)
        manager.wait_until_finished()
        kept = manager.all_steps()
    with ocp.CheckpointManager(directory, options=options) as manager:
        like = {**state, "w": place(jnp.ones((8, 4)), (2, 4))}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
        more = manager.save(12, args=ocp.args.StandardSave(restored))
        again = manager.save(12, args=ocp.args.StandardSave(restored))
        manager.wait_until_finished()
        return saved, kept, restored, str(restored["w"].sharding.spec), more, again, manager.all_steps()


def linen_train_state_beside_json(directory):
    """Several items: a flax TrainState, the position of the data as JSON."""
    model = linen.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-2))
    manager = ocp.CheckpointManager(directory, item_names=("state", "data"))
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, jnp.ones((4, 2))) ** 2)))
    for step in range(3):
        state = state.apply_gradients(grads=gradient(state.params))
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave({"epoch": step, "shards": [1, 2]})}
        manager.save(step, args=ocp.args.Composite(**items))
    manager.wait_until_finished()
    abstract = jax.eval_shape(lambda: state)
    restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()),
    )
    only = manager.restore(1, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
    manager.close()
    return restored.state.params, restored["state"].opt_state, int(restored.state.step), restored.data, dict(only)


def nnx_model_and_optimizer(directory):
    """Flax NNX: a module's state, restored through its abstract twin."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.dropout(x)

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        for step in range(2):
            gradients = nnx.grad(lambda model: jnp.mean(model(jnp.ones((4, 2))) ** 2))(model)
            optimizer.update(model, gradients)
            states = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
            manager.save(step, args=ocp.args.StandardSave(states))
    with ocp.CheckpointManager(directory) as manager:
        abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(1)))
        twin = nnx.eval_shape(lambda: nnx.Optimizer(Net(nnx.Rngs(1)), optax.adam(1e-2), wrt=nnx.Param))
        like = {"model": nnx.state(abstract), "optimizer": nnx.state(twin)}
        restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
        again = nnx.merge(nnx.graphdef(abstract), restored["model"])
        again.dropout.deterministic = True
        return nnx.to_pure_dict(nnx.state(again, nnx.Param)), again(jnp.ones((1, 2))), manager.latest_step()


def best_of_the_metrics(directory):
    """Kept by metric; every fifth for ever."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, keep_period=5, best_fn=lambda metrics: metrics["accuracy"], best_mode="max"
    )
    manager = ocp.CheckpointManager(directory, options=options)
    for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.8, 0.2, 0.4, 0.5, 0.95]):
        manager.save(step, args=ocp.args.StandardSave({"w": jnp.full(2, step)}), metrics={"accuracy": accuracy})
        manager.wait_until_finished()
    best = manager.best_step()
    restored = manager.restore(best)
    manager.close()
    return manager.all_steps(), best, restored, manager.metrics(best), manager.latest_step()


def older_api_with_handlers(directory):
    """Items without args; a bare restore."""
    handlers = {"params": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager(directory, item_handlers=handlers)
    items = {"params": {"dense": [{"kernel": jnp.ones((2, 2)), "bias": np.zeros(2)}]}, "meta": {"version": 3}}
    manager.save(0, items)
    manager.wait_until_finished()
    restored = manager.restore(0, {"params": items["params"], "meta": None})
    alone = ocp.CheckpointManager(directory / "alone", ocp.PyTreeCheckpointer())
    alone.save(5, items["params"])
    back = alone.restore(5, items=items["params"])
    alone.close()
    manager.close()
    return dict(restored), back


def part_of_a_tree_on_another_sharding(directory):
    """PyTreeRestore with restore_args, a dtype, numpy, and a part of what was saved."""
    state = {"params": {"w": jnp.arange(16.0).reshape(8, 2), "b": jnp.ones(2)}, "ema": jnp.zeros(4)}
    with ocp.CheckpointManager(directory) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        restore_args = {
            "w": ocp.ArrayRestoreArgs(sharding=sharding, dtype=jnp.bfloat16),
            "b": ocp.RestoreArgs(restore_type=np.ndarray),
        }
        item = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, state["params"])}
        found = manager.restore(
            1, args=ocp.args.PyTreeRestore(item, restore_args={"params": restore_args}, partial_restore=True)
        )["params"]
        metadata = manager.item_metadata(1)
        return (
            found,
            found["w"].sharding == sharding,
            str(found["w"].dtype),
            type(found["b"]) is np.ndarray,
            jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), dict(metadata.items())),
        )


def grain_iterator_beside_the_state(directory):
    """Data that goes on where it was."""

    def reader():
        return iter(grain.MapDataset.range(50).shuffle(seed=3).batch(4).to_iter_dataset())

    iterator = reader()
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        for step in range(3):
            batch = next(iterator)
            items = {"state": ocp.args.StandardSave({"w": jnp.full(2, step)})}
            manager.save(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator), **items))
    following = next(iterator)
    with ocp.CheckpointManager(directory) as manager:
        again = grain.checkpoint.CheckpointRestore(reader())
        like = ocp.args.StandardRestore({"w": jax.ShapeDtypeStruct((2,), jnp.int32)})
        restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=like, data=again))
    return batch, following, next(restored.data), restored.state


def decisions_of_the_users_own(directory):
    """Chosen steps, a function that decides, policies as objects, the errors that loops catch."""
    state, saved = {"w": jnp.ones(2)}, {}

    def run(name, steps=range(8), **options):
        with ocp.CheckpointManager(directory / name, options=ocp.CheckpointManagerOptions(**options)) as manager:
            due = [step for step in steps if manager.save(step, args=ocp.args.StandardSave(state))]
            manager.wait_until_finished()
            saved[name] = due, manager.all_steps(), manager.latest_step()

    managers = ocp.checkpoint_managers
    run("chosen", save_on_steps=[2, 6], save_interval_steps=5)
    run("function", should_save_fn=lambda step, last: last is None or step - last >= 3)
    run("objects", preservation_policy=managers.EveryNSteps(2), save_decision_policy=managers.FixedIntervalPolicy(2))
    run("far", keep_time_interval=datetime.timedelta(hours=1), max_to_keep=2)
    run("sync", enable_async_checkpointing=False, max_to_keep=1)
    caught = []
    with ocp.CheckpointManager(directory / "errors") as manager:
        try:
            manager.restore(None)
        except FileNotFoundError:
            caught.append("nothing yet")
        manager.save(4, args=ocp.args.StandardSave(state), custom_metadata={"note": "first"})
        try:
            manager.save(4, args=ocp.args.StandardSave(state), force=True)
        except ocp.checkpoint_manager.StepAlreadyExistsError:
            caught.append("exists")
        try:
            manager.restore(3)
        except FileNotFoundError:
            caught.append("not found")
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        saved["errors"] = manager.all_steps(), manager.metadata(4).custom_metadata
        manager.save(9, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        manager.delete(4)
        saved["deleted"] = manager.all_steps()
    with ocp.CheckpointManager(directory / "errors", options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        saved["read only"] = (
            manager.save(20, args=ocp.args.StandardSave(state)),
            manager.restore(9, args=ocp.args.StandardRestore(state)),
        )
    return json.loads(json.dumps(caught)), saved


LOOPS = (
    sharded_state_with_an_interval,
    linen_train_state_beside_json,
    nnx_model_and_optimizer,
    best_of_the_metrics,
    older_api_with_handlers,
    part_of_a_tree_on_another_sharding,
    grain_iterator_beside_the_state,
    decisions_of_the_users_own,
)
