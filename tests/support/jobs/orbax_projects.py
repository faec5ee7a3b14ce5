"""Loops in the shapes in which public projects call Orbax, in our words: MaxText, MaxDiffusion, RecML, Flax, Tunix,
Kauldron, Grain, Simply, nanodo, openpi, AXLearn, Keras. Run as those of `orbax_loops`."""

import asyncio
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import linen
from flax.training import orbax_utils, train_state
from jax.sharding import NamedSharding, PartitionSpec


def mesh_sharding(*axes):
    return NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec(*axes))


def params(fill=1.0):
    return {"dense": {"kernel": jnp.full((8, 2), fill), "bias": jnp.zeros(2)}, "scale": jnp.float32(fill)}


def shapes(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Entries(ocp.logging.AbstractLogger):
    def __init__(self):
        self.entries = []

    def log_entry(self, msg, *args, **kwargs):
        self.entries.append((msg["event_type"], msg["step"]))


# MaxText.


def maxtext_like_manager(directory, log=None):
    handlers = {
        "items": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
        "iter": grain.checkpoint.CheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(create=True, save_interval_steps=2, enable_async_checkpointing=True)
    root = epath.Path(directory)
    return ocp.CheckpointManager(root, item_handlers=handlers, options=options, logger=log)


def train_with_hints_and_come_back_on_other_shardings(directory):
    """Chunk and file sizes, a forced last save, the data where it was, restore_args with shapes of their own."""
    log = Entries()
    manager = maxtext_like_manager(directory, log)
    data = iter(grain.MapDataset.range(40).to_iter_dataset())
    saved = []
    for step in range(5):
        next(data)
        hints = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=1 << 20), params())
        state = ocp.args.PyTreeSave(params(step), save_args=hints, ocdbt_target_data_file_size=1 << 22)
        args = ocp.args.Composite(items=state, iter=grain.checkpoint.CheckpointSave(data))
        saved.append(manager.save(step, args=args, force=step == 3))
        if manager.reached_preemption(step):
            break
    manager.wait_until_finished()
    try:
        manager.save(4, args=args, force=True)
    except ocp.checkpoint_manager.StepAlreadyExistsError:
        saved.append("there")
    manager.close()

    manager = maxtext_like_manager(directory, log)
    latest = manager.latest_step()

    def target(leaf):
        spec = ("x",) if leaf.ndim == 2 else ()
        return ocp.type_handlers.ArrayRestoreArgs(
            sharding=mesh_sharding(*spec), global_shape=leaf.shape, dtype=leaf.dtype
        )

    restore = ocp.args.PyTreeRestore(item=shapes(params()), restore_args=jax.tree.map(target, params()))
    again, more = iter(grain.MapDataset.range(40).to_iter_dataset()), {}
    if (manager.directory / str(latest) / "iter").exists():
        more["iter"] = grain.checkpoint.CheckpointRestore(again)
    found = manager.restore(latest, args=ocp.args.Composite(items=restore, **more))
    manager.close()
    where = str(found["items"]["dense"]["kernel"].sharding.spec)
    return saved, latest, found["items"], where, int(next(again)), log.entries


def parameters_alone_from_the_path_of_an_item(directory):
    """Decoding reads what training has saved, with plain Orbax, from `ROOT/STEP/items`."""
    with maxtext_like_manager(directory) as manager:
        state = {"params": params(3.0), "opt_state": {"mu": params(0.5)}, "step": jnp.int32(6)}
        manager.save(6, args=ocp.args.Composite(items=ocp.args.PyTreeSave(state)))
    path = epath.Path(directory) / "6" / "items"
    item = {"params": shapes(params())}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = reader.restore(path, args=ocp.args.PyTreeRestore(item, restore_args=restore_args, transforms={}))
    names = sorted(reader.metadata(path).item_metadata.tree)
    return found, names, path.exists(), (path.parent / "iter").exists()


# MaxDiffusion.


def a_pipeline_restored_by_what_the_metadata_says(directory):
    config = {"model": "small", "layers": [1, 2], "scale": None}
    items = {"unet_state": params(2.0), "vae_state": {"w": jnp.arange(4.0)}}
    handlers = {
        "unet_state": ocp.StandardCheckpointHandler(),
        "vae_state": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        manager.save(10, args=ocp.args.Composite(config=ocp.args.JsonSave(config), **args))
    handlers["unet_state"] = ocp.PyTreeCheckpointHandler()
    manager = ocp.CheckpointManager(directory, item_handlers=handlers)
    about = manager.item_metadata(manager.latest_step())
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, about.unet_state.tree)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    found = manager.restore(
        directory=epath.Path(directory),
        step=10,
        args=ocp.args.Composite(
            unet_state=ocp.args.PyTreeRestore(restore_args=as_numpy),
            config=ocp.args.JsonRestore(),
        ),
    )
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh_sharding()), about["vae_state"].tree
    )
    other = manager.restore(10, args=ocp.args.Composite(vae_state=ocp.args.StandardRestore(placed)))
    kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(found.unet_state)}
    return found.unet_state, kinds, found.config, sorted(found.keys()), other.vae_state, "nothing" in about


# RecML.


class VariablesManager(ocp.CheckpointManager):
    """A class of one's own over Orbax's."""

    def __init__(self, directory, keep=2):
        super().__init__(directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=1))

    def save_variables(self, epoch, variables, logs=None):
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(variables), config=ocp.args.JsonSave({"epoch": epoch, "name": "model"})
        )
        return self.save(step=epoch, args=args, metrics=logs)

    def restore_variables(self, epoch, variables):
        abstract = shapes(variables)
        for variable in jax.tree.leaves(variables):
            variable.delete()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.restore(step=epoch, args=args)["state"]


def a_subclass_that_saves_variables_by_epoch(directory):
    def variables(epoch):
        return {"trainable": [jnp.full((2, 2), epoch), jnp.ones(3)], "other": [jnp.zeros(1)], "optimizer": []}

    manager = VariablesManager(directory)
    started = [
        manager.save_variables(epoch, variables(float(epoch)), {"loss": 1.0 / (epoch + 1)}) for epoch in range(4)
    ]
    manager.wait_until_finished()
    found = manager.restore_variables(manager.latest_step(), variables(0.0))
    with VariablesManager(directory) as again:
        config = again.restore(3, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
    return started, list(manager.all_steps()), found, config, isinstance(manager, ocp.CheckpointManager)


# Flax.


def a_train_state_by_the_older_calls(directory):
    """`save_args_from_target`, raw dicts, and a target that is a TrainState."""
    model = linen.Dense(2)
    start = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), jnp.ones((1, 3)))["params"], tx=optax.sgd(0.1)
    )
    bundle = {"model": start, "config": {"width": np.array([2, 3])}, "data": [jnp.arange(3)]}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    manager = ocp.CheckpointManager(directory, ocp.PyTreeCheckpointer(), options)
    save_args = orbax_utils.save_args_from_target(bundle)
    for step in range(3):
        manager.save(step, bundle, save_kwargs={"save_args": save_args})
    raw = manager.restore(2)
    empty = jax.tree.map(jnp.zeros_like, bundle)
    restore_args = orbax_utils.restore_args_from_target(empty)
    found = manager.restore(2, items=empty, restore_kwargs={"restore_args": restore_args})
    return sorted(raw["model"]), raw["data"], found["model"].params, found["config"], list(manager.all_steps())


# Tunix.


def adapters_alone_beside_an_optimizer_that_may_be_missing(directory):
    full = {"base": {"w": jnp.ones((4, 4))}, "lora": {"a": jnp.full((4, 2), 2.0), "b": jnp.zeros((2, 4))}}
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(5),
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
    )

    def save(manager, step, optimizer=None, force=False):
        items = {"model_params": ocp.args.PyTreeSave({"lora": full["lora"]})}
        if optimizer is not None:
            items["optimizer_state"] = ocp.args.PyTreeSave(optimizer)
        return manager.save(step, args=ocp.args.Composite(**items), force=force, custom_metadata={"seen": step * 8})

    started = []
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step in (5, 6, 10):
            started.append(save(manager, step, {"mu": jnp.ones(3)}))
        started.append(save(manager, 11, force=True))
        manager.wait_until_finished()
    manager = ocp.CheckpointManager(directory, options=options)
    found = []
    for step in manager.all_steps():
        names = manager.item_metadata(step)
        abstract = shapes({"lora": full["lora"]})
        items = {
            "model_params": ocp.args.PyTreeRestore(
                item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
            )
        }
        if "optimizer_state" in names:
            items["optimizer_state"] = ocp.args.PyTreeRestore()
        restored = manager.restore(step, args=ocp.args.Composite(**items))
        custom = manager.metadata(step).custom_metadata
        found.append((step, restored.model_params, dict(restored.items()).keys() >= {"optimizer_state"}, custom))
    return started, found


# Kauldron.


def evaluations_follow_a_run_with_a_prefix(directory):
    """One manager trains; another one, which only reads, hears of steps by the helper, and reloads."""
    root = epath.Path(directory) / "checkpoints"

    def manager(**more):
        return ocp.CheckpointManager(
            root,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=2,
                max_to_keep=2,
                keep_period=4,
                step_prefix="ckpt",
                async_options=ocp.AsyncOptions(timeout_secs=1800),
                multiprocessing_options=ocp.options.MultiprocessingOptions(),
                file_options=ocp.checkpoint_manager.FileOptions(path_permission_mode=0o770),
                **more,
            ),
        )

    trainer = manager(create=True)
    evaluator = manager(read_only=True)
    before = evaluator.latest_step(), list(evaluator.all_steps())
    for step in range(9):
        if trainer.should_save(step):
            trainer.save(step, args=ocp.args.StandardSave(params(step)))
    trainer.wait_until_finished()
    stale = evaluator.latest_step()
    seen = []
    names = ocp.path.step.standard_name_format(step_prefix="ckpt")
    for step in ocp.checkpoint_utils.checkpoints_iterator(root, step_prefix="ckpt", timeout=0, timeout_fn=lambda: True):
        evaluator.reload()
        abstract = shapes(params())
        restored = evaluator.restore(step, args=ocp.args.StandardRestore(abstract))
        seen.append((step, float(restored["scale"])))
    trainer.delete(8)
    evaluator.reload()
    found = sorted(each.step for each in names.find_all(root))
    return before, stale, seen, list(evaluator.all_steps()), found


# Grain.


def loaders_of_both_kinds(directory):
    """A DataLoader's state is bytes, a dataset's a JSON value; each goes on where it was."""

    def loader():
        source = grain.sources.RangeDataSource(0, 40, 1)
        sampler = grain.samplers.IndexSampler(num_records=40, shuffle=True, seed=1, num_epochs=1)
        return iter(grain.DataLoader(data_source=source, sampler=sampler, worker_count=0))

    def dataset():
        return iter(grain.MapDataset.range(40).shuffle(seed=2).repeat(2).batch(3).to_iter_dataset())

    save, restore = grain.checkpoint.CheckpointSave, grain.checkpoint.CheckpointRestore
    first, second = loader(), dataset()
    manager = ocp.CheckpointManager(directory)
    for step in range(3):
        next(first), next(second)
        manager.save(step, args=ocp.args.Composite(loader=save(first), dataset=save(second)))
    manager.wait_until_finished()
    expected = int(next(first)), next(second)
    ours = loader(), dataset()
    manager.restore(2, args=ocp.args.Composite(loader=restore(ours[0]), dataset=restore(ours[1])))
    early = dataset()
    manager.restore(0, args=ocp.args.Composite(dataset=restore(early)))
    return expected, (int(next(ours[0])), next(ours[1])), next(early)


# Simply.


def layers_of_another_checkpoint_under_new_names(directory):
    """Patterns rename what was saved; what is new keeps its own value; a marker says the format."""
    state = {"params": {"block_0": {"w": jnp.ones(2)}, "block_1": {"w": jnp.full(2, 2.0)}}, "steps": jnp.int32(3)}
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        items = {"state": ocp.args.PyTreeSave(state), "data": ocp.args.JsonSave({"__format__": "a", "seen": [1]})}
        manager.save(3, args=ocp.args.Composite(**items))
    with ocp.CheckpointManager(directory) as manager:
        formats = manager.restore(3, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data["__format__"]
        item = {"params": {"layer_0": {"w": jnp.zeros(2)}, "layer_1": {"w": jnp.zeros(2)}}, "steps": jnp.int32(0)}
        rules = {
            r"params/layer_(\d+)/w": ocp.Transform(original_key=r"params/block_\1/w", value_fn=lambda each: each + 1),
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, transforms=rules)
        found = manager.restore(3, args=ocp.args.Composite(state=args))
        as_it_is = manager.restore(3, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))
    return formats, found.state, as_it_is.state


# nanodo.


def checkpointers_by_name_and_a_final_save(directory):
    def manager(root):
        checkpointers = {
            "state": ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()),
            "data": ocp.Checkpointer(grain.checkpoint.CheckpointHandler()),
        }
        return ocp.CheckpointManager(root, checkpointers, ocp.CheckpointManagerOptions(max_to_keep=2))

    def reader():
        return iter(grain.MapDataset.range(30).to_iter_dataset())

    running, data = manager(directory), reader()
    for step in range(4):
        running.save(step, {"state": params(step), "data": data})
        next(data)
    running.close()
    other = manager(directory)  # as another run's would be
    restore_args = ocp.checkpoint_utils.construct_restore_args(params())
    found = other.restore(
        other.latest_step(),
        items={"state": params(), "data": reader()},
        restore_kwargs={"state": {"restore_args": restore_args}},
    )
    return found["state"], int(next(found["data"])), list(other.all_steps())


# openpi.


class CallbackHandler(ocp.AsyncCheckpointHandler):
    def save(self, directory, args):
        args.callback(directory)

    async def async_save(self, directory, args):
        return [ocp.future.CommitFutureAwaitingContractedSignals(asyncio.to_thread(self.save, directory, args))]

    def restore(self, *args, **kwargs):
        raise NotImplementedError


@ocp.args.register_with_handler(CallbackHandler, for_save=True)
class CallbackSave(ocp.args.CheckpointArgs):
    def __init__(self, callback):
        self.callback = callback


@ocp.args.register_with_handler(CallbackHandler, for_restore=True)
class CallbackRestore(ocp.args.CheckpointArgs): ...


def assets_by_a_callback_and_parameters_for_serving(directory):
    root = epath.Path(directory)
    root.mkdir(parents=True)
    handlers = {
        "assets": CallbackHandler(),
        "train_state": ocp.PyTreeCheckpointHandler(),
        "params": ocp.PyTreeCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, keep_period=2, create=False, async_options=ocp.AsyncOptions(timeout_secs=7200)
    )
    manager = ocp.CheckpointManager(root, item_handlers=handlers, options=options)
    fresh = tuple(manager.all_steps()) in [(), (0,)]

    def write(place):
        (place / "arm").mkdir(parents=True, exist_ok=True)
        (place / "arm" / "norm.json").write_text(json.dumps({"mean": [0.5]}))

    for step in range(4):
        manager.save(
            step, {"assets": write, "train_state": {"step": jnp.int32(step)}, "params": {"params": params(step)}}
        )
    manager.wait_until_finished()
    found = manager.restore(3, items={"train_state": {"step": jnp.int32(0)}, "params": {"params": params()}})
    place = root / "3"
    with ocp.PyTreeCheckpointer() as reader:
        about = reader.metadata(place / "params").item_metadata.tree
        served = reader.restore(
            place / "params",
            ocp.args.PyTreeRestore(
                item={"params": about["params"]},
                restore_args=jax.tree.map(
                    lambda _: ocp.ArrayRestoreArgs(sharding=mesh_sharding(), restore_type=jax.Array),
                    {"params": about["params"]},
                ),
            ),
        )
    norm = json.loads((place / "assets" / "arm" / "norm.json").read_text())
    return fresh, dict(found.items()), served, norm, list(manager.all_steps())


# AXLearn.


def an_index_beside_the_state_and_a_policy_with_summaries(directory):
    names = ocp.path.step.standard_name_format(step_prefix="step", step_format_fixed_length=8)
    summaries = {}
    manager = ocp.CheckpointManager(
        directory=str(directory),
        options=ocp.CheckpointManagerOptions(
            create=True,
            max_to_keep=3,
            enable_async_checkpointing=True,
            step_name_format=names,
            should_save_fn=lambda step, last: step % 3 == 0 or bool(summaries.get("better")),
            enable_background_delete=True,
            async_options=ocp.options.AsyncOptions(timeout_secs=300),
        ),
        item_handlers={
            "index": ocp.JsonCheckpointHandler(filename="index"),
            "state": ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, restore_concurrent_gb=1),
        },
    )
    started = []
    for step in range(1, 8):
        summaries = {"better": step == 4}
        index = [["step", step], ["w", {"shape": "(8, 2)"}]]
        args = ocp.args.Composite(index=ocp.args.JsonSave(index), state=ocp.args.PyTreeSave(item=params(step)))
        started.append(manager.save(step=step, args=args))
    manager.wait_until_finished()
    restore_args = jax.tree.map(ocp.checkpoint_utils.construct_restore_args, shapes(params()))
    restore = ocp.args.PyTreeRestore(item=shapes(params()), restore_args=restore_args)
    found = manager.restore(None, args=ocp.args.Composite(index=ocp.args.JsonRestore(None), state=restore))
    try:
        manager.restore(5, args=ocp.args.Composite(state=restore))
    except ValueError:
        started.append("not there")
    path = ocp.path.step.build_step_path(manager.directory, names, 6)
    index_file = json.loads((path / "index" / "index").read_text())
    manager.close()
    listed = sorted(epath.Path(each).name for each in ocp.utils.checkpoint_steps_paths(directory))
    return (
        started,
        found["index"],
        found["state"],
        path.name,
        index_file,
        listed,
        sorted(ocp.utils.checkpoint_steps(directory)),
    )


# Keras.


def only_the_best_epoch_is_kept_and_loaded(directory):
    """A callback that saves the best epoch by a monitored value; who comes back loads the newest there is."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, best_fn=lambda logs: logs["val_loss"], best_mode="min", save_interval_steps=1
    )
    manager, seen = ocp.CheckpointManager(directory, options=options), []
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 1.5]):
        logs = {"val_loss": loss, "accuracy": 1 / loss}
        manager.save(epoch, args=ocp.args.StandardSave({"weights": [jnp.full(2, epoch)]}), metrics=logs)
        manager.wait_until_finished()
        seen.append((list(manager.all_steps()), manager.latest_step(), manager.best_step()))
    manager.close()
    again = ocp.CheckpointManager(directory, options=options)
    return seen, again.restore(again.latest_step()), again.metrics(again.best_step())


# What many have.


def a_run_is_listed_and_the_nearest_step_is_taken(directory):
    manager = ocp.CheckpointManager(directory, ocp.StandardCheckpointer())
    for step in (10, 20, 30):
        manager.save(step, params(step))
    manager.wait_until_finished()
    nearest = min(manager.all_steps(), key=lambda each: abs(each - 22))
    about = manager.item_metadata(nearest)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), about.tree)
    return nearest, "dense" in about, manager.restore(nearest, zeros), manager.restore(nearest)


def the_first_step_is_overwritten_on_purpose(directory):
    with ocp.CheckpointManager(directory) as manager:
        manager.save(0, args=ocp.args.StandardSave(params(1.0)))
        manager.wait_until_finished()
        if 0 in manager.all_steps():
            manager.delete(0)
        empty = list(manager.all_steps()), manager.latest_step()
        manager.save(0, args=ocp.args.StandardSave(params(2.0)))
        manager.wait_until_finished()
        return empty, list(manager.all_steps()), manager.restore(0)


LOOPS = (
    train_with_hints_and_come_back_on_other_shardings,
    parameters_alone_from_the_path_of_an_item,
    a_pipeline_restored_by_what_the_metadata_says,
    a_subclass_that_saves_variables_by_epoch,
    a_train_state_by_the_older_calls,
    adapters_alone_beside_an_optimizer_that_may_be_missing,
    evaluations_follow_a_run_with_a_prefix,
    loaders_of_both_kinds,
    layers_of_another_checkpoint_under_new_names,
    checkpointers_by_name_and_a_final_save,
    assets_by_a_callback_and_parameters_for_serving,
    an_index_beside_the_state_and_a_policy_with_summaries,
    only_the_best_epoch_is_kept_and_loaded,
    a_run_is_listed_and_the_nearest_step_is_taken,
    the_first_step_is_overwritten_on_purpose,
)
