"""What one step of Orbax's CheckpointManager is made of: its arrays' names, shapes and files, JSON, metrics, iterators.

Any version of Orbax since 0.4. Reads names and JSON, no array data, and changes nothing. What cannot be taken over is
named; nothing is passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from orchestrator import arrays
from orchestrator.arrays.format import orbax_json
from orchestrator.compat import array_items
from orchestrator.errors import Damaged, StorageError, UsageError
from orchestrator.rules import arguments, keys
from orchestrator.rules.records import Json, LeafSpec
from orchestrator.run import orbax_directory
from orchestrator.storage.store_path import AnyPath

DEFAULT = "default"  # Orbax's name for a single, unnamed item
_METRICS = "metrics"
JSON_FILE = "metadata"  # of a JsonSave
_JSON_FILES = (JSON_FILE, "data.json")  # the latter is of the v1 API
_ITERATOR = re.compile(r"process_([0-9]{1,9})-of-[0-9]+\.json")
_OLD_HELP = "restore it with Orbax and save it here, or move it elsewhere"


@dataclass
class OrbaxStep:
    """What one step of Orbax's holds. `files`: name below `state/` -> where it is now. json_files: JSON items whose
    file has another name than Orbax's usual one."""

    leaves: list[LeafSpec] = field(default_factory=list)
    files: dict[str, AnyPath] = field(default_factory=dict)
    json: dict[str, Json] = field(default_factory=dict)
    json_files: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    iterators: dict[int, dict[str, str]] = field(default_factory=dict)
    custom_metadata: dict[str, Json] = field(default_factory=dict)
    single: bool = False
    time: float = 0.0

    @property
    def items(self) -> tuple[str, ...]:
        """What there is, by name."""
        trees = [DEFAULT] if self.single else [leaf.path[0] for leaf in self.leaves]
        iterators = [name for states in self.iterators.values() for name in states]
        return tuple(dict.fromkeys([*trees, *self.json, *iterators, *([_METRICS] if self.metrics else [])]))


def read_step(path: AnyPath, skip: frozenset[str]) -> OrbaxStep:
    """Read what an Orbax step is made of; no array data. Raises UsageError for what cannot be adopted, Damaged naming
    what is not as Orbax leaves it, StorageError."""
    try:
        return _read(path, skip)
    except OSError as error:  # it is being deleted, or may not be read
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: AnyPath, skip: frozenset[str]) -> OrbaxStep:
    known = orbax_directory.metadata(path)
    custom = arguments.plain_json(
        f"{path}/{orbax_directory.STEP_METADATA}: custom_metadata", known.custom_metadata or {}
    )
    found = OrbaxStep(custom_metadata=custom, time=orbax_directory.time_of(path, known))
    items = orbax_json.directories(path, skip)
    if arrays.is_tree(path):  # written by a Checkpointer without items
        items = {DEFAULT: path}
    found.single = items.keys() - {_METRICS} == {DEFAULT}
    for name, directory in items.items():
        _read_item(found, name, directory, known.handler(name))
    if not found.leaves:
        others = [*(name for name in found.json if name != _METRICS), *(found.iterators.get(0) or ())]
        if not others:
            raise UsageError(f"{path}: holds no pytree of arrays that says what it is made of; {_OLD_HELP}")
        found.leaves.append(LeafSpec(path=(others[0],), kind="empty", value="dict"))  # as a save of JSON alone has it
    return found


def _read_item(found: OrbaxStep, name: str, directory: AnyPath, handler: str) -> None:
    files = orbax_json.files_below(directory)
    iterators = {int(named[1]): files[each] for each in files if (named := _ITERATOR.fullmatch(each))}
    item = "" if found.single else name
    if alone := array_items.describe(directory, handler, item, name):
        found.leaves.append(alone)
        _take_files(found, files, item, directory)
    elif arrays.is_tree(directory):
        found.leaves += arrays.describe(directory, item)
        _take_files(found, files, item, directory)
    elif name == _METRICS and _METRICS in files:
        metrics = orbax_json.read(files[_METRICS], dict[str, Json])
        found.metrics = {key: float(each) for key, each in metrics.items() if _is_float(each)}
        rest = {key: each for key, each in metrics.items() if key not in found.metrics}
        if rest:  # not numbers, or trees of them
            found.json[_METRICS] = arguments.plain_json(f"{directory}/{_METRICS}", rest)
    elif file := _json_file(files, handler):
        found.json[name] = arguments.plain_json(f"{directory}/{file}", orbax_json.read(files[file], Json))
        if file != JSON_FILE:
            found.json_files[name] = file
    elif iterators:
        for index, each in iterators.items():
            found.iterators.setdefault(index, {})[name] = orbax_json.read_text(each)
    elif "checkpoint" in files:
        raise UsageError(f"{directory}: of an Orbax that did not write what its trees are made of; {_OLD_HELP}")
    else:
        raise UsageError(
            f"{directory}: item {name!r} is neither a pytree, JSON nor a grain iterator, and cannot be adopted; "
            f"--skip={name} leaves it where it is"
        )


def _take_files(found: OrbaxStep, files: dict[str, AnyPath], item: str, directory: AnyPath) -> None:
    for relative, each in files.items():
        key = keys.check_key(f"{item}/{relative}" if item else relative, str(directory))
        if not arguments.is_utf8(key):
            raise Damaged(f"{directory}: {relative!r} is not UTF-8")
        found.files[key] = each


def _json_file(files: dict[str, AnyPath], handler: str) -> str | None:
    """The file of an item that is JSON. One of another name than Orbax's own counts where nothing else is there, it
    holds an object or a list, and the step names no handler that writes something else."""
    files = {name: path for name, path in files.items() if name != orbax_directory.COMMITTED}
    named = next((name for name in _JSON_FILES if name in files), None)
    if named or len(files) != 1 or (handler and "Json" not in handler):
        return named
    ((name, path),) = files.items()
    if "/" in name:
        return None
    try:
        return name if isinstance(orbax_json.read(path, Json), dict | list) else None
    except Damaged:
        return None


def _is_float(value: Json) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)
