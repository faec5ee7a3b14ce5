"""What a process that is forked for a test has in common with one that an interpreter was started for."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import forks

PROGRAM = """
import os, signal, sys
print(sys.argv[1:], __name__, os.getcwd(), os.environ.get("ORCHESTRATOR_WORD"), flush=True)
backends = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", None)
print("jax" in sys.modules, backends, hash("word"), flush=True)
print("an error", file=sys.stderr)
"""


def run(folder: Path, last: str, *words: str, number: int = 0, **environ: str) -> tuple[int, list[str], str]:
    """Exit code, lines of output, and standard error."""
    program = folder / "program.py"
    program.write_text(PROGRAM + last)
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = forks.start([str(program), *words], {**forks.ENVIRON, **environ}, out, err, number=number)
        code = process.wait(60)
    assert process.poll() == process.returncode == code
    return code, (folder / "out").read_text().splitlines(), (folder / "err").read_text()


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("import atexit; atexit.register(os._exit, 5)", 5),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), os._exit(6))).start()", 6),
        ("raise ValueError('its own')", 1),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", -signal.SIGTERM),
        ("assert signal.getsignal(signal.SIGINT) is signal.default_int_handler", 0),
    ],
)
def test_a_forked_program_runs_and_ends_as_any_other(tmp_path: Path, last: str, code: int) -> None:
    got, said, error = run(tmp_path, last, "one", "two", ORCHESTRATOR_WORD="own")
    assert got == code, error
    assert said[0] == f"['one', 'two'] __main__ {os.getcwd()} own"
    assert said[1].startswith("True {} "), "imported, and no more"
    assert error.startswith("an error\n") and (error.endswith("ValueError: its own\n") == (code == 1))


def test_processes_of_a_job_hash_strings_differently_and_what_jax_reads_takes_a_fresh_one(tmp_path: Path) -> None:
    (_, one, _), (_, again, _), (_, other, _) = (run(tmp_path, "", number=number) for number in (0, 2, 1))
    assert one == again and (one[1] != other[1] or "PYTHONHASHSEED" in os.environ)
    _, fresh, _ = run(tmp_path, "", JAX_ENABLE_X64="true")
    assert fresh[1].startswith("False None ")


def test_a_forked_process_is_killed_and_waited_for_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time; time.sleep(600)")
    with (tmp_path / "out").open("w") as out:
        process = forks.start([str(tmp_path / "program.py")], forks.ENVIRON, out, out)
    assert isinstance(process, forks.Forked) and process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL == process.poll()
    process.kill()  # it has ended, and its id may be another's


def test_a_server_ends_with_whoever_has_started_it(tmp_path: Path) -> None:
    server = forks.Server(())
    server._control.close()
    assert server._process.wait(60) == 0
