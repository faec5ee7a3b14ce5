"""What commands print: JSON by its schema, tables that fit a terminal, colour on terminals only, help, completion."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.text import Text

import orchestrator as oc
from orchestrator.cli import render
from orchestrator.cli.command import Result
from orchestrator.cli.layout import fitted, wrapped
from orchestrator.cli.main import COMMANDS, main


@pytest.fixture
def run(root: Path, mesh8: jax.sharding.Mesh) -> Path:
    """Steps with long names, several metrics, a pin, an abort."""
    both = NamedSharding(mesh8, PartitionSpec("data", "model"))
    state = {
        f"layers_{index}/attention/a_rather_long_name_of_a_projection": jax.device_put(np.zeros((8, 8)), both)
        for index in range(3)
    }
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        for step in (1000, 2000):
            agent.save(step, state, metrics={"loss": 1.23456, "accuracy": 0.98765, "perplexity": 12.3456})
        (root / "steps" / "00003000").write_text("in the way")
        agent.save(3000, state)
    main(["orchestrator", "pin", str(root), "--step=1000", "--name=release-candidate"])
    return root


def arguments(run: Path, tmp_path: Path) -> dict[str, list[str]]:
    """What to give each command after its root."""
    return {
        "export": ["2000", str(tmp_path / "export")],
        "diff": ["1000", "2000"],
        "report": ["-o", str(tmp_path / "report.html")],
        "adopt": ["--from", str(tmp_path / "orbax")],
        **{name: ["--step=1000"] for name in ("pin", "unpin", "release")},
        "quarantine": ["1000", "--reason=x"],
    }


def test_every_commands_json_is_what_its_schema_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": jnp.zeros(4)}))
    capsys.readouterr()
    for name in COMMANDS:
        root = tmp_path / "adopted" if name == "adopt" else run
        code = main(["orchestrator", name, str(root), *arguments(run, tmp_path).get(name, []), "--json"])
        said = capsys.readouterr()
        assert code in (0, 1), (name, said.err)
        msgspec.json.decode(said.out, type=COMMANDS[name].json_type)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_result_is_a_frozen_struct(name: str) -> None:
    result = COMMANDS[name].json_type
    item = typing.get_args(result)[0] if typing.get_origin(result) is list else result
    assert issubclass(item, Result) and item.__struct_config__.frozen


@pytest.mark.parametrize("name", COMMANDS)
def test_every_schema_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["orchestrator", "schema", name]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "$defs" in said and ("$ref" in said or said["type"] == "array")


@pytest.mark.parametrize("words", [["{}", "--help"], ["help", "{}"]], ids=" ".join)
@pytest.mark.parametrize("name", [*COMMANDS, "schema", "completion"])
def test_every_help_has_usage_examples_and_no_empty_default(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["orchestrator", *(word.format(name) for word in words)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: orchestrator {name} ") and "\nexamples:\n" in text
    assert "(default )" not in text and "(default False)" not in text


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["orchestrator", *([name] if name else []), "--help"]) == 0
    text = capsys.readouterr().out.partition("examples:")[0]
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_has_one_line_for_each_command_and_is_as_wide_as_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["orchestrator", "--help"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert set(rows) == {*COMMANDS, "launch", "example", "schema", "completion"} and len(rows) == len(set(rows))
    widths = []
    for columns in ("60", "140"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["orchestrator", "gc", "--help"]) == 0
        text = capsys.readouterr().out.partition("examples:")[0]
        widths.append(max(map(len, text.splitlines())))
    assert widths[0] <= 60 and 80 < widths[1] <= 140


def test_sizes_have_one_unit_system() -> None:
    """Bars, too (`Pace`): a bar that counts 805 MB for 384 MiB is asked about."""
    sources = "".join(path.read_text() for path in Path(render.__file__).parent.glob("*.py"))
    assert "rich.progress" not in sources
    assert (render.size(384 << 20), render.age(59), render.age(7200)) == ("384.0 MiB", "59 s ago", "2 h ago")


def on_a_terminal(columns: int, *words: str, until: str | None = None) -> str:
    """What a person sees of a command on a terminal of that width. Only one that shows `until` goes on, and is
    interrupted (Ctrl-C) once it has shown that."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    running = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environ, "TERM": "xterm-256color"}
    )
    os.close(theirs)
    shown, codes = b"", (0, 1)
    end = time.monotonic() + 60
    try:
        while select.select([mine], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                more = os.read(mine, 65536)
            except OSError:  # the terminal is gone with its last program
                break
            shown += more
            if until and codes != (130,) and until in shown.decode(errors="replace"):
                running.send_signal(signal.SIGINT)
                codes = (130,)
        assert time.monotonic() < end, f"{words}: goes on after 60 s: {shown[-2000:]!r}"
        assert running.wait(10) in codes, shown
        assert until is None or codes == (130,), f"{until!r} was not shown: {shown!r}"
    finally:
        os.close(mine)
        running.kill()
        running.wait(10)
    return shown.decode()


ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


TABLES = ["ls", "inspect", "log", "watch --once", "plan", "verify", "diff 1000 2000"]


@pytest.mark.parametrize("words", [words.split() for words in TABLES], ids=TABLES)
def test_tables_fit_80_columns_and_use_more_where_there_is_more(run: Path, words: list[str]) -> None:
    narrow = ESCAPE.sub("", on_a_terminal(80, words[0], str(run), *words[1:])).replace(str(run), "/data/run")
    rows = [line.rstrip() for line in narrow.splitlines()]
    # Sentences are left to the terminal to wrap; rows of tables are not.
    assert [row for row in rows if len(row) > 80 and "   " in row.strip()] == []
    wide = ESCAPE.sub("", on_a_terminal(200, words[0], str(run), *words[1:]))
    assert len(wide.splitlines()) <= len(rows)


def test_watch_on_a_terminal_says_that_a_run_has_ended_in_order_and_goes_on_until_it_is_interrupted(run: Path) -> None:
    shown = on_a_terminal(80, "watch", str(run), "--interval_s=0.01", until="\x1b[2K")  # the page is drawn once more
    assert ESCAPE.sub("", shown).count("ENDED  the process closed in order") > 1


def test_colour_is_for_terminals_only(run: Path) -> None:
    assert "\x1b[" in on_a_terminal(80, "ls", str(run))
    piped = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "ls", str(run)], capture_output=True, text=True, timeout=60
    )
    assert piped.returncode == 0 and "\x1b" not in piped.stdout + piped.stderr


def completed(shell_line: list[str]) -> list[str]:
    """What bash offers for the last of these words."""
    program = (
        'source <("$PY" -m orchestrator.cli completion bash); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_orchestrator; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program, "bash", *shell_line],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PY": sys.executable},
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_commands_and_flags() -> None:
    assert completed(["orchestrator", "do"]) == ["doctor"]
    assert completed(["orchestrator", "un"]) == ["unpin"]
    assert completed(["orchestrator", "plan", "/data/run", "--host"]) == ["--host_memory"]
    assert set(completed(["orchestrator", "pin", "/r", "--"])) == {"--step", "--name", "--json"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_script_is_one_that_it_accepts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["orchestrator", "completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here to ask")
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["completion", "tcsh"], 2, "no completion for 'tcsh'; choose from bash, zsh, fish"),
        (["completion", "zhs"], 2, "did you mean zsh? choose from bash, zsh, fish"),
        (["schema", "nope"], 2, "no command 'nope' with --json; choose from ls, "),
        (["example", "plain"], 2, "no example 'plain'; did you mean plain_jax? choose from "),
        (["launch", "locl"], 2, "launch: no command 'locl'; did you mean local? choose from local, "),
        (["schema"], 2, "orchestrator schema ls"),
    ],
)
def test_mistakes_are_one_line(words: list[str], code: int, said: str, capsys: Any) -> None:
    assert main(["orchestrator", *words]) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


SENTENCE = "WARN  step 80 is quarantined: file:///data/run/steps/00000080/e0001-a01/state/d/0123456789: is missing"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (200, [SENTENCE]),
        (
            60,
            [
                "WARN  step 80 is quarantined:",
                "    file:///data/run/steps/00000080/e0001-a01/state/d/0123456789:",
                "    is missing",
            ],
        ),
    ],
)
def test_a_sentence_is_cut_at_blanks_only(width: int, lines: list[str]) -> None:
    assert [line.plain for line in wrapped(Text(SENTENCE), width, 4)] == lines


def test_a_rows_text_is_beneath_it_where_it_has_no_room_beside() -> None:
    table = render.rows(["step", "what"], [["5", "short"], ["10", "a reason " * 9]], right=["step"])
    narrow, piped = (Console(file=io.StringIO(), width=40, force_terminal=tty, color_system=None) for tty in (1, 0))
    for screen in (narrow, piped):
        screen.print(table, soft_wrap=True)
    rows = [line.rstrip() for line in typing.cast(io.StringIO, narrow.file).getvalue().splitlines()]
    assert rows[:4] == ["step  what", "   5  short", "  10", "    a reason a reason a reason a reason"]
    assert max(map(len, rows)) <= 40 and "".join(rows).count("reason") == 9
    rows = [line.rstrip() for line in typing.cast(io.StringIO, piped.file).getvalue().splitlines()]
    assert rows == ["step  what", "   5  short", f"  10  {'a reason ' * 9}".rstrip()], "one row, one line"


@pytest.mark.parametrize(
    ("width", "lines"),
    [(40, ["one clause; another one; a third clause"]), (30, ["one clause; another one;", "  a third clause"])],
)
def test_clauses_stay_whole_while_they_fit(width: int, lines: list[str]) -> None:
    assert list(fitted(["one clause", "another one", "a third clause"], width)) == lines
