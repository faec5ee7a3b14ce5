"""The error taxonomy: what can go wrong, with the exit code that a program sees.

Every message says where, what was got, what was wanted and what to do next. May import nothing of the package but
`texts`.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.texts import printable

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_A_RUN, EXIT_DAMAGED, EXIT_FENCED, EXIT_NOTHING = range(7)
EXIT_PREEMPTED = 75  # sysexits' EX_TEMPFAIL: a job was told to stop (SIGTERM), saved and left; all its processes use it


class OrchestratorError(Exception):
    """Anything this package raises on purpose. `exit_code` is what the command line ends with. Its text may hold what
    others have stored: `str` of it is fit for a terminal; `args` has it as it was."""

    exit_code = EXIT_FAILED

    def __str__(self) -> str:
        return printable(super().__str__(), details=True)


class UsageError(OrchestratorError, ValueError):
    """A flag, option or argument that cannot be used."""

    exit_code = EXIT_USAGE


class NotARun(OrchestratorError):
    """The root holds no journal."""

    exit_code = EXIT_NOT_A_RUN


class NewerFormat(OrchestratorError):
    """A record was written by a newer version of this package."""

    exit_code = EXIT_NOT_A_RUN


class Damaged(OrchestratorError):
    """Stored bytes are not what was written: truncated, edited or missing. Proven, not suspected: they were read twice,
    or the store itself says so. `files`, `chunks`: as of Suspect, for another process to look at."""

    exit_code = EXIT_DAMAGED

    def __init__(self, message: str, *, files: Sequence[str] = (), chunks: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.files, self.chunks = tuple(files), tuple(chunks)


class UnsafeKey(Damaged):
    """A stored record names a key outside its own attempt (`..`, absolute, empty parts)."""


class Suspect(OrchestratorError):
    """What was read is not what was expected, once: no proof of anything yet. Raised by the data plane; whoever knows
    the step asks the store again and makes it Damaged, StepRetired or Unavailable. If nobody does, it is a plain
    failure: nothing may be quarantined for it.

    files: at fault, relative to the attempt, as far as known. chunks: keys in the array store whose elements are wrong.
    structure: what was read makes no sense, though its own checksums are right.
    """

    def __init__(
        self, message: str, *, files: Sequence[str] = (), chunks: Sequence[str] = (), structure: bool = False
    ) -> None:
        super().__init__(message)
        self.files, self.chunks, self.structure = tuple(files), tuple(chunks), structure


class JournalLost(OrchestratorError):
    """The root holds attempts that its journal, missing or cut short, does not know: nothing may be opened, collected
    or overwritten. `orchestrator doctor` and `orchestrator recover` say what is whole."""

    exit_code = EXIT_DAMAGED


class Fenced(OrchestratorError):
    """A newer incarnation has opened its epoch; this one may not change the run any more."""

    exit_code = EXIT_FENCED


class RootChanged(Fenced):
    """The run's root is not the directory that this process has opened: renamed, replaced or deleted. As final as
    Fenced: nothing is written any more."""


class NothingToRestore(OrchestratorError):
    """The run has steps, but none of them can be restored."""

    exit_code = EXIT_NOTHING


class StepNotFound(OrchestratorError):
    """The step asked for is not restorable."""

    exit_code = EXIT_NOTHING


class StepRetired(StepNotFound):
    """The step was retired while it was read: newer ones have been committed. Not damage."""


class StorageError(OrchestratorError):
    """The store rejected or failed: permission, disk full, I/O error."""


class Unavailable(StorageError):
    """What is stored could not be read or written: no answer, credentials, permissions, descriptors, an answer nobody
    expects. It may be whole: nothing is damaged for all we know. `landed`: what was asked for may have been carried out
    all the same. `waited`: for as long as the bound allows, so that trying again at once makes no sense."""

    def __init__(self, message: str, *, landed: bool = False, waited: bool = False) -> None:
        super().__init__(message)
        self.landed, self.waited = landed, waited


class OutcomeUnknown(StorageError):
    """A create may or may not have landed and could not be read back."""


class WaitTimeout(OrchestratorError):
    """A bounded wait ended; the message names whom it waited for."""


class UnsupportedLeaf(UsageError):
    """The state holds a value that cannot be stored. Raised before anything is written."""


class OtherJob(OrchestratorError):
    """The run at this root was written by a job with another state tree."""


class SaveFailed(OrchestratorError):
    """An asynchronous save did not commit. `step` and `attempt` say which; training may go on."""

    def __init__(self, message: str, *, step: int, attempt: str) -> None:
        super().__init__(message)
        self.step, self.attempt = step, attempt


class Mismatch(OrchestratorError, ValueError):
    """The target tree does not fit the checkpoint. `problems` has one line per leaf; nothing was read."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"  {printable(line)}" for line in self.problems[:20]]
        if len(self.problems) > 20:
            shown.append(f"  ... and {len(self.problems) - 20} more")
        super().__init__("\n".join([f"{where}: {len(self.problems)} leaves do not fit the target", *shown]))
