"""One step of a run as a directory of Orbax's: its items, JSON, metrics, iterators and what Orbax knows of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import arrays
from orchestrator.compat import custom_items
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.compat.stored_items import StoredItems, own_states
from orchestrator.errors import UnsafeKey
from orchestrator.rules.chunk_index import StoredFiles
from orchestrator.rules.keys import check_key
from orchestrator.run.orbax_directory import STEP_METADATA

_METRICS = "metrics"
_ARRAY_HANDLER, _KEY_HANDLER = "ArrayCheckpointHandler", "JaxRandomKeyCheckpointHandler"
_KEY = "jax_random_key"  # what the latter calls a key's data in its directory


def fill(
    directory: Path, state: Path, stored: StoredFiles, items: StoredItems, metrics: Any, about: Mapping[str, Any]
) -> None:
    """Fill `directory`, with hard links to the files below `state`, which are `stored`. `about`: what Orbax keeps of a
    step beside its items. Raises OSError, Damaged, Unavailable."""
    for name in items.names:  # of the run's records, and of a caller's Composite
        if "/" in check_key(name, str(state)):
            raise UnsafeKey(f"{state}: item {name!r}: no name for a directory")
    adopted = any(leaf.external for leaf in items.leaves)
    if items.whole or adopted:
        arrays.link_files(state, directory / DEFAULT if items.single else directory, stored.files)
    elif items.trees:
        _write_trees(directory, state, stored, items)
    for name, value in items.json_values.items():
        if name == _METRICS and isinstance(value, dict):  # adopted: what among them is no number
            metrics = {**value, **metrics}
        else:
            write_json(directory / name / items.json_file(name), value)
    if metrics:
        write_json(directory / _METRICS / _METRICS, metrics)
    if items.extra:  # else of a native agent, whose bytes are its own
        for index, body in sorted(items.process_states.items()):
            _own(directory, index, len(items.process_states), own_states(body))
    write_json(directory / STEP_METADATA, about)


def _write_trees(directory: Path, state: Path, stored: StoredFiles, items: StoredItems) -> None:
    handlers = items.extra.get("items") or {}
    random_keys, alone, folders = set(), set(), {}
    for name in items.trees:
        handler = str(handlers.get(name)).rpartition(".")[2]
        if handler == _KEY_HANDLER:
            random_keys.add(name)
        if handler in (_ARRAY_HANDLER, _KEY_HANDLER):
            alone.add(name)
        folders[name] = directory / name / _KEY if handler == _KEY_HANDLER else directory / name
    arrays.write_items(state, stored, items.leaves, folders, alone)
    typed = {leaf.path[0] for leaf in items.leaves if leaf.kind == "key"}
    for name in random_keys:
        write_json(directory / name / f"{_KEY}_metadata" / "metadata", {"typed": name in typed})


def _own(directory: Path, index: int, count: int, own: dict[str, Any]) -> None:
    for name, state in own.items():
        if isinstance(state, dict):
            missing = {path: body for path, body in state.items() if not (directory / name / path).exists()}
            custom_items.unpack(missing, str(directory / name))
        else:
            file = directory / name / f"process_{index}-of-{count}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(state)


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value))
