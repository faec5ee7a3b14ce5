"""What an installed package offers from any directory: `orchestrator launch`, `orchestrator example`, `--version`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator as oc
from launch.engines import manifests
from orchestrator.cli import example, launching
from orchestrator.cli.main import main

ROOT = Path(__file__).parents[2]
THEIRS = "raise SystemExit('the user\\'s own launch was run')\n"


@pytest.mark.parametrize("shadow", ["launch.py", "launch/__init__.py"])
@pytest.mark.parametrize("on_path", [False, True], ids=["in the working directory", "on PYTHONPATH"])
@pytest.mark.parametrize("words", [["health"], ["local", "--help"]], ids=" ".join)
def test_a_users_own_launch_is_never_taken_for_ours(
    shadow: str, on_path: bool, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).write_text(THEIRS)
    path = [str(tmp_path)] * on_path + [str(ROOT)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, *manifests.HEALTH[1:-1], *words]  # as generated manifests call us
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith(("health: ", "usage: orchestrator launch local")), done


def test_a_launch_that_is_not_installed_is_an_error_that_says_where_it_was_expected(tmp_path: Path) -> None:
    with pytest.raises(oc.UsageError, match=re.escape(str(tmp_path / "launch"))):
        launching.load(tmp_path)


@pytest.mark.parametrize("words", [["launch", "train"], ["launch", "local"], ["ls"]], ids=" ".join)
def test_a_reader_of_the_help_may_go(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "orchestrator", *words, "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_example_is_printed_as_it_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.stem: path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__"}
    assert example.names() == [*sorted(files), "train"]
    for name, path in files.items():
        assert main(["orchestrator", "example", name]) == 0
        assert capsys.readouterr().out == path.read_text()
    assert main(["orchestrator", "example"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in example.names())
    assert main(["orchestrator", "example", "nope"]) == 2
    assert "choose from grain_input" in capsys.readouterr().err


def test_the_example_job_is_printed_as_one_file_that_lacks_nothing(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(example.source("train") + "\n")
    imported = [
        node for node in ast.walk(ast.parse(program.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    # A user's own launch.py lies beside it.
    assert not [line for line in map(ast.unparse, imported) if re.search(r"\blaunch\b", line)]
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,E9", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("columns", [60, 80, 140])
@pytest.mark.parametrize("engine", ["local", "slurm", "gke", "tpu-vm"])
def test_the_help_of_a_launcher_is_as_wide_as_the_terminal(
    engine: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["orchestrator", "launch", engine, "--help"]) == 0
    said, _, flags = capsys.readouterr().out.partition("\nflags:\n")
    words = [block for block in said.split("\n\n") if not re.search("^(usage:|  )", block, re.M)]
    lines = [line for block in words for line in block.splitlines()] + flags.splitlines()
    assert len(lines) > 10 and [line for line in lines if len(line) > columns] == []


@pytest.mark.parametrize(("name", "missing"), [("train", ["optax"]), ("demo", ["flax", "matplotlib"])])
def test_what_a_plain_install_lacks_is_named_with_the_command_that_brings_it(
    name: str, missing: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)  # as if there were none
    assert main(["orchestrator", "launch", name]) == 2
    assert capsys.readouterr().err == (
        f"launch {name}: needs {' and '.join(missing)}, of the `train` extra: pip install {' '.join(missing)}\n"
    )


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_the_command_says_its_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["orchestrator", word]) == 0
    assert capsys.readouterr().out == f"checkpoint-orchestrator {oc.__version__}\n"


BY_NAME = re.compile(r"""pip3?\s+(?:install|download)[^\n`|]*["'\s]checkpoint[-_]orchestrator(?![-_]\d|\S*\.whl)""")
UNSAFE = ['pip install "checkpoint-orchestrator[train]" "jax[tpu]"', "pip install -U checkpoint_orchestrator"]
SAFE = ["pip install .", "pip install checkpoint_orchestrator-0.2.0-py3-none-any.whl", "checkpoint-orchestrator 0.2.0"]


def test_nobody_is_sent_to_an_index_for_a_name_that_is_not_registered() -> None:
    """Whoever registers it first would run their code on our users' machines."""
    assert all(BY_NAME.search(text) for text in UNSAFE) and not any(BY_NAME.search(text) for text in SAFE)
    folders = ("docs", "orchestrator", "launch", "docker", "examples", "tests/proof", "benchmarks")
    pages = [*ROOT.glob("*.md"), ROOT / "Makefile"]
    pages += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {path: path.read_text(errors="replace").replace("\\\n", " ") for path in pages if path.suffix != ".pyc"}
    assert [f"{path}: {found[0]}" for path, text in texts.items() if (found := BY_NAME.search(text))] == []
