"""`orchestrator example`: programs to start from, as they are tested here, one file each."""

from __future__ import annotations

import ast
from pathlib import Path

import orchestrator
from orchestrator.cli.usage import choose_from, row
from orchestrator.errors import UsageError

ABOUT = "print a program to start from: orchestrator example plain_jax"
_PACKAGE = Path(orchestrator.__file__).parent
# Installed they lie in this package; in a checkout beside it.
_FOLDERS = (_PACKAGE / "examples", _PACKAGE.parent / "examples")
# The example job is several modules, of which the last is the program; printed as one file.
_JOB = "train"
_PARTS = ("data", "model", "report", "train")


def listing() -> str:
    """All examples, each with the first line of what it says of itself, and how to start."""
    rows = "\n".join(row(name, _about(_read(name)), 11) for name in names())
    return (
        f"examples, to print and change:\n{rows}\n\n"
        "  orchestrator example plain_jax > train.py\n"
        "  python train.py --root=run --steps=20\n"
        "  orchestrator launch local --processes 2 -- python train.py --root=run --steps=40"
    )


def names() -> list[str]:
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    found = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__") if folder else []
    return [*found, _JOB]


def source(name: str) -> str:
    """The program's source. Raises UsageError where there is none of that name."""
    if name not in names():
        raise UsageError(f"no example {name!r}; {choose_from(name, names())}")
    return _read(name).rstrip("\n")


def _read(name: str) -> str:
    if name == _JOB:
        return _joined([(_PACKAGE.parent / f"launch/example/{part}.py").read_text("utf-8") for part in _PARTS])
    return next(folder / f"{name}.py" for folder in _FOLDERS if folder.is_dir()).read_text("utf-8")


def _about(text: str) -> str:
    words = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    return " ".join(words.removeprefix("`orchestrator launch train`: ").split())


def _joined(modules: list[str]) -> str:
    """Modules that import each other as one file: the last one's docstring, all other imports, all the rest."""
    own = tuple(f"launch.example.{part}" for part in _PARTS)
    plain, chosen, bodies = set[str](), dict[str, set[str]](), []
    for text in modules:
        tree, end = ast.parse(text), 0
        for node in tree.body:
            match node:
                case ast.Import():
                    plain.add(ast.unparse(node))
                case ast.ImportFrom(module=str(module)) if module not in own:
                    chosen.setdefault(module, set()).update(ast.unparse(alias) for alias in node.names)
                case ast.ImportFrom():
                    pass
                case _:
                    continue
            end = node.end_lineno or end
        bodies.append("\n".join(text.splitlines()[end:]).strip("\n"))
    first = ast.parse(modules[-1]).body[0]
    docstring = "\n".join(modules[-1].splitlines()[: first.end_lineno])
    future = chosen.pop("__future__", set())
    lines = [f"from __future__ import {', '.join(sorted(future))}\n"] if future else []
    lines += sorted(plain)
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(chosen.items())]
    return "\n\n".join((docstring, "\n".join(lines), *(f"\n{body}" for body in bodies))) + "\n"
