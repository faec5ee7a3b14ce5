"""Directories of Orbax's CheckpointManager: which steps they hold, and whether a run may be opened beside them.

Any version of Orbax since 0.4. Reads names and the time of a step, and changes nothing. What looks like a step and
cannot be read as one is named; nothing is passed over.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.arrays.format import orbax_json
from orchestrator.errors import Damaged, StorageError, UsageError
from orchestrator.rules import arguments, keys
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_views import is_view
from orchestrator.storage import local_path
from orchestrator.storage.port import Reads
from orchestrator.storage.store_path import AnyPath, StorePath

STEP_METADATA = "_CHECKPOINT_METADATA"  # since 0.5.1; on a file system a step is finished once it has its name
COMMITTED = "commit_success.txt"  # what Orbax leaves in a step, and in an item, that it could not rename
V1_MARK = "orbax.checkpoint"  # an empty file in what the v1 API writes
# With CheckpointManagerOptions(step_prefix=..., step_format_fixed_length=...). What a save has not finished is called
# otherwise, and is none of ours.
_STEP = re.compile(r"(?:(.*)_)?([0-9]+)")
# Files that only Orbax, or Flax by it, leaves in a step that does not say what its trees are made of.
_MARKS = ("_sharding", "checkpoint", "default/checkpoint", "manifest.ocdbt", COMMITTED)
_FIRST = (STEP_METADATA, COMMITTED, "checkpoint", "default/_METADATA")  # of a step's keys, in their order
_JSON_ITEMS = (["metadata"], ["metrics"])
_NAMES_MAX = 1000  # at the root of a store, looked at


@dataclass(frozen=True)
class OrbaxDirectory:
    """steps: those that can be read, by number. strange: what is called like a step and is nothing that we know."""

    steps: dict[int, AnyPath]
    strange: tuple[AnyPath, ...]


def survey(base: AnyPath, known: frozenset[int] = frozenset(), prefix: str | None = None) -> OrbaxDirectory:
    """The finished steps in a directory of Orbax's, and what may be some. `known`: the run's steps. `prefix`: only
    those that are called so (`ckpt` of `ckpt_10`; "": without any); None: all.

    Trees that stand alone (Flax's steps, but also exports) are steps where there are no others; beside a run's own,
    only if it has one of them. Raises UsageError where two are of one number, or one of a number that no run here can
    have; StorageError.
    """
    found: list[tuple[int, AnyPath]] = []
    strange: list[AnyPath] = []
    try:
        for name in _directories(base):
            path, named = base / name, _STEP.fullmatch(name)
            if named and prefix not in (None, named[1] or ""):
                continue
            if named and is_step(path):
                found.append((int(named[2]), path))
            elif named and (named[1] is None or any((path / mark).exists() for mark in _MARKS)):
                strange.append(path)
        managed = [(number, path) for number, path in found if not _stands_alone(path)]
    except (FileNotFoundError, NotADirectoryError):  # of `base`; what vanishes meanwhile is not there
        return OrbaxDirectory({}, ())
    except OSError as error:
        raise StorageError(f"{base}: cannot be searched for steps: {error.strerror or error}") from error
    alone = found if not known or any(number in known for number, _ in found) else []
    return OrbaxDirectory(_by_number(base, managed or alone), tuple(strange))


def _directories(base: AnyPath) -> list[str]:
    """The names of those that may be steps of Orbax's own. Raises OSError."""
    if isinstance(base, StorePath):
        return sorted(each.name for each in base.iterdir() if each.is_dir())
    with os.scandir(base) as entries:
        there = [entry for entry in entries if entry.is_symlink() or entry.is_dir()]
        of_run = _has_journal(base)  # without it, views are all that is left of the steps
        return sorted(entry.name for entry in there if not (of_run and is_view(Path(entry.path))))


def _has_journal(base: AnyPath) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return any((base / keys.JOURNAL).iterdir())
    return False


def _by_number(base: AnyPath, found: Iterable[tuple[int, AnyPath]]) -> dict[int, AnyPath]:
    steps: dict[int, AnyPath] = {}
    for number, path in found:
        if number in steps:
            raise UsageError(
                f"{base}: {steps[number].name} and {path.name} are both step {number}; adopt those of one prefix "
                f"into another run (`orchestrator adopt OTHER_ROOT --from={shlex.quote(str(base))} --prefix=...`), or "
                "move one elsewhere"
            )
        if number > arguments.STEP_MAX:
            raise UsageError(f"{path}: steps are at most {arguments.STEP_MAX} here; move it elsewhere")
        steps[number] = path
    return steps


def number_of(name: str) -> int | None:
    """The number of the step that is called so; None for what is not called like a step."""
    named = _STEP.fullmatch(name)
    return int(named[2]) if named else None


def prefix_of(name: str) -> str:
    named = _STEP.fullmatch(name)
    return (named[1] or "") if named else ""


def is_step(path: AnyPath) -> bool:
    """Whether this is a step that says what it holds. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        below: list[AnyPath] = list(path.iterdir())
        if (path / STEP_METADATA).exists() or any(map(_says_its_tree, (path, *below))):
            return True
        # Of JSON alone, by a version that wrote nothing else: nothing but items that are one such file each.
        items = [each for each in below if each.name != COMMITTED]
        return bool(items) and all(map(_is_json_item, items))
    return False


def is_checkpoint(path: AnyPath) -> bool:
    """Whether a directory is one step, and holds none, by the files in it."""
    return (path / STEP_METADATA).is_file() or _says_its_tree(path)


def _is_json_item(path: AnyPath) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    return [each.name for each in path.iterdir() if each.name != COMMITTED] in _JSON_ITEMS


def _says_its_tree(path: AnyPath) -> bool:
    return (path / "_METADATA").exists()


def _stands_alone(path: AnyPath) -> bool:
    """Whether it was saved by a Checkpointer, or exported, under a name of its own: no manager's step."""
    return not path.name.isdecimal() and _says_its_tree(path)


def finished_s(path: AnyPath) -> float:
    """When a step was finished, as far as its directory tells, in seconds since 1970. Raises StorageError."""
    try:
        return time_of(path, metadata(path))
    except (Damaged, UsageError):
        return time_of(path, orbax_json.StepMetadata())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def metadata(path: AnyPath) -> orbax_json.StepMetadata:
    """What Orbax knew of a step; nothing in those of old versions."""
    file = path / STEP_METADATA
    there = file.exists() or file.is_symlink()
    return orbax_json.read(file, orbax_json.StepMetadata) if there else orbax_json.StepMetadata()


def is_finished(path: AnyPath) -> bool:
    """On a file system a step has its name once it is whole; in a store, where a name cannot change, this object."""
    return not isinstance(path, StorePath) or (path / COMMITTED).is_file()


def time_of(path: AnyPath, known: orbax_json.StepMetadata) -> float:
    """0 where nobody knows. Raises OSError, StorageError."""
    said_s = (known.commit_timestamp_nsecs or 0) / 1e9
    if isinstance(path, StorePath):
        return said_s or (path / COMMITTED).stored_s()
    return said_s or os.lstat(path).st_mtime


def in_store(storage: Reads, newest: int) -> tuple[str, ...]:
    """The names at the root of an object store that are called like steps above `newest` (-1: of no run). Of a run's
    root only those that begin with a digit, as nothing of ours does; else each name is one request."""
    found: list[str] = []
    start = "" if newest < 0 else "0"
    for _ in range(_NAMES_MAX):
        key = next((entry.key for entry in storage.list("", start)), None)
        if key is None or (newest >= 0 and key[0] > "9"):
            break
        name, slash, rest = key.partition("/")
        named = _STEP.fullmatch(name) if slash else None
        if named and int(named[2]) > newest and (named[1] is None or rest in _FIRST):
            found.append(name)
        start = name + chr(ord("/") + 1) if slash else key + "\0"
    return tuple(found)


def unadopted(store: JournalStore, head: Head | None) -> str | None:
    """What is to be said to whoever opens a root that holds steps of Orbax's which the run does not know: `head` would
    be taken for all there is, and training would begin at step 0 or go on from an older step. None if there are none.

    Where the run has steps, those of Orbax's count that were finished after its newest: the others have been adopted
    and retired since, or were left behind. Changes nothing. Raises StorageError, UsageError where names are in doubt.
    """
    root = local_path(store.url)
    newest = max((live.step for live in head.live), default=-1) if head else -1
    if root is None:
        found = in_store(store.storage, newest)
        return _in_store_words(store.url, found) if found else None
    known = frozenset(live.step for live in head.live) if head else frozenset()
    there = survey(Path(root), known)
    newest_s = max((live.time for live in head.live), default=0.0) if head else 0.0

    def is_newer(path: AnyPath) -> bool:
        return finished_s(path) > newest_s

    strange = [path.name for path in there.strange if is_newer(path)]
    if strange:
        return elsewhere(root, strange)
    steps = sorted(step for step, path in there.steps.items() if step not in known and is_newer(path))
    if not steps:
        return None
    if steps[-1] > newest:
        way_out = f"take them over with `orchestrator adopt {shlex.quote(root)}`, or use another directory"
    else:
        way_out = (
            f"the run has step {newest}. Move Orbax's elsewhere to go on from there, or make a run of them with "
            f"`orchestrator adopt OTHER_ROOT --from={shlex.quote(root)}`"
        )
    return f"{root}: holds {len(steps)} steps of Orbax's own (newest {steps[-1]}), not in the run; {way_out}"


def _in_store_words(url: str, names: Sequence[str]) -> str:
    root = shlex.quote(url)
    return (
        f"{url}: holds {_some(names)}, named like steps of Orbax's, not in the run; take them over with `orchestrator "
        f"adopt {root}` (--dry_run says what each is), delete what Orbax has not finished, or use another prefix"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def elsewhere(url: str, names: Sequence[str]) -> str:
    return (
        f"{url}: holds {_some(names)}, named like steps of Orbax's, which cannot be taken over; restore them with "
        "Orbax and save them here, or move them elsewhere, or use another directory"
    )
