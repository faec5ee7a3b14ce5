"""More loops in the shapes in which projects call Orbax: what looks into step directories, what restores by args of all
kinds, items of one's own, rollbacks. Run as those of `orbax_loops`."""

import json
import os
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def state():
    return {"a": jnp.arange(8.0), "b": {"c": jnp.ones((2, 3), jnp.bfloat16), "d": jnp.int32(4)}}


def saved(directory, items=None, **options):
    """A directory with step 1."""
    manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))
    manager.save(1, args=ocp.args.PyTreeSave(state()) if items is None else items)
    manager.wait_until_finished()
    return manager


def error_of(call):
    """Which of the classes that programs catch an error has."""
    try:
        call()
    except Exception as error:
        return [kind.__name__ for kind in (ValueError, KeyError, FileNotFoundError) if isinstance(error, kind)]
    return None


def data_goes_on_only_if_its_directory_is_there(directory):
    iterator = numbers()
    for _ in range(5):
        next(iterator)
    save = grain.checkpoint.CheckpointSave(iterator)
    manager = saved(directory, ocp.args.Composite(items=ocp.args.PyTreeSave(state()), iter=save))
    again, more = numbers(), {}
    if (manager.directory / "1" / "iter").exists():
        more["iter"] = grain.checkpoint.CheckpointRestore(again)
    manager.restore(1, args=ocp.args.Composite(items=ocp.args.PyTreeRestore(state()), **more))
    return int(next(again)), sorted(path.name for path in (manager.directory / "1" / "iter").glob("process_*"))


def helpers_that_list_a_directory(directory):
    manager = saved(directory)
    manager.save(4, args=ocp.args.PyTreeSave(state()))
    manager.wait_until_finished()
    found = list(ocp.checkpoint_utils.checkpoints_iterator(directory, timeout=1, timeout_fn=lambda: True))
    newest = ocp.path.step.latest_step_metadata(directory, ocp.path.step.standard_name_format())
    return found, sorted(ocp.utils.checkpoint_steps(directory)), newest.step, newest.path.name


def another_program_reads_the_step_with_plain_orbax(directory):
    items = {"params": ocp.args.StandardSave(state()), "meta": ocp.args.JsonSave({"seed": 3})}
    saved(directory, ocp.args.Composite(**items))
    place = os.path.join(directory, "1", "params")
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state())
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore(os.path.abspath(place), like)
    return found, json.loads((directory / "1" / "meta" / "metadata").read_text())


def retired_steps_are_gone_from_the_directory(directory):
    manager = saved(directory, max_to_keep=2, step_prefix="ckpt", step_format_fixed_length=6)
    for step in (2, 3):
        manager.save(step, args=ocp.args.PyTreeSave(state()))
    manager.wait_until_finished()
    manager.close()
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("ckpt"))


def retired_steps_go_into_a_trash(directory):
    manager = saved(directory, max_to_keep=1, todelete_subdir="trash")
    manager.save(2, args=ocp.args.PyTreeSave(state()))
    manager.wait_until_finished()
    manager.close()
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(os.path.abspath(directory / "trash" / "1" / "default"))
    return sorted(path.name for path in (directory / "trash").iterdir()), found


def restore_args_decide_and_the_item_gives_structure(directory):
    manager = saved(directory)
    restore_args = ocp.checkpoint_utils.construct_restore_args(state())
    zeros = jax.tree.map(lambda _: 0, state())
    by_numbers = manager.restore(1, args=ocp.args.PyTreeRestore(zeros, restore_args=restore_args))
    objects = jax.tree.map(lambda _: object(), state())
    by_objects = manager.restore(1, args=ocp.args.PyTreeRestore(objects, restore_args=restore_args))
    alone = manager.restore(1, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    return by_numbers, by_objects, alone


def restore_args_with_types_of_their_own(directory):
    manager = saved(directory)
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    restore_args = {
        "a": ocp.ArrayRestoreArgs(sharding=sharding, dtype=jnp.float16),
        "b": {"c": ocp.RestoreArgs(restore_type=np.ndarray), "d": ocp.RestoreArgs()},
    }
    found = manager.restore(1, args=ocp.args.PyTreeRestore(state(), restore_args=restore_args))
    return found, str(found["a"].sharding.spec), type(found["b"]["c"]) is np.ndarray


def placeholders_are_left_as_they_are(directory):
    manager = saved(directory)
    restore_args = ocp.checkpoint_utils.construct_restore_args(state())
    item = {"a": ocp.PLACEHOLDER, "b": state()["b"]}
    found = manager.restore(1, args=ocp.args.PyTreeRestore(item, restore_args=restore_args))
    wrong = {"a": ocp.PLACEHOLDER, "b": ocp.PLACEHOLDER}
    return found["a"] is ..., found["b"], error_of(lambda: manager.restore(1, args=ocp.args.PyTreeRestore(wrong)))


def part_of_a_tree_with_restore_args_for_all_of_it(directory):
    manager = saved(directory)
    restore_args = ocp.checkpoint_utils.construct_restore_args(state())
    args = ocp.args.PyTreeRestore({"b": {"d": 0}}, restore_args=restore_args, partial_restore=True)
    strict = ocp.args.PyTreeRestore({"b": {"d": 0}}, restore_args={"b": {"d": ocp.RestoreArgs()}})
    return manager.restore(1, args=args), error_of(lambda: manager.restore(1, args=strict))


def transforms_that_drop_and_rename(directory):
    manager = saved(directory)
    item = {"a": state()["a"]}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    dropped = manager.restore(1, args=ocp.args.PyTreeRestore(item, restore_args=restore_args, transforms={}))
    renamed_item = {"new": state()["a"], "kept": 7}
    rules = {
        "new": ocp.Transform(original_key="a", value_fn=lambda value: value * 2),
        "kept": ocp.Transform(use_fallback=True),
    }
    args = ocp.checkpoint_utils.construct_restore_args(renamed_item)
    renamed = manager.restore(1, args=ocp.args.PyTreeRestore(renamed_item, restore_args=args, transforms=rules))
    return dropped, renamed


def other_shapes_without_strict(directory):
    manager = saved(directory, ocp.args.StandardSave(state()))
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state())
    like["a"] = jax.ShapeDtypeStruct((10,), jnp.float32)
    found = manager.restore(1, args=ocp.args.StandardRestore(like, strict=False))
    return found, error_of(lambda: manager.restore(1, args=ocp.args.StandardRestore(like)))


def save_args_with_a_dtype_and_hints(directory):
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=1 << 20), state())
    save_args["a"] = ocp.SaveArgs(dtype=jnp.dtype(jnp.bfloat16))
    manager = saved(directory, ocp.args.PyTreeSave(state(), save_args=save_args))
    return manager.restore(1), saved(directory / "plain", ocp.args.StandardSave(state(), save_args=None)).restore(1)


def typed_keys(directory):
    tree = {"key": jax.random.key(3), "w": jnp.ones(2)}
    manager = saved(directory, ocp.args.StandardSave(tree))
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    found = manager.restore(1, args=ocp.args.StandardRestore(like))
    return jax.random.key_data(found["key"]), str(jax.random.key_impl(found["key"])), found["w"]


def sharded_arrays_without_a_target(directory):
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    manager = saved(directory, ocp.args.StandardSave({"w": jax.device_put(jnp.arange(16.0), sharding)}))
    found = manager.restore(1)
    return found, str(found["w"].sharding.spec), len(found["w"].sharding.device_set)


class NotesHandler(ocp.CheckpointHandler):
    """A handler of one's own."""

    def save(self, directory, args):
        (directory / "notes.txt").write_text(args.text)

    def restore(self, directory, args=None):
        return (directory / "notes.txt").read_text() + (args.ending if args else "")


@ocp.args.register_with_handler(NotesHandler, for_save=True)
class NotesSave(ocp.args.CheckpointArgs):
    def __init__(self, text):
        self.text = text


@ocp.args.register_with_handler(NotesHandler, for_restore=True)
class NotesRestore(ocp.args.CheckpointArgs):
    def __init__(self, ending="!"):
        self.ending = ending


def handlers_of_ones_own(directory):
    manager = saved(directory, ocp.args.Composite(state=ocp.args.StandardSave(state()), notes=NotesSave("n")))
    args = ocp.args.Composite(state=ocp.args.StandardRestore(state()), notes=NotesRestore("?"))
    found = manager.restore(1, args=args)
    with ocp.CheckpointManager(directory, item_handlers={"notes": NotesHandler()}) as again:
        alone = again.restore(1, args=ocp.args.Composite(notes=NotesRestore()))
    return found.state, found.notes, alone.notes, (directory / "1" / "notes" / "notes.txt").read_text()


def steps_of_json_alone(directory):
    manager = saved(directory, ocp.args.JsonSave({"a": [1, {"b": None}]}))
    manager.save(2, args=ocp.args.JsonSave({"a": 2}))
    manager.wait_until_finished()
    return manager.restore(1), manager.restore(2, args=ocp.args.JsonRestore()), list(manager.all_steps())


def steps_of_an_iterator_alone(directory):
    iterator = numbers()
    next(iterator)
    manager = saved(directory, ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    again = numbers()
    manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    return int(next(again))


def the_newest_step_is_deleted_and_saved_again(directory):
    manager = saved(directory)
    for step in (2, 3):
        manager.save(step, args=ocp.args.PyTreeSave(state()))
    manager.wait_until_finished()
    manager.delete(3)
    after = list(manager.all_steps()), manager.latest_step()
    again = manager.save(3, args=ocp.args.PyTreeSave({"a": jnp.zeros(1)}), force=True)
    manager.wait_until_finished()
    return after, again, list(manager.all_steps()), manager.restore(3)


def nested_metrics(directory):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda each: each["eval"]["loss"], best_mode="min")
    manager = ocp.CheckpointManager(directory, options=options)
    for step, loss in enumerate([3.0, 1.0, 2.0, 0.5]):
        metrics = {"eval": {"loss": loss, "n": 3}, "name": "x", "/odd": 1}
        manager.save(step, args=ocp.args.StandardSave(state()), metrics=metrics)
    manager.wait_until_finished()
    return list(manager.all_steps()), manager.best_step(), manager.metrics(3)


def metadata_of_root_steps_and_items(directory):
    manager = ocp.CheckpointManager(directory, metadata={"run": "a", "n": {"b": 1}})
    manager.save(1, args=ocp.args.StandardSave(state()), custom_metadata={"lr": 0.1}, metrics={"loss": 2.0})
    manager.close()
    with ocp.CheckpointManager(directory, metadata={"run": "other"}) as again:
        again.restore(1)
        about = again.metadata(1)
        tree = jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), again.item_metadata(1).tree)
        return (
            again.metadata(),
            about.custom_metadata,
            about.commit_timestamp_nsecs > 1e18,
            jax.tree.leaves(tree, is_leaf=lambda each: isinstance(each, tuple)),
        )


def errors_have_the_classes_that_programs_catch(directory):
    manager = saved(directory, ocp.args.StandardSave(state()))
    args = ocp.args
    wrong = {"a": jnp.zeros(9), "b": state()["b"]}
    return (
        error_of(lambda: manager.restore(7)),
        error_of(lambda: manager.restore(1, args=args.StandardRestore({**state(), "more": jnp.ones(1)}))),
        error_of(lambda: manager.restore(1, args=args.StandardRestore(wrong))),
        error_of(lambda: manager.save(1, args=args.StandardSave(state()), force=True)),
        error_of(lambda: manager.save(2, args=args.Composite(other=args.StandardSave(state())))),
        error_of(lambda: manager.save(3, args.StandardSave(state()))),
        error_of(lambda: ocp.CheckpointManager(directory / "new").restore(None)),
    )


def older_kwargs(directory):
    restore_args = ocp.checkpoint_utils.construct_restore_args(state())
    with ocp.CheckpointManager(directory, {"state": ocp.PyTreeCheckpointer()}) as manager:
        manager.save(1, {"state": state()})
        kwargs = {"state": {"restore_args": restore_args}}
        found = manager.restore(1, {"state": state()}, restore_kwargs=kwargs)
    return dict(found)


def continuously_and_synchronously(directory):
    policy = ocp.checkpoint_managers.ContinuousCheckpointingPolicy(minimum_interval_secs=1)
    options = ocp.CheckpointManagerOptions(save_decision_policy=policy, enable_async_checkpointing=False)
    started = []
    with ocp.CheckpointManager(directory, options=options) as manager:
        started.append(manager.save(0, args=ocp.args.StandardSave(state())))
        started.append(manager.save(1, args=ocp.args.StandardSave(state())))
        time.sleep(1.1)
        started.append(manager.save(2, args=ocp.args.StandardSave(state())))
    return started


def a_directory_is_made_and_another_one_is_read(directory):
    other = saved(directory / "pretrained")
    manager = ocp.CheckpointManager(directory / "new")
    there = (directory / "new").is_dir()
    return there, manager.restore(1, args=ocp.args.PyTreeRestore(state()), directory=other.directory)


def a_name_format_of_orbax(directory):
    names = ocp.path.step.standard_name_format(step_prefix="step", step_format_fixed_length=4)
    manager = saved(directory, step_name_format=names)
    again = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(step_name_format=names))
    return list(again.all_steps()), names.find_step(directory, 1).path.name, manager.latest_step()


LOOPS = (
    data_goes_on_only_if_its_directory_is_there,
    helpers_that_list_a_directory,
    another_program_reads_the_step_with_plain_orbax,
    retired_steps_are_gone_from_the_directory,
    retired_steps_go_into_a_trash,
    restore_args_decide_and_the_item_gives_structure,
    restore_args_with_types_of_their_own,
    placeholders_are_left_as_they_are,
    part_of_a_tree_with_restore_args_for_all_of_it,
    transforms_that_drop_and_rename,
    other_shapes_without_strict,
    save_args_with_a_dtype_and_hints,
    typed_keys,
    sharded_arrays_without_a_target,
    handlers_of_ones_own,
    steps_of_json_alone,
    steps_of_an_iterator_alone,
    the_newest_step_is_deleted_and_saved_again,
    nested_metrics,
    metadata_of_root_steps_and_items,
    errors_have_the_classes_that_programs_catch,
    older_kwargs,
    continuously_and_synchronously,
    a_directory_is_made_and_another_one_is_read,
    a_name_format_of_orbax,
)
