"""`save`, `load` and the like of `orbax.checkpoint.v1`: one checkpoint at a path. It is a run of ours with one step; a
path of a step, as a Checkpointer's directory has them on a file system, is that step of its run.

A save that fails raises: nobody tries it again. What plain Orbax has written is not loaded, as nothing here would
notice damage in it; adopt it, or use `orbax.checkpoint.v1` itself.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.arrays.format import orbax_api, orbax_v1
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.v1 import items, settings
from orchestrator.compat.v1.older_names import older_name
from orchestrator.compat.v1.responses import SaveResponse
from orchestrator.compat.v1.steps import Steps
from orchestrator.errors import StepNotFound, UsageError
from orchestrator.rules import keys
from orchestrator.rules.records import Json
from orchestrator.run import orbax_directory, orbax_views
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_directory import COMMITTED, STEP_METADATA, V1_MARK
from orchestrator.storage import local_path, open_storage
from orchestrator.storage.port import Storage

_STEP = 0  # of the only one in a checkpoint's run


class NoCheckpoint(StepNotFound, FileNotFoundError, orbax_v1.InvalidLayoutError):  # type: ignore[misc,valid-type]
    """There is no checkpoint at the path. Orbax raises InvalidLayoutError, a ValueError."""


class _Single(Steps):
    _single = True


def save(path: str | os.PathLike[str], state: Any, **given: Any) -> None:
    """`save_async`, waited for. Raises SaveFailed, too."""
    save_async(path, state, **given).result()


def save_checkpointables(path: str | os.PathLike[str], checkpointables: dict[str, Any], **given: Any) -> None:
    save_checkpointables_async(path, checkpointables, **given).result()


def save_async(
    path: str | os.PathLike[str], state: Any, *, checkpointable_name: str = orbax_v1.STATE, **given: Any
) -> SaveResponse[None]:
    """Save a pytree at `path`, in the background. What `save_checkpointables_async` takes by name, this takes, too."""
    items.check_state(state)
    return save_checkpointables_async(path, {checkpointable_name: state}, **given)


def save_checkpointables_async(
    path: str | os.PathLike[str],
    checkpointables: dict[str, Any],
    *,
    overwrite: bool = False,
    custom_metadata: Mapping[str, Json] | None = None,
) -> SaveResponse[None]:
    """Save objects by name at `path`, in the background. `overwrite`: the checkpoint there is replaced once the new one
    is committed. Main thread, all processes; `result` on the main thread, too: there it leaves the run.
    Raises UsageError (a ValueError) for what is there already, and for what cannot be saved."""
    about = orbax_v1.context()
    options = settings.manager_options(about)
    args = items.to_save(checkpointables, about)
    _check_free(os.fspath(path))
    steps = _Single(path, options=options)
    others = [step for step in steps.all_steps() if step != _STEP]
    if others:
        raise UsageError(f"{path}: is a run with steps {others[:3]}; save to it with training.Checkpointer")
    if _STEP in steps and not overwrite:
        raise UsageError(f"{path}: there is a checkpoint already; overwrite=True replaces it")

    response = SaveResponse[None](steps.close, None, lambda: steps.is_saving(_STEP))
    more = {"custom_metadata": custom_metadata, "on_commit": response.committed}
    steps.save_items(_STEP, args, force=True, overwrite=overwrite, **more)  # type: ignore[arg-type]
    return response


def _check_free(path: str) -> None:
    """Raises UsageError for a directory that holds something else: it would not be replaced."""
    root = local_path(path)
    if root is None:
        there = _objects(open_storage(path))
    elif os.path.isdir(root) and not os.path.isdir(os.path.join(root, "journal")):
        there = sorted(os.listdir(root))[:3]
    else:
        return
    if there:
        raise UsageError(
            f"{path}: holds {', '.join(there)}, which is no checkpoint of ours; delete it, or give another"
        )


def _objects(storage: Storage) -> list[str]:
    """Names of some objects, where no run is."""
    if next(storage.list(keys.JOURNAL), None) is not None:
        return []
    return [entry.key for entry in itertools.islice(storage.list(""), 3)]


def load(
    path: str | os.PathLike[str], abstract_state: Any = None, *, checkpointable_name: str | None = items.AUTO
) -> Any:
    """The pytree at `path`, into `abstract_state` if that is given.

    Raises InvalidLayoutError where there is none, Mismatch naming each leaf that does not fit, Damaged."""
    about = orbax_v1.context()
    steps, step = _open(path, about)
    stored = steps.stored(step)
    name = items.tree_name(stored, checkpointable_name)
    return steps.load_items(step, stored, {name: items.abstract_of(abstract_state)}, about)[name]


def load_checkpointables(path: str | os.PathLike[str], abstract_checkpointables: Any = None) -> dict[str, Any]:
    """The objects at `path` by name, each into its abstract twin (None: as it was saved); without any, all there are.
    Raises as `load`, and a KeyError for a name that is not there."""
    about = orbax_v1.context()
    steps, step = _open(path, about)
    stored = steps.stored(step)
    return steps.load_items(step, stored, items.given_or_all(stored, abstract_checkpointables), about)


def metadata(path: str | os.PathLike[str], checkpointable_name: str | None = items.AUTO) -> Any:
    """Of the pytree that `load` takes: abstract arrays in the structure of what was saved."""
    about = orbax_v1.context()
    steps, step = _open(path, about)
    stored = steps.stored(step)
    return _metadata(path, steps, stored, items.tree_name(stored, checkpointable_name))


def checkpointables_metadata(path: str | os.PathLike[str]) -> Any:
    """Of all objects, by name; what a handler says of its own, None where nothing is known."""
    steps, step = _open(path, orbax_v1.context())
    return _metadata(path, steps, steps.stored(step), None)


def _metadata(path: Any, steps: Steps, stored: StoredItems, name: str | None) -> Any:
    found = steps.describe(stored, orbax_v1.context())
    return orbax_v1.described(
        "CheckpointMetadata",
        path=orbax_api.path(os.fspath(path)),
        metadata=found.metadata if name is None else found.metadata[name],
        init_timestamp_nsecs=found.time_ns,
        commit_timestamp_nsecs=found.time_ns,
        custom_metadata=found.custom_metadata,
    )


def is_orbax_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `load` finds a checkpoint at `path`."""
    try:
        _find(os.fspath(path))
    except (NoCheckpoint, UsageError):
        return False
    return True


def _open(path: str | os.PathLike[str], about: Any) -> tuple[Steps, int]:
    root, step = _find(os.fspath(path))
    options = settings.manager_options(about, read_only=True, create=False, save_interval_steps=0)
    return Steps(root, options=options), step


def _find(path: str) -> tuple[str, int]:
    """The run and the step that are meant. Raises NoCheckpoint, UsageError for what plain Orbax has written."""
    path = path.rstrip("/")
    store = JournalStore(open_storage(path), writer="compat")
    head = store.head()
    newest = store.newest(head) if head else None
    if newest is not None:
        return path, newest.step
    above, _, name = path.rpartition("/")
    local = local_path(path)
    number = orbax_directory.number_of(name)
    if above and head is None and (local is not None or number is not None):
        label = _view(Path(local)) if local is not None else ""
        within = JournalStore(open_storage(above), writer="compat").head() if label or local is None else None
        for live in within.live if within else ():
            if live.restorable and (orbax_views.attempt_of(live) == label or (not label and live.step == number)):
                return above, live.step
    if _is_theirs(path):
        raise UsageError(
            f"{path}: was written by Orbax itself; load it with orbax.checkpoint.v1 and save it here, or, if it is a "
            "step, run `orchestrator adopt` on the directory above"
        )
    raise NoCheckpoint(f"{path}: no checkpoint is there")


def _is_theirs(path: str) -> bool:
    """Whether plain Orbax has written a checkpoint there."""
    local = local_path(path)
    if local is not None:
        return os.path.isdir(local) and bool(orbax_v1.public("is_orbax_checkpoint")(local))
    storage = open_storage(path)
    return any(storage.measure(name) is not None for name in (STEP_METADATA, V1_MARK, COMMITTED))


def _view(path: Path) -> str:
    """Which attempt the step directory at `path` shows; "" for what is none."""
    if not orbax_views.is_view(path) or not (path / STEP_METADATA).exists():
        return ""
    return next((view.attempt for view in orbax_views.views(path.parent) if view.path == path), "")


def load_async(path: Any, *given: Any, **named: Any) -> Any:
    raise NotImplementedError("load_async: use load")


def load_checkpointables_async(path: Any, *given: Any, **named: Any) -> Any:
    raise NotImplementedError("load_checkpointables_async: use load_checkpointables")


save_pytree = older_name(save)
save_pytree_async = older_name(save_async)
load_pytree = older_name(load)
load_pytree_async = older_name(load_async)
pytree_metadata = older_name(metadata)
