"""Step directories as Orbax has them, in the root of a run on a file system: what looks for `ROOT/5/...` finds it.

A view is made of hard links to one attempt's files and of small files of its own. It is no part of the run: nothing
here reads it, and the journal alone says which steps there are. It appears and goes with a rename, and goes with its
attempt, into the trash that it was made with if there is one. Only directories that carry our mark are ever touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.rules import keys
from orchestrator.rules.records import Head

MARK = ".orchestrator-view"
_BUILDING = ".view-"
_STALE_S = 3600.0  # what a builder that died has left


@dataclass(frozen=True)
class View:
    """path: the directory. attempt: of which step's attempt it is (`step 5 e0001-a01`). trash: where it goes, below
    the root; "": nowhere."""

    path: Path
    attempt: str
    trash: str


def is_view(path: Path) -> bool:
    return (path / MARK).is_file()


def views(root: Path) -> list[View]:
    """Raises OSError."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            mark = os.path.join(entry.path, MARK)
            if entry.is_dir(follow_symlinks=False) and os.path.isfile(mark):
                with contextlib.suppress(ValueError, KeyError, TypeError), open(mark) as file:
                    about = json.load(file)
                    found.append(View(Path(entry.path), str(about["attempt"]), str(about["trash"])))
    return found


def build(root: Path, name: str, attempt: str, trash: str, fill: Callable[[Path], None]) -> None:
    """Make the view `name`, which `fill` fills, unless something is called so already. Raises OSError."""
    building = root / f"{_BUILDING}{uuid.uuid4().hex}"
    building.mkdir()
    try:
        fill(building)
        (building / MARK).write_text(json.dumps({"attempt": attempt, "trash": trash}))
        with contextlib.suppress(FileExistsError):
            if not os.path.lexists(root / name):
                os.rename(building, root / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def build_items(root: Path, attempt: str, fill: Callable[[Path], None]) -> None:
    """As `build`, for a run that is one checkpoint: its items are beside the journal, each a view of its own, but for
    names that are taken. Raises OSError."""
    building = root / f"{_BUILDING}{uuid.uuid4().hex}"
    building.mkdir()
    try:
        fill(building)
        for path in sorted(building.iterdir()):
            if not path.is_dir():
                os.replace(path, root / path.name)
            elif path.name not in keys.AT_ROOT and not os.path.lexists(root / path.name):
                (path / MARK).write_text(json.dumps({"attempt": attempt, "trash": ""}))
                os.rename(path, root / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def prune(root: Path, head: Head | None) -> None:
    """Take away the views of attempts that cannot be restored any more. Raises OSError."""
    live = {step.id.label for step in head.live if step.restorable} if head else set()
    for view in views(root):
        if view.attempt not in live:
            _take_away(root, view)
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(_BUILDING) and time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_S:
                shutil.rmtree(entry.path, ignore_errors=True)


def _take_away(root: Path, view: View) -> None:
    if view.trash:
        folder = root
        for part in keys.check_key(view.trash, str(view.path)).split("/"):
            folder = folder / part
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            if folder.is_symlink():
                raise UsageError(f"{folder}: a symbolic link; what is below a root may have none")
        taken = folder / view.path.name
        if os.path.lexists(taken):  # a step that was saved and removed twice
            taken = folder / f"{view.path.name}.{uuid.uuid4().hex[:8]}"
        os.rename(view.path, taken)
        (taken / MARK).unlink()
        return
    going = root / f"{_BUILDING}{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):  # another process was first
        os.rename(view.path, going)
        shutil.rmtree(going)
