"""A mistake of the program's own, shown as one: the traceback ends at the program's call, and not where, deep in this
package, it was noticed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from orchestrator.errors import (
    Mismatch,
    NewerFormat,
    NotARun,
    NothingToRestore,
    OtherJob,
    StepNotFound,
    UsageError,
)

_OURS = str(Path(__file__).parents[1]) + "/"
# What whoever called can put right; of all else, such as a store that fails, our frames may tell more.
_MISTAKES = (UsageError, NotARun, NewerFormat, NothingToRestore, StepNotFound, OtherJob, Mismatch)


def without_our_frames(error: BaseException, trace: TracebackType | None) -> TracebackType | None:
    """The traceback to show of an error that nothing has caught. Of a mistake, what came before it in our own code is
    not shown either. `error` loses both: Python's own hook shows what it holds, whatever else it is given."""
    if not isinstance(error, _MISTAKES):
        return trace
    if _is_ours(error.__cause__):
        error.__cause__ = None
    if _is_ours(error.__context__):
        error.__context__ = None
    error.__traceback__ = _cut(trace, called=False)
    return error.__traceback__


def _cut(trace: TracebackType | None, *, called: bool) -> TracebackType | None:
    if trace is None:
        return None
    ours = trace.tb_frame.f_code.co_filename.startswith(_OURS)
    if ours and called:  # below it: ours, and what ours calls
        return None
    rest = _cut(trace.tb_next, called=called or not ours)
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def _is_ours(before: BaseException | None) -> bool:
    """Whether it was caught by our code: the first frame of a traceback is the one that catches."""
    trace = before.__traceback__ if before else None
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS)
