"""What adopting a directory of Orbax's would do, step by step, before anything is done. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.compat import orbax_steps, root_metadata
from orchestrator.compat.orbax_steps import OrbaxStep
from orchestrator.errors import Damaged, OrchestratorError, StorageError, UsageError
from orchestrator.rules import arguments
from orchestrator.rules.records import Head, Json
from orchestrator.run import orbax_directory
from orchestrator.storage import local_path
from orchestrator.storage.store_path import AnyPath, StorePath, any_path, size_of

ADOPT, OLDER, THERE, LEFT, CANNOT = "adopt", "older", "there", "left", "cannot"
UNFINISHED = "unfinished"
_NAMED = 10  # steps in an error


@dataclass(frozen=True)
class Choice:
    """What of a directory is to be adopted. skip: items to leave out. steps: only these; None: all. prefix: only steps
    that are called so; None: all. as_step: the number of a directory that is one checkpoint, with none in its name."""

    skip: frozenset[str] = frozenset()
    steps: frozenset[int] | None = None
    prefix: str | None = None
    as_step: int | None = None


@dataclass(frozen=True)
class PlannedStep:
    """verdict: ADOPT; OLDER than the run's newest, and not in it; THERE: in the run already; LEFT: not asked for;
    UNFINISHED, in a store; CANNOT. why: of the last two. found, bytes: of one to adopt."""

    step: int
    path: AnyPath
    verdict: str
    why: str = ""
    error: OrchestratorError | None = None
    found: OrbaxStep | None = None
    bytes: int = 0

    @property
    def items(self) -> tuple[str, ...]:
        return self.found.items if self.found else ()


@dataclass(frozen=True)
class Plan:
    """In the order of the steps. copied: no names in the run can be given to the source's files, which are
    on another file system, or in a store. root_metadata: of the directory."""

    steps: tuple[PlannedStep, ...]
    copied: bool
    root_metadata: Mapping[str, Json] | None = None

    def having(self, verdict: str) -> tuple[PlannedStep, ...]:
        return tuple(each for each in self.steps if each.verdict == verdict)

    def check(self) -> None:
        """Raises the error of the first step that cannot be adopted, naming the others."""
        wrong = self.having(CANNOT)
        if not wrong:
            return
        first, others = wrong[0], [str(each.step) for each in wrong[1:]]
        assert first.error is not None
        if not others:
            raise first.error
        named = ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
        kind = UsageError if isinstance(first.error, UsageError) else StorageError
        raise (Damaged if isinstance(first.error, Damaged) else kind)(
            f"{first.why}; nor can {named}: --dry_run says why, --steps= takes the others alone"
        )


def make(root: str, source: str, head: Head | None, choice: Choice) -> Plan:
    """Raises UsageError for a source that holds no steps, or where it is not clear which are meant; StorageError."""
    base = any_path(source)
    if isinstance(base, Path) and local_path(root) is None:
        raise UsageError(
            f"{source}: on this host, and the run in a store; copy the steps there first, and adopt them there with "
            f"--from=gs://..."
        )
    steps, strange = _steps(base, root, choice)
    newest = max((live.step for live in head.live), default=-1) if head else -1
    known = {live.step for live in head.live} if head else set()
    planned = []
    for step, path in sorted(steps.items()):
        if choice.steps is not None and step not in choice.steps:
            planned.append(PlannedStep(step, path, LEFT))
        elif step in known:
            planned.append(PlannedStep(step, path, THERE))
        elif step < newest:
            planned.append(PlannedStep(step, path, OLDER))
        else:
            planned.append(_planned(step, path, choice.skip))
    for path in strange:
        step = orbax_directory.number_of(path.name) or 0
        if choice.steps is None or step in choice.steps:
            error = UsageError(orbax_directory.elsewhere(source, [path.name]))
            planned.append(_unfinished(step, path) or PlannedStep(step, path, CANNOT, str(error), error))
        else:
            planned.append(PlannedStep(step, path, LEFT))
    missing = (choice.steps or frozenset()) - {each.step for each in planned}
    if missing:
        raise UsageError(f"{source}: no step {min(missing)} in it; choose from {', '.join(map(str, sorted(steps)))}")
    planned.sort(key=lambda each: each.step)
    if choice.steps is not None or not {ADOPT, THERE, OLDER} & {each.verdict for each in planned}:
        planned = [replace(each, verdict=CANNOT) if each.verdict == UNFINISHED else each for each in planned]
    copied = isinstance(base, StorePath) or not same_file_system(root, base)
    return Plan(tuple(planned), copied, root_metadata.found(base))


def _unfinished(step: int, path: AnyPath) -> PlannedStep | None:
    """It stays, as Orbax would leave it."""
    if orbax_directory.is_finished(path):
        return None
    name = orbax_directory.COMMITTED
    error = UsageError(
        f"{path}: Orbax has not finished it (there is no {name}, which it writes last in a store); if the step was "
        "copied there whole from a file system, put an empty object of that name into it"
    )
    return PlannedStep(step, path, UNFINISHED, str(error), error)


def _planned(step: int, path: AnyPath, skip: frozenset[str]) -> PlannedStep:
    if unfinished := _unfinished(step, path):
        return unfinished
    try:
        found = orbax_steps.read_step(path, skip)
        size = sum(size_of(each) for each in found.files.values())
        return PlannedStep(step, path, ADOPT, found=found, bytes=size)
    except OrchestratorError as error:
        return PlannedStep(step, path, CANNOT, str(error), error)
    except OSError as error:
        failed = StorageError(f"{path}: cannot be read: {error.strerror or error}")
        return PlannedStep(step, path, CANNOT, str(failed), failed)


def _steps(base: AnyPath, root: str, choice: Choice) -> tuple[dict[int, AnyPath], tuple[AnyPath, ...]]:
    """The steps in a directory, or the one that it is; and what is called like one and is none that we know."""
    if isinstance(base, StorePath):
        same = str(base) == root
    else:
        same = os.path.realpath(base) == os.path.realpath(local_path(root) or "")
    if orbax_directory.is_checkpoint(base):
        return _alone(base, same, choice), ()
    there = orbax_directory.survey(base, prefix=choice.prefix)
    steps, strange = dict(there.steps), there.strange
    prefixes = sorted({orbax_directory.prefix_of(path.name) for path in steps.values()})
    if len(prefixes) > 1:
        named = ", ".join(repr(prefix) for prefix in prefixes)
        raise UsageError(f"{base}: holds steps with the prefixes {named}; say which: --prefix={prefixes[-1]}")
    if steps and choice.prefix is not None and same and _others(base, set(steps.values())):
        raise UsageError(
            f"{base}: holds steps of other prefixes, beside which a run here would be rejected; give another ROOT, and "
            f"--from={base}"
        )
    if not steps and not strange and orbax_directory.is_step(base):
        return _alone(base, same, choice), ()
    if not steps and not strange:
        raise UsageError(f"{base}: no steps of an Orbax CheckpointManager in it; check the path")
    if choice.as_step is not None:
        raise UsageError(f"{base}: holds {len(steps)} steps with numbers; --as_step is for one checkpoint alone")
    return steps, strange


def _alone(base: AnyPath, same: bool, choice: Choice) -> dict[int, AnyPath]:
    """A directory that is one checkpoint. same: it is the run's root."""
    number = choice.as_step if choice.as_step is not None else orbax_directory.number_of(base.name)
    if same:
        raise UsageError(f"{base}: is one checkpoint; give another directory as ROOT, and --from={base}")
    if number is None:
        raise UsageError(f"{base}: is one checkpoint, with no number in its name; say which step: --as_step=0")
    return {arguments.step(number): base}


def _others(base: AnyPath, mine: set[AnyPath]) -> bool:
    numbered = (path for path in base.iterdir() if orbax_directory.number_of(path.name) is not None)
    return any(path not in mine and path.is_dir() and orbax_directory.is_step(path) for path in numbered)


def same_file_system(root: str, base: Path) -> bool:
    """Whether files of `base` can have names below `root`, which need not be there yet."""
    return existing(local_path(root) or root).stat().st_dev == base.stat().st_dev


def existing(path: str) -> Path:
    """The directory in which `path` is, or will be made."""
    above = Path(os.path.abspath(path))
    while not above.exists() and above != above.parent:
        above = above.parent
    return above
