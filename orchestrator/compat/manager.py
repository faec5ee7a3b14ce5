"""A CheckpointManager with Orbax's (0.12.8) methods, arguments and results, kept by an agent. Its face: `compat`.

What has no counterpart here is rejected by name, when the manager is made or the item is saved. Main thread, all
processes in the same order, as with `Agent`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from absl import logging

from orchestrator import policy
from orchestrator.agent import Agent
from orchestrator.arrays.format import orbax_api
from orchestrator.compat import orbax_items, orbax_options
from orchestrator.compat.adopt import EXTRA
from orchestrator.compat.orbax_items import Saved
from orchestrator.compat.orbax_options import Info
from orchestrator.errors import Damaged, StepNotFound, UsageError
from orchestrator.job.read_step import ReadOptions
from orchestrator.job.rendezvous import connect
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.job.rounds import Round, agree
from orchestrator.job.startup import meet
from orchestrator.rules import arguments, configuration, journal
from orchestrator.rules.records import Head, Json, LiveStep
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_steps import DEFAULT, unadopted
from orchestrator.storage import open_storage
from orchestrator.storage.port import Storage
from orchestrator.storage.read_only import ReadOnlyStorage

# What process 0 says to all: (step, time, metrics) of each restorable step; the step whose save has failed, and the one
# that is being saved.
_STEPS: Round[list[tuple[int, float, dict[str, float]]]] = Round(
    "steps of the run", list[tuple[int, float, dict[str, float]]]
)
_SAVING: Round[tuple[int | None, int | None]] = Round("has it failed?", tuple[int | None, int | None])


class NoSuchStep(StepNotFound, FileNotFoundError):
    """There is no such step, or none at all. Orbax raises FileNotFoundError."""


@dataclass(frozen=True)
class StepMetadata:
    """What Orbax's StepMetadata holds, of a step of ours. `item_metadata`: abstract arrays."""

    item_metadata: Any
    metrics: dict[str, float]
    custom_metadata: dict[str, Json]
    commit_timestamp_nsecs: int


@dataclass(frozen=True)
class RootMetadata:
    custom_metadata: dict[str, Json] = field(default_factory=dict)


class CheckpointManager:
    """As `orbax.checkpoint.CheckpointManager`. The run is an ordinary one: `orchestrator ls`, `oc.open_run` and
    `oc.Agent` work on it.

    The first `save` opens an epoch: from then on an older incarnation of the job cannot commit.
    With `read_only=True` nothing is ever written, whichever method is called: as in Orbax, `save` returns False and
    `delete` does nothing; `restore` steps down past damaged steps and leaves them as they are.
    Raises UsageError for options and handlers that have no counterpart, and for a directory that holds Orbax's own
    steps and has not been adopted.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        checkpointers: Any = None,
        options: Any = None,
        metadata: Mapping[str, Json] | None = None,
        item_names: Sequence[str] | None = None,
        item_handlers: Any = None,
        logger: Any = None,
        handler_registry: Any = None,
    ) -> None:
        self._orbax = options or orbax_api.public("CheckpointManagerOptions")()
        orbax_options.check(self._orbax, orbax_api.public("CheckpointManagerOptions")())
        self._handlers = orbax_items.handler_kinds(checkpointers if item_handlers is None else item_handlers)
        self._options = orbax_options.ours(self._orbax)
        self._saves = orbax_api.Saves(self._orbax)
        self._url = os.fspath(directory)
        store = open_storage(self._url)
        self._storage: Storage = ReadOnlyStorage(store) if self._orbax.read_only else store
        self._catalog = JournalStore(self._storage, writer="compat")
        self._rendezvous = connect(self._options.rendezvous_timeout_s)
        self._root_metadata = {
            name: arguments.plain_json(f"metadata[{name!r}]", value) for name, value in (metadata or {}).items()
        }
        self._kept_root_metadata: dict[str, Json] | None = None
        self._agent: Agent | None = None
        self._infos: list[Info] = []
        self._unsure: int | None = None  # the step begun last, the newest of them: its save may still fail
        self._all_metrics: dict[tuple[int, str], dict[str, float]] = {}
        given, timeout_s = configuration.of_orbax(self._orbax), self._options.rendezvous_timeout_s
        meet(self._catalog, self._rendezvous, "open the directory", given, timeout_s, self._admit)
        self.reload()

    # Questions.

    @property
    def directory(self) -> Any:
        return orbax_api.path(self._url)

    def all_steps(self, read: bool = False) -> list[int]:
        """Steps that can be restored, and the one that is being saved."""
        head = self._catalog.head()
        steps = {live.step for live in head.live if live.restorable} if head else set()
        flying = self._agent.in_flight if self._agent else None
        return sorted(steps if flying is None else {*steps, flying})

    def latest_step(self) -> int | None:
        """The step committed last, or the one that is being saved; None in a new run. Raises NothingToRestore where
        all steps are quarantined: a loop that asks this would take None for a new run."""
        flying = self._agent.in_flight if self._agent else None
        if flying is not None:
            return flying
        head = self._catalog.head()
        newest = self._catalog.newest(head) if head else None
        return newest.step if newest else None

    def best_step(self) -> int | None:
        if self._orbax.best_fn is None:
            return self.latest_step()
        infos = [orbax_options.info(*each) for each in self._plain_infos(whole=True)]
        return orbax_options.best(infos, self._orbax.best_fn, self._orbax.best_mode)

    def reload(self) -> None:
        """Read the steps anew; all processes then know the same (process 0's)."""
        # Only a policy of the user's own may look at the metrics of the steps before.
        infos = partial(self._plain_infos, whole=self._orbax.save_decision_policy is not None)
        told = agree(self._rendezvous, _STEPS, self._options.rendezvous_timeout_s, infos)
        self._infos = [orbax_options.info(*each) for each in told]

    def reached_preemption(self, step: int) -> bool:
        if self._orbax.read_only:  # an agent is for saving
            return self._rendezvous.preempted(arguments.step(step))
        return self._writer().reached_preemption(step)

    def should_save(self, step: int) -> bool:
        if self._orbax.read_only:
            return False
        if self._unsure is not None and self._unsure >= step:
            self._make_sure()
        if self._infos and self._infos[-1].step >= step:
            return False
        preempted = self.reached_preemption(step)
        candidate = orbax_options.info(step, 0.0, None)
        return self._saves.due(candidate, self._infos, saving=self._saving(), preempted=preempted)

    def is_saving_in_progress(self) -> bool:
        return self._saving()

    def metrics(self, step: int) -> dict[str, float] | None:
        return self._metrics_of(self._live(step)) or None

    def item_metadata(self, step: int) -> Any:
        """Abstract arrays in the structure of what was saved; a Composite of them for several items."""
        saved = self._saved(self._live(step))
        named = {name: saved.skeleton(name) for name in saved.trees}
        return named[DEFAULT] if saved.single else orbax_api.public("args").Composite(**named)

    def metadata(self, step: int | None = None) -> Any:
        if step is None:
            return RootMetadata(self._kept_root_metadata or self._find_root_metadata())
        live = self._live(step)
        custom = self._saved(live).extra.get("custom_metadata", {})
        return StepMetadata(self.item_metadata(step), self._metrics_of(live), custom, int(live.time * 1e9))

    # Saving.

    def save(
        self,
        step: int,
        items: Any = None,
        save_kwargs: Any = None,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
        args: Any = None,
        custom_metadata: Mapping[str, Json] | None = None,
    ) -> bool:
        """Save `step` if it is due or forced. True if a save has started; it goes on in the background.

        A failed save is logged and the next due step is tried; it does not end the loop. Raises UsageError naming the
        item that cannot be saved here, StepAlreadyExistsError, Fenced if a newer incarnation has taken over.
        """
        args = self._from_legacy(items, save_kwargs, args, "Save")
        if self._orbax.read_only or not (force or self.should_save(step)):
            return False
        if self._knows(step):
            self.wait_until_finished()  # perhaps it has failed: then it may be tried again
            self.reload()
        if self._knows(step):
            raise orbax_api.step_exists(f"{self._url}: step {step} is there already; it is not overwritten")
        if self._kept_root_metadata is None:
            self._kept_root_metadata = self._find_root_metadata() if self._rendezvous.process == 0 else {}
        what = orbax_items.saving(args)
        shown = None if self._orbax.prevent_write_metrics else metrics
        agent = self._writer()
        try:
            return agent.save(
                step,
                what.state,
                metrics=shown,
                extra=what.extra(custom_metadata, self._kept_root_metadata),
                process_state=what.process_state,
                force=True,
            )
        finally:  # it goes on, too, where a Ctrl-C has come in between
            self._forget(agent.failed_step)
            if agent.saved_step == step and not self._knows(step):
                self._infos.append(orbax_options.info(int(step), 0.0, dict(metrics) if metrics else None))
                self._unsure = int(step)

    def _make_sure(self) -> None:
        """Whether the save begun last has failed: all processes must answer the same, so process 0 says it for all."""
        agent = self._writer()
        timeout_s = self._options.rendezvous_timeout_s
        told = agree(self._rendezvous, _SAVING, timeout_s, lambda: (agent.failed_step, agent.in_flight))
        self._forget(told[0])
        if told[1] is None:
            self._unsure = None

    def _forget(self, failed: int | None) -> None:
        """A step whose save has failed is as one that was never saved."""
        if failed is not None:
            self._infos = [info for info in self._infos if info.step != failed]
            self._unsure = None if self._unsure == failed else self._unsure

    def wait_until_finished(self) -> None:
        if self._agent:
            try:
                self._agent.wait_until_finished()
            finally:
                self._forget(self._agent.failed_step)

    def check_for_errors(self) -> None:
        """Raises what an ended save has left to raise (Fenced). A failed save is logged instead."""
        if self._agent and not self._saving():
            self._agent.wait_until_finished()

    def delete(self, step: int) -> None:
        """Let go of a step; its data is deleted in the background. Raises NoSuchStep, and UsageError for a step that is
        never let go: the newest one, the newest one known to be good, a pinned one."""
        if self._orbax.read_only:
            logging.warning("%s is read only: step %s is not deleted", self._url, step)
            return
        self.wait_until_finished()
        self._live(step)
        rule = partial(journal.retire, keep=orbax_options.KeepAllBut(step))

        def retire() -> bool:
            head = self._catalog.append(rule)
            return head is None or journal.find(head, step) is None

        retired = Round[bool](f"delete step {step}", bool)
        if not agree(self._rendezvous, retired, self._options.rendezvous_timeout_s, retire):
            raise UsageError(
                f"{self._url}: step {step} stays: it is the newest, the newest known to be good, or pinned"
            )
        self._infos = [info for info in self._infos if info.step != step]

    def close(self) -> None:
        if self._agent:
            self._agent.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._agent:
            self._agent.__exit__(kind, value, trace)

    # Restoring.

    def restore(
        self,
        step: int | None = None,
        items: Any = None,
        restore_kwargs: Any = None,
        directory: str | os.PathLike[str] | None = None,
        args: Any = None,
    ) -> Any:
        """The state of `step`: the tree, or a Composite by item. `step=None`: the newest good one; a damaged newest
        step is then quarantined and the one before is taken. A given step that is damaged raises Damaged.

        Raises NoSuchStep (a FileNotFoundError), NothingToRestore where all steps are quarantined, Mismatch naming each
        leaf that does not fit.
        """
        if directory is not None and os.fspath(directory) != self._url:
            raise UsageError(f"restore(directory={os.fspath(directory)!r}): make a CheckpointManager of that directory")
        self.wait_until_finished()
        args = self._from_legacy(items, restore_kwargs, args, "Restore")
        saved = self._saved(self._live(step)) if step is not None else self._newest_readable()
        if args is None:
            named: dict[str, Any] = dict.fromkeys([*saved.trees, *saved.json])
        elif saved.single == orbax_items.is_composite(args):
            kind = "a single, unnamed item" if saved.single else f"the items {', '.join([*saved.trees, *saved.json])}"
            raise UsageError(f"{self._url}: the step holds {kind}; got {type(args).__name__}")
        else:
            named = {DEFAULT: args} if saved.single else dict(args.items())
        restored = self._read(step, named, saved)
        return restored[DEFAULT] if saved.single else orbax_api.public("args").Composite(**restored)

    def _read(self, step: int | None, named: Mapping[str, Any], saved: Saved) -> dict[str, Any]:
        """Each item by its name. The arrays of all items are read in one go."""
        trees: dict[str, Any] = {}
        for name, args in named.items():
            if name in saved.trees:
                trees[name] = saved.target(name, args, f"{self._url} step {saved.step}")
            elif name not in saved.json and orbax_items.kind_of(args, name) != "iterator":
                raise NoSuchStep(f"{self._url} step {saved.step}: no item {name!r}; it holds {', '.join(saved.trees)}")
        states, told = saved.process_states, saved.extra
        if trees:
            like = trees[DEFAULT] if saved.whole else trees
            timeout_s = self._options.rendezvous_timeout_s
            # Each item has been matched before.
            options = RestoreOptions(
                timeout_s,
                step=step,
                record=not self._orbax.read_only,
                read=ReadOptions(partial=True, cast=True),
            )
            found = restore_together(self._catalog, self._rendezvous, like, options)
            if found is None:
                raise NoSuchStep(f"{self._url}: no steps")
            states, told = found.process_states, found.extra.get(EXTRA, {})
            trees = {DEFAULT: found.state} if saved.whole else found.state
        result = {}
        for name, args in named.items():
            if name in trees:
                result[name] = trees[name]
            elif name in saved.json:
                result[name] = told["json"][name]
            else:
                me = self._rendezvous
                result[name] = orbax_items.set_iterator(args.item, name, states, me.process, me.count)
        return result

    # What is stored.

    def _live(self, step: int | None) -> LiveStep:
        head = self._catalog.head()
        live = None
        if head:
            live = self._catalog.newest(head) if step is None else journal.find(head, step)
        if live is None or not live.restorable:
            have = ", ".join(map(str, self.all_steps())) or "none"
            raise NoSuchStep(
                f"{self._url}: {'no step' if step is None else f'no step {step}'} to restore; there is: {have}"
            )
        return live

    def _newest_readable(self) -> Saved:
        """Of the newest step whose records can be read: `restore` deals with the damaged ones above it."""
        newest = self._live(None)
        for live in reversed(self._catalog.require_head().live):
            with contextlib.suppress(Damaged):  # what merely cannot be read raises: an older step would be no answer
                if live.restorable:
                    return self._saved(live)
        return self._saved(newest)

    def _saved(self, live: LiveStep) -> Saved:
        step = self._catalog.step(live)
        told = step.extra.extra.get(EXTRA)
        single = told is None or bool(told["single"])
        spec = step.intent.tree
        lists: set[tuple[str, ...]] = set()
        for name in orbax_items.metadata_files([entry.path for entry in step.manifest.files]):
            body = step.file(name)
            lists |= orbax_items.lists_in(body, name) if body else set()
        states = step.process_states()
        return Saved(live.step, spec.leaves, frozenset(lists), single, told or {}, states)

    def _admit(self, head: Head | None) -> None:
        rejection = unadopted(self._catalog, head)
        if rejection:
            raise UsageError(rejection)

    def _plain_infos(self, *, whole: bool) -> list[tuple[int, float, dict[str, float]]]:
        """(step, time, metrics) of the restorable steps; metrics `whole`, or as many as the journal carries."""
        head = self._catalog.head()
        good = [live for live in head.live if live.restorable] if head else []
        return [(live.step, live.time, self._metrics_of(live) if whole else live.metrics) for live in good]

    def _metrics_of(self, live: LiveStep) -> dict[str, float]:
        """All of a step's metrics."""
        if not live.metrics_omitted:
            return live.metrics
        key = live.id
        if key not in self._all_metrics:
            self._all_metrics[key] = self._catalog.step(live).extra.metrics
        return self._all_metrics[key]

    def _find_root_metadata(self) -> dict[str, Json]:
        """As in Orbax, what the directory was given first, by whichever manager, stays: each step carries it on."""
        head = self._catalog.head()
        for live in reversed(head.live if head else ()):
            with contextlib.suppress(Damaged):
                extra = self._catalog.step(live).extra.extra
                return extra.get(EXTRA, {}).get("root_metadata") or self._root_metadata
        return self._root_metadata

    def _knows(self, step: int) -> bool:
        return any(info.step == step for info in self._infos)

    def _saving(self) -> bool:
        return self._agent is not None and self._agent.in_flight is not None

    def _writer(self) -> Agent:
        if self._agent is None:
            keep = orbax_options.KeepAsOrbax(orbax_api.Keeps(self._orbax))
            self._agent = Agent(
                self._url,
                save=policy.at(()),
                keep=keep,
                options=self._options,
                rendezvous=self._rendezvous,
                storage=self._storage,
            )
        return self._agent

    def _from_legacy(self, items: Any, kwargs: Any, args: Any, direction: str) -> Any:
        """`args`, made from the older `items` where they are given."""
        if kwargs:
            raise UsageError("save_kwargs and restore_kwargs are not supported; use args=")
        if items is None:
            return args
        if args is not None or type(items).__name__.endswith("Args"):
            raise UsageError("give the args by name: args=ocp.args.StandardSave(...)")
        return orbax_items.from_legacy(items, self._handlers, orbax_api.public("args"), direction)
