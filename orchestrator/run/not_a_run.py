"""What is at a root that is not a run's, for people: mostly the path is wrong, and the right one near. Reads names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from orchestrator.rules import keys
from orchestrator.storage import local_path, open_storage
from orchestrator.storage.port import Reads

_PARENTS_MAX = 8
_NAMES_MAX = 1000
_SHOWN = 3
_FOLDERS_MAX = 20


def explanation(storage: Reads, url: str) -> str:
    """Whether it is missing, a file, empty or part of a run, and which run was probably meant. Raises StorageError."""
    path = local_path(url)
    found = _bucket(storage, url) if path is None else _directory(path)
    return f"{url}: not a run: {found}"


def _directory(path: str) -> str:
    above = [os.path.dirname(path)]
    while len(above) < _PARENTS_MAX and above[-1] != os.path.dirname(above[-1]):
        above.append(os.path.dirname(above[-1]))
    if run := next(filter(_is_run, above), ""):
        return f"it is inside the run {run}; give that instead"
    if not os.path.lexists(path):
        near = difflib.get_close_matches(os.path.basename(path), _names(above[0]), 1)
        return "there is no such directory" + (f"; did you mean {os.path.join(above[0], near[0])}?" if near else "")
    if not os.path.isdir(path):
        return "it is a file, and a run is a directory"
    names = _names(path)
    if runs := [name for name in names if _is_run(os.path.join(path, name))]:
        return _of_runs(runs)
    return "the directory has no journal/ in it" if names else "the directory is empty"


def _of_runs(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it is a directory of runs, of which one must be given: {', '.join(names[:_SHOWN])}{more}"


def _is_run(path: str) -> bool:
    return bool(_names(os.path.join(path, keys.JOURNAL)))


def _names(path: str) -> list[str]:
    """Of what is in a directory, as far as that can be read."""
    try:
        return sorted(os.listdir(path))[:_NAMES_MAX]
    except OSError:
        return []


def _bucket(storage: Reads, url: str) -> str:
    scheme, _, rest = url.partition("://")
    parts = rest.strip("/").split("/")
    for end in range(len(parts) - 1, max(0, len(parts) - _PARENTS_MAX), -1):
        above = f"{scheme}://{'/'.join(parts[:end])}"
        if end > 1 and _has(open_storage(above), keys.JOURNAL):
            return f"it is inside the run {above}; give that instead"
    if _has(storage, ""):
        runs = [name for name in _folders(storage) if _has(storage, f"{name}/{keys.JOURNAL}")]
        return _of_runs(runs) if runs else "there are objects, but no journal/"
    if len(parts) <= 2:  # beside it is the whole bucket
        return "there are no objects below this name"
    beside = open_storage(f"{scheme}://{'/'.join(parts[:-1])}")
    if next((True for entry in beside.list(parts[-1]) if entry.key == parts[-1]), False):
        return "it is an object, and a run is a name with objects below it"
    near = difflib.get_close_matches(parts[-1], _folders(beside), 1)
    hint = f"; did you mean {scheme}://{'/'.join([*parts[:-1], near[0]])}?" if near else ""
    return f"there are no objects below this name{hint}"


def _folders(storage: Reads) -> list[str]:
    """Those of the first few names that have objects below them; one request each, for plain objects, too."""
    found: list[str] = []
    start = ""
    for _ in range(_FOLDERS_MAX):
        entry = next(iter(storage.list("", start)), None)
        if entry is None:
            break
        name, slash, _ = entry.key.partition("/")
        found += [name] if slash else []
        start = f"{name}0" if slash else f"{name}!"  # past all that begins with `name/`; past the object itself
    return found


def _has(storage: Reads, prefix: str) -> bool:
    return next(iter(storage.list(prefix)), None) is not None
