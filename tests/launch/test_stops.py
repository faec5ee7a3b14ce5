"""How a launched job is stopped, and who may not read its output: real processes, without JAX."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from launch.console import MOST_BYTES, Stream
from launch.interrupts import OPERATOR_SIGNALS, OperatorSignals
from launch.lines import LONGEST_LINE_BYTES, Lines
from tests.support.launching import (
    DEADLINE_S,
    REPOSITORY,
    alive,
    as_in_the_foreground,
    eventually,
    job,
    pids,
    write_pid,
)

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(180)]


@contextmanager
def launcher(
    command: list[str], stdout: IO[str] | int = subprocess.PIPE, *, ignored: tuple[int, ...] = (), shell: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A launcher in its own session, whose signals are as in a terminal's foreground, but for the ignored ones."""
    process = subprocess.Popen(
        ["sh", "-c", shell, "sh", *command] if shell else command,
        cwd=REPOSITORY,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: as_in_the_foreground(ignored),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def local(flags: list[str], script: str) -> list[str]:
    return [sys.executable, "-m", "launch", *job(flags, script)]


def until(stream: IO[str] | None, text: str) -> str:
    """The next line with `text` in it; the test's time limit bounds the wait."""
    assert stream is not None
    said = []
    for line in stream:
        said.append(line)
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not said: {said}")


STOPPABLE = """
import pathlib, signal, sys, time
told = []
signal.signal(15, lambda *_: told.append(15))
sys.stdout.write('\\rready'); sys.stdout.flush()
while not told: time.sleep(0.01)
print('\\nsaving')
limit = time.monotonic() + 60
while not pathlib.Path({go!r}).exists() and time.monotonic() < limit: time.sleep(0.01)
print('told', told)
raise SystemExit(75)
"""


@pytest.mark.parametrize(
    ("ignored", "sent"),
    [
        pytest.param(
            (), [(1, "as SIGTERM: save and leave"), (1, "stopping already"), (15, "stopping already")], id="terminal"
        ),
        pytest.param((), [(15, "passing it to 1 hosts"), (1, "stopping already")], id="end of a session"),
        pytest.param((1, 2), [(1, ""), (2, ""), (15, "passing it to 1 hosts")], id="nohup, in a script's background"),
    ],
)
def test_a_closed_terminal_preempts_and_what_was_ignored_stays_ignored(
    tmp_path: Path, ignored: tuple[int, ...], sent: list[tuple[int, str]]
) -> None:
    """No number of SIGHUPs kills a host that is saving; a redrawn line is shown though it does not end."""
    go = tmp_path / "go"
    with launcher(local(["--processes", "1"], STOPPABLE.format(go=str(go))), ignored=ignored) as process:
        until(process.stdout, "[host-0] ready")
        for signum, said in sent:
            process.send_signal(signum)
            if said:
                until(process.stderr, said)
        until(process.stdout, "[host-0] saving")
        go.touch()
        until(process.stdout, "[host-0] told [15]")
        assert process.wait(DEADLINE_S) == 75


def test_a_signal_that_comes_twice_at_one_moment_is_one_and_handlers_are_put_back() -> None:
    """`timeout` signals its child, and then its child's group."""
    mine = {number: signal.getsignal(number) for number in OPERATOR_SIGNALS}
    as_in_the_foreground()
    before = [signal.getsignal(number) for number in OPERATOR_SIGNALS]
    with OperatorSignals() as signals:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert signals.received() == [signal.SIGTERM] and signals.received() == []
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert signals.received() == [signal.SIGTERM, signal.SIGHUP]
    assert [signal.getsignal(number) for number in OPERATOR_SIGNALS] == before
    for number, handler in mine.items():
        signal.signal(number, handler)


def test_a_job_saves_when_its_terminal_closes_though_nobody_can_read_it(tmp_path: Path) -> None:
    """The shell and the kernel each send SIGHUP, and every write fails from then on."""
    saved = tmp_path / "saved"
    script = (
        "import pathlib, signal, sys, time\ntold = []\nsignal.signal(15, lambda *_: told.append(1))\nprint('ready')\n"
        "while not told: time.sleep(0.01)\n"
        f"time.sleep(0.3); print('x' * 100000); pathlib.Path({str(saved)!r}).touch(); raise SystemExit(75)"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            as_in_the_foreground()
            os.chdir(REPOSITORY)
            argv = local(["--processes", "1"], script)
            os.execvp("bash", ["bash", "-c", f'"$@"; echo $? > {tmp_path}/code', "bash", *argv])
        os._exit(1)
    try:
        said = b""
        while b"ready" not in said:
            said += os.read(terminal, 4096)
    finally:
        os.close(terminal)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    assert eventually(saved.exists)


def test_a_terminal_that_stops_background_writers_spares_the_supervisor(tmp_path: Path) -> None:
    shell = f'set -m; stty tostop; "$@" & echo $! > {tmp_path}/pid; wait $!; echo $? > {tmp_path}/code'
    pid, terminal = pty.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.chdir(REPOSITORY)
            as_in_the_foreground()
            os.execvp("bash", ["bash", "-c", shell, "bash", *local(["--processes", "1"], "print('shown')")])
        os._exit(1)
    try:
        assert eventually_read(tmp_path / "code") == "0\n"
        assert b"[host-0] shown" in os.read(terminal, 4096)
    finally:
        if not (tmp_path / "code").exists():
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)


def test_one_process_of_a_host_is_signalled_and_all_of_them_end(tmp_path: Path) -> None:
    """Host 0 is started by itself, host 1 below a shell. Each has a data worker, a child in a session of its own, and
    one that has also lost its parent and its environment."""
    idle = "import os, time\n" + write_pid(tmp_path) + "time.sleep(120)"
    script = (
        "import json, pathlib, signal, subprocess, sys, time\n"
        f"idle = [sys.executable, '-S', '-c', {idle!r}]\n"
        "worker = subprocess.Popen(idle); subprocess.Popen(idle, start_new_session=True)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execve(idle[0], idle, {})\n    os._exit(0)\n"
        "if os.fork() == 0:\n    if os.fork() == 0:\n"
        f"        pathlib.Path({str(tmp_path)!r}, f'ended-{{i}}').write_text(str(os.getpid())); time.sleep(0.3)\n"
        "    os._exit(0)\n"
        "os.wait(); os.wait()\ntold = []\nsignal.signal(15, lambda *_: told.append(15))\n"
        "beat = os.environ['ORCHESTRATOR_HEARTBEAT_FILE']\n"
        "pathlib.Path(beat + '.x').write_text(json.dumps({'doing': 'training', 'step': 1, 'pid': os.getpid()}))\n"
        "os.replace(beat + '.x', beat)\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(0.2); print('worker', worker.poll(), 'told', told); raise SystemExit(75)"
    )
    wrapped = 'if [ $ORCHESTRATOR_PROCESS_INDEX = 1 ]; then "$@"; else exec "$@"; fi'
    flags = ["-m", "launch", "local", "--processes", "2", "--", "sh", "-c", wrapped, "sh"]
    with launcher([sys.executable, *flags, *job([], script)[2:]]) as process:
        assert eventually(lambda: len(pids(tmp_path)) == 6)
        # The agent's process is known by its heartbeat.
        assert eventually(lambda: heard_of(process.pid) == 2)
        for index in range(2):
            orphan = eventually_read(tmp_path / f"ended-{index}")
            assert eventually(lambda orphan=orphan: not os.path.exists(f"/proc/{orphan}")), "what is adopted is reaped"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 75, err
    assert sorted(out.splitlines()) == [f"[host-{i}] worker None told [15]" for i in range(2)]
    assert eventually(lambda: alive(tmp_path) == []), "SIGKILL reaches sessions of their own"


def eventually_read(path: Path) -> str:
    assert eventually(lambda: path.exists() and path.read_text() != "")
    return path.read_text()


def heard_of(pid: int) -> int:
    """Heartbeats that a launcher's hosts have left for it."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    found = set()
    for child in children:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if line.startswith(b"ORCHESTRATOR_HEARTBEAT_FILE="):
                    found.add(line.partition(b"=")[2].decode())
    return sum(os.path.exists(path) for path in found)


NOISY = (
    "import pathlib, signal, sys, time\ntold = []\nsignal.signal(15, lambda *_: told.append(1))\n"
    "for n in range(6000): print(n, 'x' * 1000)\n"
    "pathlib.Path({alive!r}).touch()\nlimit = time.monotonic() + 60\n"
    "while not told and time.monotonic() < limit: time.sleep(0.01)\nraise SystemExit(75)"
)


def never_read(_: int) -> None:
    """`| less` that nobody scrolls, a reader that is stopped."""


def read_one_line(end: int) -> None:
    """`| head -1`."""
    while b"\n" not in os.read(end, 1):
        pass
    os.close(end)


@pytest.mark.parametrize("reader", [never_read, read_one_line, None])
def test_a_job_lives_and_stops_in_time_though_nobody_reads_it(
    tmp_path: Path, reader: Callable[[int], None] | None
) -> None:
    """Nor is a line missing in the logs. None: standard output is closed, and a terminal is stopped (Ctrl-S)."""
    done = tmp_path / "alive"
    command = local(["--processes", "1", "--log_dir", str(tmp_path / "logs")], NOISY.format(alive=str(done)))
    if reader is None:
        read_end, write_end = pty.openpty()
        os.write(read_end, b"\x13")
    else:
        read_end, write_end = os.pipe()
    with launcher(command, write_end) as process:
        os.close(write_end)
        if reader is not None:
            reader(read_end)
        assert eventually(done.exists), "the job waits for a reader"
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=DEADLINE_S)[1]
        assert process.returncode == 75, said
    assert ("the job goes on" if reader is read_one_line else "last lines were not shown") in said
    with contextlib.suppress(OSError):
        os.close(read_end)
    log = (tmp_path / "logs" / "restart-0" / "host-0.log").read_text().splitlines()
    assert [int(line.partition(" ")[0]) for line in log] == list(range(6000))


def test_a_job_runs_without_any_standard_stream(tmp_path: Path) -> None:
    done = tmp_path / "alive"
    script = f"import pathlib; print('x' * 100000); pathlib.Path({str(done)!r}).touch(); raise SystemExit(7)"
    with launcher(local(["--processes", "1"], script), shell='exec "$@" >&- 2>&-') as process:
        assert process.wait(DEADLINE_S) == 7 and done.exists()


def test_a_stop_before_a_restart_reports_the_failure_and_not_a_save() -> None:
    flags = ["--processes", "1", "--max_restarts", "9", "--backoff_s", "30"]
    with launcher(local(flags, "raise SystemExit(3)")) as process:
        until(process.stderr, "restart 1 on 1 hosts in 30 s")
        process.send_signal(signal.SIGTERM)
        until(process.stderr, "stopped before the restart; the job ends with 3: host-0 exited with code 3")
        assert process.wait(DEADLINE_S) == 3


def read_all(end: int, into: list[bytes], pause_s: float) -> None:
    while chunk := os.read(end, 8192):
        into.append(chunk)
        time.sleep(pause_s)


def test_a_slow_reader_gets_every_line_and_an_absent_one_gets_their_number() -> None:
    line = b"x" * 999 + b"\n"
    count = 3 * MOST_BYTES // len(line)
    for pause_s, absent in ((0.0005, False), (0.0, True)):
        read_end, write_end = os.pipe()
        stream, got = Stream(write_end), list[bytes]()
        reader = threading.Thread(target=read_all, args=(read_end, got, pause_s))
        if not absent:
            reader.start()
        put = 0
        while put < count:
            if stream.behind():
                time.sleep(0.01)
                continue
            stream.put(line)
            put += 1
        if absent:
            reader.start()
            assert stream.drain(10.0) > 0
            stream.put(line)  # the first that is taken again brings the count
        assert stream.drain(10.0) == 0
        os.close(write_end)
        reader.join(DEADLINE_S)
        os.close(read_end)
        lines = b"".join(got).splitlines()
        shown = lines.count(line[:-1])
        if absent:
            (missed,) = [int(text.split()[1]) for text in lines if b"lines not shown" in text]
            assert missed > 0 and shown + missed == count + 1
        else:
            assert shown == len(lines) == count


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        (["a\nb", "c\n", "d"], ["a", "bc", "|d"]),
        (["a\r\nb\r", "\n"], ["a", "b"]),
        (["\n\na\n"], ["", "", "a"]),
        (["\r1%", "\r2%", "\r3%\n"], ["1%", "2%", "3%"]),  # a redraw that begins with a return, one each second
        (["1%\r", "2%\r", "done\n"], ["1%", "2%", "done"]),  # one that ends with it
        (["1%\r2%\r3%\r"], ["3%"]),  # only the newest
        (["\r5%", "", "", "\n", "\r5%"], ["5%", "5%"]),  # once, until there is another line
        (["\r1", "0%"], ["1", "10%"]),
        (["x" * (LONGEST_LINE_BYTES + 1), "y\n"], ["x" * (LONGEST_LINE_BYTES + 1), "y"]),
        (["\r" * 200_000, "\r1%"], ["1%"]),
    ],
)
def test_lines_and_redraws_are_shown_when_they_are_there(chunks: list[str], shown: list[str]) -> None:
    """One chunk a second; what comes only at the end of the stream has a bar before it."""
    lines, got = Lines(), list[bytes]()
    for second, chunk in enumerate(chunks):
        got += lines.feed(chunk.encode()) + lines.due(float(second)) + lines.due(second + 0.5)
    got += [b"|" + line for line in lines.end()]
    assert [line.decode() for line in got] == shown


def test_of_many_redraws_one_a_second_is_shown() -> None:
    lines, got = Lines(), list[bytes]()
    for tenth in range(51):
        got += lines.feed(b"\r%d" % tenth) + lines.due(tenth / 10)
    assert got == [b"%d" % (10 * second) for second in range(6)]
