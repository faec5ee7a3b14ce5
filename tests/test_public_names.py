"""`import orchestrator as oc`: the same names for programs, for people who press Tab, and for type checkers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import orchestrator as oc


def test_every_public_name_is_listed_and_imported_on_first_use() -> None:
    assert set(oc.__all__) <= set(dir(oc))
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


def test_a_type_checker_sees_the_same_names_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    names = [*oc.__all__, "Nope"]
    path.write_text("\n".join(["import orchestrator as oc", *(f"reveal_type(oc.{name})" for name in names)]))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=pyproject.toml",
        str(path),
    ]  # and the cache of `make check`
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(oc.__file__).parents[1])
    lines = re.findall(r"program\.py:(\d+): (?:note|error): (.*)", done.stdout)
    seen = {name: [text for at, text in lines if int(at) == number] for number, name in enumerate(names, start=2)}
    assert 'Module has no attribute "Nope"  [attr-defined]' in seen.pop("Nope"), done.stdout
    for name, texts in seen.items():
        assert len(texts) == 1 and texts[0].startswith("Revealed type is ") and '"Any"' not in texts[0], (name, texts)
