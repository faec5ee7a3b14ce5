"""Step directories as Orbax has them, in the root of a run on a file system: what looks for `ROOT/5/...` finds it.

A view is made of hard links to one attempt's files and of small files of its own. It is no part of the run: nothing
here reads it, and the journal alone says which steps there are. It appears and goes with a rename, and goes with its
attempt, into the trash that it was made with if there is one. Only a directory that was made here, and has its name
still, is ever touched: a copy of one, or one that somebody has renamed, carries our mark, and is theirs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.rules import keys
from orchestrator.rules.records import Head, LiveStep

MARK = ".orchestrator-view"
_MARK_BYTES_MAX = 1 << 16
_BUILDING = ".view-"
_BUILT = re.compile(r"\.view-[0-9a-f]{32}")
_STALE_S = 3600.0  # what a builder that died has left
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@dataclass(frozen=True)
class View:
    """path: the directory. attempt: of which one it is (`attempt_of`). trash: where it goes, below the root; "":
    nowhere."""

    path: Path
    attempt: str
    trash: str


def attempt_of(live: LiveStep) -> str:
    """Names an attempt, and what was saved: a run that was begun again has attempts of the same names."""
    return f"{live.id.label} {live.manifest_crc32c}"


def is_view(path: Path) -> bool:
    about = _mark(path)
    return about is not None and _is_ours(path, about)


def views(root: Path) -> list[View]:
    """Raises OSError."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                path, about = Path(entry.path), _mark(Path(entry.path))
                if about is not None and _is_ours(path, about):
                    found.append(View(path, str(about.get("attempt")), str(about.get("trash", ""))))
    return found


def build(root: Path, name: str, attempt: str, trash: str, fill: Callable[[Path], None]) -> None:
    """Make the view `name`, which `fill` fills, unless something is called so already. Raises OSError."""
    building = root / f"{_BUILDING}{uuid.uuid4().hex}"
    building.mkdir()
    try:
        fill(building)
        _put_mark(building, name, attempt, trash)
        try:
            if not os.path.lexists(root / name):
                os.rename(building, root / name)
        except OSError as error:  # somebody was first
            if error.errno not in _TAKEN:
                raise
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
                _put_mark(path, path.name, attempt, "")
                os.rename(path, root / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def claim(root: Path, name: str, attempt: str, trash: str) -> None:
    """Of a run that was copied whole: its copy of this very attempt's view is a view of the copy. Raises OSError."""
    path = root / name
    about = _mark(path)
    copied = about is not None and (about.get("name"), about.get("attempt")) == (name, attempt)
    if about is not None and copied and not path.is_symlink() and not _is_ours(path, about):
        _put_mark(path, name, attempt, trash)


def prune(root: Path, read_head: Callable[[], Head | None]) -> Head | None:
    """Take away the views of attempts that cannot be restored any more; none where there is no journal to say so.
    `read_head` is asked once the views are known: what it does not list then has been retired, and not committed in
    between. Returns what it has read. Raises OSError, and what `read_head` does."""
    there = views(root)
    head = read_head()
    if head is None:
        return None
    live = {attempt_of(step) for step in head.live if step.restorable}
    for view in there:
        if view.attempt not in live:
            _take_away(root, view)
    with os.scandir(root) as entries:
        for entry in entries:
            if _BUILT.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_S:
                shutil.rmtree(entry.path, ignore_errors=True)
    return head


def _mark(path: Path) -> dict[str, Any] | None:
    """What the directory's mark says; None if it has none that is ours."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(path / MARK, opener=lambda name, _: os.open(name, flags)) as file:
            about = json.loads(file.read(_MARK_BYTES_MAX))
        return about if isinstance(about, dict) else None
    return None


def _is_ours(path: Path, about: dict[str, Any]) -> bool:
    """Whether it is the directory that was marked, under the name that it was given. Any error says no."""
    with contextlib.suppress(OSError):
        return about.get("name") == path.name and about.get("inode") == os.lstat(path).st_ino
    return False


def _put_mark(directory: Path, name: str, attempt: str, trash: str) -> None:
    about = {"attempt": attempt, "trash": trash, "name": name, "inode": os.lstat(directory).st_ino}
    new = directory / f"{MARK}.new"  # never into the file that is there: it may be a link to another run's
    new.write_text(json.dumps(about))
    os.replace(new, directory / MARK)


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
