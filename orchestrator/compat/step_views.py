"""The steps of a run as directories of Orbax's, beside the journal, for whatever looks into them: `ROOT/5/iter`,
`checkpoint_utils.checkpoints_iterator`, `utils.checkpoint_steps`, plain Orbax in another program. On a file system.

They are made when a step is committed, and again when a manager opens the directory, for steps of native agents and
after a crash. What cannot be made is logged: no save is lost for it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from absl import logging

from orchestrator.arrays.format import orbax_api
from orchestrator.compat import step_directories
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.stored_steps import StoredSteps
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.rules import chunk_index, journal, keys
from orchestrator.rules.records import LiveStep
from orchestrator.run import orbax_views
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_directory import V1_MARK
from orchestrator.storage import local_path
from orchestrator.texts import printable

WAIT_S = 10.0  # for process 0 to have made a directory
_POLL_S = 0.02


class StepViews:
    """Process 0's. `options`: Orbax's, which say how step directories are called and whether there is a trash.
    `single`: the root is the directory of the only step, as `save` of Orbax's v1 makes one. Raises UsageError for a
    trash that is not below the root."""

    def __init__(self, store: JournalStore, stored: StoredSteps, options: Any, *, single: bool = False) -> None:
        self._store, self._stored, self._single = store, stored, single
        root = local_path(store.url)
        self._root = Path(root) if root is not None else None
        self._format = orbax_api.step_names(options)
        trash = str(options.todelete_subdir or getattr(options, "todelete_full_path", None) or "").strip("/")
        first, *rest = trash.split("/")
        if trash and (not {"", ".", ".."}.isdisjoint((first, *rest)) or first.isdecimal() or first in keys.AT_ROOT):
            ours = ", ".join(sorted(keys.AT_ROOT))
            raise UsageError(
                f"CheckpointManagerOptions: {trash!r}: give a name below the run's root that is no step's, and none of "
                f"the run's own ({ours})"
            )
        self._trash = trash
        self._given_up = False

    def refresh(self) -> None:
        """Make the views that are missing, and take away those of steps that are gone. Any thread."""
        if self._root is None or not self._root.is_dir():
            return
        try:
            head = orbax_views.prune(self._root, self._store.head)
            there = {view.attempt for view in orbax_views.views(self._root)}
        except (OrchestratorError, OSError) as error:
            logging.warning("%s: step directories for Orbax are not up to date: %s", self._store.url, error)
            return
        for live in head.live if head else ():
            if live.restorable and orbax_views.attempt_of(live) not in there:
                try:
                    self._build(self._root, live)
                except Exception as error:  # whatever a step holds: those of the others are made, and training goes on
                    what = f"{type(error).__name__}: {error}"
                    logging.warning("%s: no step directory for Orbax: %s", live.id.label, printable(what))

    def wait_for_newest(self) -> None:
        """Until the newest step's directory, which process 0 makes after the commit, is there. After WAIT_S it is
        logged, and this object waits for none again: here they cannot be made, or another file system is looked at."""
        end = time.monotonic() + (0.0 if self._given_up else WAIT_S)
        while self._root is not None and time.monotonic() < end:
            try:
                head = self._store.head()
                newest = journal.newest(head) if head else None
                there = {view.attempt for view in orbax_views.views(self._root)}
            except (OrchestratorError, OSError) as error:
                logging.warning("%s: step directories for Orbax cannot be looked for: %s", self._store.url, error)
                return
            if newest is None or orbax_views.attempt_of(newest) in there:
                return
            time.sleep(_POLL_S)
        if self._root is not None and not self._given_up:
            self._given_up = True
            logging.warning("%s: the newest step has no directory after %g s", self._store.url, WAIT_S)

    def _build(self, root: Path, live: LiveStep) -> None:
        name, attempt = self._format.build_name(live.step), orbax_views.attempt_of(live)
        if os.path.lexists(root / name) and not self._single:  # Orbax's own, adopted where it is
            orbax_views.claim(root, name, attempt, self._trash)
            return
        items = self._stored.items(live)

        def fill(directory: Path) -> None:
            self._fill(directory, live, items)

        if self._single:
            orbax_views.build_items(root, attempt, fill)
            return
        orbax_views.build(root, name, attempt, self._trash, fill)

    def _fill(self, directory: Path, live: LiveStep, items: StoredItems) -> None:
        assert self._root is not None
        stored = chunk_index.stored(self._store.step(live).manifest)
        about = self._stored.step_metadata(live, items)
        state = self._root / live.id.state_prefix
        step_directories.fill(directory, state, stored, items, self._stored.metrics_tree(live), about)
        if self._single:
            (directory / V1_MARK).touch()
