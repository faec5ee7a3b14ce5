"""A round of a job's processes: each gives one message, and all go on with the same answers.

A `Round` has a name, which a timeout quotes, and the one type of its messages. What another process sends is decoded
before anybody looks at it: what is no such message is an error that names the sender, the same on all processes. Main
thread; `gather` and `agree` are collectives: all processes call them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from orchestrator import errors
from orchestrator.errors import Mismatch, OrchestratorError, SaveFailed
from orchestrator.job.rendezvous import Rendezvous

Message = TypeVar("Message")


@dataclass(frozen=True)
class Round(Generic[Message]):
    """`kind`: the type of a message, as msgspec knows it: plain data, structs, and unions of tagged structs."""

    name: str
    kind: Any


class Raised(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An exception that one process has raised, as the others get to know it. kind: its class's name."""

    kind: str
    text: str


class _Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What process 0 has decided, or why it could not."""

    value: Any = None
    raised: Raised | None = None


def gather(rendezvous: Rendezvous, round_: Round[Message], message: Message, timeout_s: float) -> list[Message]:
    """Every process's message, by index, on every process. Raises WaitTimeout naming who did not come, and
    OrchestratorError naming who sent what is no message of this round."""
    answers = rendezvous.gather(round_.name, _encoded(message), timeout_s)
    return [_decoded(rendezvous, round_, index, answer) for index, answer in enumerate(answers)]


def agree(rendezvous: Rendezvous, round_: Round[Message], timeout_s: float, decide: Callable[[], Message]) -> Message:
    """What process 0's `decide` returned, on every process. What it raises, all raise: process 0 the very error, the
    others one of the same kind (`as_error`). Raises WaitTimeout."""
    failure: Exception | None = None
    sent: Any = None
    if rendezvous.process == 0:
        try:
            sent = _encoded(_Decision(value=_encoded(decide())))
        except Exception as error:  # the others must know of it before it is raised here
            failure, sent = error, _encoded(_Decision(raised=raised(error)))
    answer = rendezvous.broadcast(round_.name, sent, timeout_s)
    if failure:
        raise failure
    decision = _decoded(rendezvous, Round[_Decision](round_.name, _Decision), 0, answer)
    if decision.raised:
        raise as_error(0, decision.raised)
    return _decoded(rendezvous, round_, 0, decision.value)


def raised(error: Exception) -> Raised:
    return Raised(type(error).__name__, str(error))


def as_error(process: int, raised: Raised) -> Exception:
    """Another process's error, of the same kind where it is one of ours."""
    known = getattr(errors, raised.kind, None)
    message = f"process {process}: {raised.text}"
    # Mismatch and SaveFailed take more than a message.
    if (
        isinstance(known, type)
        and issubclass(known, OrchestratorError)
        and not issubclass(known, Mismatch | SaveFailed)
    ):
        return known(message)
    return OrchestratorError(f"process {process}: {raised.kind}: {raised.text}")


def _encoded(message: Any) -> Any:
    return msgspec.to_builtins(message, str_keys=True)


def _decoded(rendezvous: Rendezvous, round_: Round[Message], process: int, answer: Any) -> Message:
    try:
        message: Message = msgspec.convert(answer, round_.kind, str_keys=True)
    except msgspec.ValidationError as error:
        host = rendezvous.hosts.get(process, "?")
        raise OrchestratorError(
            f"{round_.name}: process {process} ({host}) answered with what is no message of this round: {error}; "
            "run the same version of the orchestrator on all hosts"
        ) from error
    return message
