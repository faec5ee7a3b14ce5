"""`import orchestrator as oc`: the same names for programs, for people who press Tab, and for type checkers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import orchestrator as oc


def test_every_public_name_is_listed_and_imported_on_first_use() -> None:
    assert [name for name in dir(oc) if not name.startswith("__")] == oc.__all__
    assert oc.__version__ and "__version__" in dir(oc)
    for name in oc.__all__:
        assert getattr(oc, name).__name__ == name
    assert not hasattr(oc, "Nope")


def test_listing_the_names_imports_none_of_them() -> None:
    program = (
        "import sys, orchestrator as oc; dir(oc), oc.__all__\n"
        "print({'jax', 'numpy', 'orchestrator.agent'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


RIGHT = """
import orchestrator as oc

with oc.Agent("run", save=oc.every(10) | oc.auto(), keep=oc.last(2) | oc.best("loss", mode="max")) as agent:
    restored = agent.restore({})
    step: int = restored.step if restored is not None else 0
    agent.save(step, {}, metrics={"loss": 0.5})
for seen in oc.open_run("run").watch(timeout_s=1.0):
    step = seen
version: str = oc.__version__
"""
# Three mistakes: a wrong argument's name, a policy of the wrong kind, and a restore that may have found nothing.
WRONG = """
import orchestrator as oc

agent = oc.Agent("run", keeping=oc.last(2))
other = oc.Agent("run", save=oc.last(3))
print(other.restore({}).step)
"""


def test_a_type_checker_sees_these_names_and_no_others_and_a_users_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    names = [*oc.__all__, "Nope"]
    path.write_text("\n".join(["import orchestrator as oc", *(f"reveal_type(oc.{name})" for name in names)]))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=pyproject.toml",
        "--strict",
        *(str(tmp_path / name) for name in ("program.py", "right.py", "wrong.py")),
    ]  # and the cache of `make check`
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(oc.__file__).parents[1])
    lines = re.findall(r"program\.py:(\d+): (?:note|error): (.*)", done.stdout)
    seen = {name: [text for at, text in lines if int(at) == number] for number, name in enumerate(names, start=2)}
    assert 'Module has no attribute "Nope"  [attr-defined]' in seen.pop("Nope"), done.stdout
    errors = re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)
    assert [error for error in errors if error[0] != "program"] == [
        ("wrong", "4", "call-arg"),
        ("wrong", "5", "arg-type"),
        ("wrong", "6", "union-attr"),
    ], done.stdout
    for name, texts in seen.items():
        assert len(texts) == 1 and texts[0].startswith("Revealed type is ") and '"Any"' not in texts[0], (name, texts)
