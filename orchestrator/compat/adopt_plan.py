"""What adopting a directory of Orbax's would do, step by step, before anything is done. Changes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator.compat import orbax_steps
from orchestrator.compat.orbax_steps import OrbaxStep
from orchestrator.errors import Damaged, OrchestratorError, StorageError, UsageError
from orchestrator.rules import arguments
from orchestrator.rules.records import Head
from orchestrator.run import orbax_directory
from orchestrator.storage import local_path

ADOPT, OLDER, THERE, LEFT, CANNOT = "adopt", "older", "there", "left", "cannot"
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
    CANNOT. why: of the last. found, bytes: of one to adopt."""

    step: int
    path: Path
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
    """In the order of the steps. copied: the source is on another file system than the run."""

    steps: tuple[PlannedStep, ...]
    copied: bool

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
    base = local_path(source)
    if base is None:
        raise UsageError(f"{source}: adopting needs steps on a file system; copy them there first")
    steps, strange = _steps(Path(base), root, choice)
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
            planned.append(PlannedStep(step, path, CANNOT, str(error), error))
        else:
            planned.append(PlannedStep(step, path, LEFT))
    missing = (choice.steps or frozenset()) - {each.step for each in planned}
    if missing:
        raise UsageError(f"{source}: no step {min(missing)} in it; choose from {', '.join(map(str, sorted(steps)))}")
    planned.sort(key=lambda each: each.step)
    return Plan(tuple(planned), not same_file_system(root, Path(base)))


def _planned(step: int, path: Path, skip: frozenset[str]) -> PlannedStep:
    try:
        found = orbax_steps.read_step(path, skip)
        size = sum(os.lstat(each).st_size for each in found.files.values())
        return PlannedStep(step, path, ADOPT, found=found, bytes=size)
    except OrchestratorError as error:
        return PlannedStep(step, path, CANNOT, str(error), error)
    except OSError as error:
        failed = StorageError(f"{path}: cannot be read: {error.strerror or error}")
        return PlannedStep(step, path, CANNOT, str(failed), failed)


def _steps(base: Path, root: str, choice: Choice) -> tuple[dict[int, Path], tuple[Path, ...]]:
    """The steps in a directory, or the one that it is; and what is called like one and is none that we know."""
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


def _alone(base: Path, same: bool, choice: Choice) -> dict[int, Path]:
    """A directory that is one checkpoint. same: it is the run's root."""
    number = choice.as_step if choice.as_step is not None else orbax_directory.number_of(base.name)
    if same:
        raise UsageError(f"{base}: is one checkpoint; give another directory as ROOT, and --from={base}")
    if number is None:
        raise UsageError(f"{base}: is one checkpoint, with no number in its name; say which step: --as_step=0")
    return {arguments.step(number): base}


def _others(base: Path, mine: set[Path]) -> bool:
    numbered = (path for path in base.iterdir() if orbax_directory.number_of(path.name) is not None)
    return any(path not in mine and path.is_dir() and orbax_directory.is_step(path) for path in numbered)


def same_file_system(root: str, base: Path) -> bool:
    """Whether files of `base` can have names below `root`, which need not be there yet."""
    above = Path(os.path.abspath(local_path(root) or root))
    while not above.exists() and above != above.parent:
        above = above.parent
    return above.stat().st_dev == base.stat().st_dev
