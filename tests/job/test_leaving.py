"""How programs end and what signals do, as the program's parent sees it: exit codes, what was said, what was saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from tests.support.processes import free_port

SERVER = Path(__file__).parents[1] / "support" / "jobs" / "program_server.py"
LIMIT_S = 60.0  # of anything here, on a slow machine; each takes a second

pytestmark = pytest.mark.jobs


class Programs:
    """Started by the server, by number."""

    def __init__(self) -> None:
        environ = {
            **os.environ,
            "PYTHONPATH": str(SERVER.parents[3]),
            "PYTHONWARNINGS": "ignore:os.fork:RuntimeWarning,default::ResourceWarning",
        }
        self._server = subprocess.Popen(
            [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        self._one = ThreadPoolExecutor(1)  # one question at a time

    def _ask(self, **order: Any) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            assert self._server.stdin and self._server.stdout
            print(json.dumps(order), file=self._server.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._server.stdout.readline())
            return answer

        return self._one.submit(ask).result()

    def start(self, name: str, output: Path, *arguments: object, failpoints: str = "") -> Program:
        environ = {"ORCHESTRATOR_FAILPOINTS": failpoints}
        pid = self._ask(start=name, arguments=arguments, output=str(output), environ=environ)["pid"]
        return Program(self, pid, output)

    def code(self, pid: int) -> int | None:
        code: int | None = self._ask(wait=pid, timeout_s=0.0)["code"]
        return code

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(30)
        self._one.shutdown()


class Program:
    def __init__(self, programs: Programs, pid: int, output: Path) -> None:
        self._programs, self.pid, self._output = programs, pid, output
        self.code: int | None = None

    @property
    def said(self) -> str:
        text = self._output.read_text() if self._output.exists() else ""
        return "".join(line for line in text.splitlines(keepends=True) if "[Gloo]" not in line)

    def ended(self) -> bool:
        if self.code is None:
            self.code = self._programs.code(self.pid)
        return self.code is not None

    def wait(self) -> int:
        end = time.monotonic() + LIMIT_S
        while not self.ended():
            if time.monotonic() > end:
                self.end()
                raise AssertionError(f"{self._output.name}: still there after {LIMIT_S:g} s:\n{self.said}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + LIMIT_S
        while text not in self.said:
            over = self.ended() or time.monotonic() > end
            assert not over or text in self.said, f"{text!r} was not said; code {self.code}:\n{self.said}"
            time.sleep(0.02)

    def send(self, number: int) -> None:
        assert not self.ended(), self.said
        os.kill(self.pid, number)

    def end(self) -> None:
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    running = Programs()
    yield running
    running.close()


def steps(root: Path | str) -> list[int]:
    try:
        return oc.open_run(root).all_steps()
    except oc.NotARun:
        return []


@dataclass(frozen=True)
class Row:
    """A program, what is done to it, and what is to come of it.

    signals: sent in turn, once the program has said `ready`; of two processes the second one gets them. says: standard
    output and error, of each process. saved: steps, or how many, of each run by the end of its name.
    """

    program: str
    arguments: tuple[object, ...] = ()
    code: int = 0
    signals: tuple[int, ...] = ()
    says: tuple[str, ...] = ()
    says_not: tuple[str, ...] = ()
    saved: Mapping[str, Sequence[int] | int] = field(default_factory=dict)
    failpoints: str = ""
    ready: str = "ready"
    left_alone: bool = False  # of two processes the first would wait for the other for minutes: it is killed
    to_all: bool = False
    or_code: int | None = None


SLOW = "save.write=delay:1.5@step={}"  # so that this save is still in flight when the program ends
FAILS = "save.seal=delay:0.3@step=2;receipt.write=error@step=2"
FLYING, LOST = "step 2 is still being saved", "orchestrator: lost: step"
KEPT = {"": (1, 2)}
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

ALONE = {
    "no close": Row("unclosed", ("return",), 0, (), (FLYING,), ("lost", "Error"), KEPT, SLOW.format(2)),
    "sys.exit": Row("unclosed", ("exit",), 3, (), (FLYING,), ("lost",), KEPT, SLOW.format(2)),
    "exception": Row("unclosed", ("raise",), 1, (), (FLYING, "a bug of"), ("lost",), KEPT, SLOW.format(2)),
    "no close, compat": Row("unclosed_manager", (), 0, (), (FLYING,), ("lost",), KEPT, SLOW.format(2)),
    "no close, two agents": Row(
        *("unclosed_two", (), 0, (), ("step 1 is still being saved",), ("lost",)),
        *({"-a": (1,), "-b": (1,)}, SLOW.format(1)),
    ),
    "lost": Row("unclosed", ("return",), 1, (), (FLYING, LOST, "process 0 (", "receipt"), (), {"": (1,)}, FAILS),
    "lost, sys.exit": Row("unclosed", ("exit",), 1, (), (FLYING, LOST), (), {"": (1,)}, FAILS),
    "lost, exception": Row("unclosed", ("raise",), 1, (), (FLYING, LOST, "a bug of"), (), {"": (1,)}, FAILS),
    "lost, fenced": Row("unclosed_fenced", (), 5, (), (LOST, "fenced by epoch 2"), (), KEPT, SLOW.format(3)),
    "lost, and told": Row("unclosed_told", (), 0, (), ("fenced by epoch 2",), ("orchestrator: lost",), KEPT),
    "closed": Row("closed", ("return",), 0, (), (), ("lost", "being saved"), {"": (1,)}, SLOW.format(1)),
    "closed, sys.exit": Row("closed", ("exit",), 3, (), (), ("lost", "being saved"), {"": (1,)}, SLOW.format(1)),
    **{
        f"mistake, {how}": Row("mistaken", (how,), code, (), ("in mistaken\n", error), ("orchestrator/", *says_not), {})
        for how, code, error, says_not in (
            ("argument", 2, "errors.UsageError: save", ()),
            ("no run", 3, "errors.NotARun: ", ()),
            ("leaf", 2, "errors.UnsupportedLeaf: ", ()),
            ("like", 1, "errors.Mismatch: ", ()),
            ("step", 6, "errors.StepNotFound: ", ()),
            ("closed", 2, "errors.UsageError: save", ("KeyError",)),
            ("after another", 2, 'KeyError: "a key of the program\'s own"', ()),
        )
    },
    "forked children": Row(
        *("unclosed_in_fork", (), 0, ()),
        ("raise child: 1", "exit child: 3", "return child: 0", "opened before the fork"),
        *(("lost",), {"": (1,)}, "save.write=delay:1@step=1"),
    ),
    "again in a forked child": Row(
        *("again_in_fork", (), 5, (), ("child's epoch 2", "child: 0", "fenced by epoch 2"), ("takes over",), KEPT)
    ),
    "workers": Row("workers", (), 0, (), ("fork worker: -15", "spawn worker: -15"), ("lost",), KEPT),
    # Signals.
    "TERM": Row("trains", (), 0, (TERM,), ("left at",), (), {"": 1}),
    "TERM, two agents": Row("trains_two", (), 0, (TERM,), ("left at",), (), {"-a": 1, "-b": 1}),
    "TERM, second agent": Row("second_agent", (), 0, (TERM,), ("left at",), (), {"-b": 1}),
    "TERM, then an agent": Row("tunes_then_trains", (), 0, (TERM,), ("left at 1",), (), {"-a": 1, "-b": (1,)}),
    "TERM twice": Row("does_not_look", (), -TERM, (TERM, TERM), (), ("survived",)),
    "TERM once": Row("does_not_look", (), 0, (TERM,), ("survived",), (), {"": (1,)}),
    "TERM, closed": Row("closed", ("wait",), -TERM, (TERM,), (), ("survived",), {"": (1,)}),
    "TERM, dropped": Row("dropped", (), -TERM, (TERM,), ("dropped without close()", "left: []"), (), {"": (1,)}),
    "TERM, reader": Row("reads", (), -TERM, (TERM,), (), ("survived",)),
    "TERM, read-only manager": Row("reads_as_manager", (), -TERM, (TERM,), (), ("survived",)),
    "TERM, own handler": Row("handled_before", (), 0, (TERM,), ("own handler ran", "left", "given back"), (), {"": 1}),
    "TERM, own handler after": Row(
        *("handled_after", (), 0, (TERM,)),
        *(("own handler ran", "not heard", "installed a handler of its own after", "kept"), (), {"": (1,)}),
    ),
    "TERM, ignored": Row("ignored", (), 0, (TERM,), ("survived", "heard: False", "it is ignored in"), (), {"": (1,)}),
    "TERM, thread": Row("off_the_main_thread", (), -TERM, (TERM,), ("not opened on the main",), (), {"": (1,)}),
    "TERM, no grace": Row(
        *("unclosed_preempted", (), 1, (TERM,), (LOST, "did not end within 0.3 s"), (), {"": ()}),
        "save.write=delay:20@nth=1",
    ),
    "INT": Row("does_not_look", (), -INT, (INT,), ("KeyboardInterrupt",), ("lost",), {"": (1,)}, SLOW.format(1)),
    "INT, reader": Row("reads", (), -INT, (INT,), ("KeyboardInterrupt",)),
    "INT while it ends": Row(
        *("unclosed", ("return",), 130, (INT,), (LOST, "step 2: interrupted while it was"), (), {"": (1,)}),
        *("save.write=delay:20@step=2", FLYING),
    ),
    **{
        f"INT, {act}, caught": Row(
            *("interrupted", (act,), 0, (INT,), (f"left {act}", "restored 3 0", "threads []", *says)),
            *(("survived", "lost: "), {"": saved}, failpoints),
        )
        for act, failpoints, says, saved in (
            ("stage", "save.stage=delay:20@step=2", (), (1, 3)),
            ("restore", "restore.read=delay:20@nth=1", (), (1, 3)),
            ("wait", SLOW.format(2), (), (1, 2, 3)),
            ("close", SLOW.format(2), ("is closed; open another one",), (1, 2, 3)),
            ("open", "", (), (1, 3)),
        )
    },
    "HUP": Row("does_not_look", (), -HUP, (HUP,), (), ("survived",), {"": ()}, "save.write=delay:20@step=1"),
    "HUP, reader": Row("reads", (), -HUP, (HUP,), (), ("survived",)),
}
TOGETHER = {
    "no close": Row("two_end", ("return",), 0, (), (FLYING,), ("lost",), KEPT, SLOW.format(2)),
    "sys.exit": Row("two_end", ("exit",), 3, (), (FLYING,), ("lost",), KEPT, SLOW.format(2)),
    "exception": Row("two_end", ("raise",), 1, (), (FLYING, "a bug of"), ("lost",), KEPT, SLOW.format(2)),
    "lost": Row("two_end", ("return",), 1, (), (FLYING, LOST), (), {"": (1,)}, FAILS),
    "lost, sys.exit": Row("two_end", ("exit",), 3, (), (FLYING, LOST), (), {"": (1,)}, FAILS),
    "TERM, two agents with workers, then a third": Row(
        *("two_train", (), 0, (TERM,), ("fork worker: -15", "spawn worker: -15", "left at 1\n"), ("lost",)),
        {"-b": 1, "-c": (1,)},
    ),
    "TERM, own handler": Row("two_handled", (), 0, (TERM,), ("left at",), (), {"": 1}),
    "TERM, closed": Row("two_wait", ("closed",), -TERM, (TERM,), (), ("survived",), {"": (1,)}, left_alone=True),
    # JAX's preemption service has taken it, as in any job of JAX's: a reader changes nothing.
    "TERM, reader": Row("two_wait", ("reads",), 0, (TERM,), ("survived",), left_alone=True),
    "TERM twice": Row("two_wait", ("open",), -TERM, (TERM, TERM), (), ("survived",), left_alone=True),
    # The one that hears of the other's failure first takes over its code.
    "INT": Row(
        *("two_wait", ("open",), -INT, (INT,), (), ("survived",), {"": (1,)}, SLOW.format(1)), to_all=True, or_code=130
    ),
    **{
        f"INT, {act}": Row(
            *("two_interrupted", (act,), -INT, (INT,), (), ("survived", "cannot schedule new futures"), {"": saved}),
            *(failpoints,),
            to_all=True,
            or_code=130,
        )
        for act, failpoints, saved in (
            ("stage", "save.stage=delay:20@step=2", (1,)),
            ("restore", "restore.read=delay:20@nth=1", (1,)),
            ("wait", SLOW.format(2), (1, 2)),
        )
    },
    "HUP": Row("two_wait", ("open",), -HUP, (HUP,), (), ("survived",), to_all=True),
    "no service": Row("two_without_service", (), 0, (), ("JAX's preemption service is off",), (), {"": (1,)}),
    "save again": Row(
        *("two_save_again", (), 0, (), ("asked alike: True",), (), {"": (10, 20)}),
        "save.write=error@process=0@step=20@nth=1;save.write=delay:1@process=1@step=20@nth=1",
    ),
    "again": Row(
        *("two_again", (), 0, ()),
        *(("saving step 1 there: waiting", "saving step 2 there: waiting", "takes over", "epoch 3"), ("lost",)),
        *({"": (1, 2, 3)}, "save.write=delay:0.5"),
    ),
    "whose handler": Row("jaxs_handler", (), 0, (), ("JAX's: True\nJAX's: False\n",)),
}


def play(programs: Programs, row: Row, root: str, processes: int) -> list[str]:
    """What is wrong with how it went; [] if nothing."""
    if "reads" in (row.program.partition("_")[0], *row.arguments):
        with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
            agent.save(1, {"w": 1.0})
    port, running = free_port(), []
    try:
        for index in range(processes):
            place = (index, port) if processes > 1 else ()
            output = Path(f"{root}.{index}.said")
            running.append(programs.start(row.program, output, root, *place, *row.arguments, failpoints=row.failpoints))
        for number in row.signals:
            for each in running:
                each.wait_for(row.ready)
            for each in running if row.to_all else running[-1:]:
                each.send(number)
            time.sleep(0.3)  # two of one kind at once are one
        Path(f"{root}.go").touch()
        codes = [running[-1].wait()]
        if row.left_alone:
            running.pop(0).end()
        else:
            codes = [each.wait() for each in running]
        problems = [f"ended with {code}" for code in codes if code not in (row.code, row.or_code)]
        for each in running:
            problems += [f"does not say {text!r}" for text in row.says if text not in each.said]
            problems += [f"says {text!r}" for text in row.says_not if text in each.said]
        for end, expected in row.saved.items():
            found = steps(f"{root}{end}")
            if (len(found) if isinstance(expected, int) else tuple(found)) != expected:
                problems.append(f"saved {found}")
        return [*problems, *(each.said[-3000:] for each in running)] if problems else []
    finally:
        for each in running:
            each.end()


@pytest.fixture(scope="module")
def played(
    request: pytest.FixtureRequest, programs: Programs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], Future[list[str]]]]:
    """All rows that are asked for, a few at once: most of their time is waiting."""
    folder = tmp_path_factory.mktemp("programs")
    found: dict[tuple[str, int], Future[list[str]]] = {}
    with ThreadPoolExecutor(4) as pool:
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.module is request.module:
                case = item.callspec.params["case"]
                processes = 1 if "alone" in item.name else 2
                row = (ALONE if processes == 1 else TOGETHER)[case]
                where = str(folder / f"run-{len(found)}")
                found[case, processes] = pool.submit(play, programs, row, where, processes)
        yield found


@pytest.mark.parametrize("case", ALONE)
def test_alone_a_program_saves_what_is_in_flight_or_says_what_is_lost(
    case: str, played: dict[tuple[str, int], Future[list[str]]]
) -> None:
    problems = played[case, 1].result()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("case", TOGETHER)
def test_together_programs_save_what_is_in_flight_or_say_what_is_lost(
    case: str, played: dict[tuple[str, int], Future[list[str]]]
) -> None:
    problems = played[case, 2].result()
    assert not problems, "\n".join(problems)
