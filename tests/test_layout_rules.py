"""The shape of the sources, read from their syntax trees: who may import what, and how long things may get.

The rooms and the direction of imports are those of ARCHITECTURE.md. A module may import its own row (without cycles)
and every row below it, never one above.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
CLASS_LINES_MAX = 250

# The rooms, lowest first.
ROOMS = (
    ("leaves", "errors texts environment failpoints gc_pause versions"),
    ("rules", "rules options policy"),  # options and policy are pure values that users make
    ("storage and observe", "storage observe"),
    ("run and arrays", "run arrays"),
    ("job and tools", "job tools"),
    ("what users import", "agent reader"),
    ("compat", "compat"),
    ("cli", "cli __main__"),
)
RANKS = {name: rank for rank, (_, names) in enumerate(ROOMS) for name in names.split()}
LAUNCH = len(ROOMS)
FACADE = RANKS["agent"]  # orchestrator/__init__.py gives the public names
PURE_ROOM = RANKS["rules"]
PURE_ELSEWHERE = (
    "orchestrator.storage.gcs_replies",
    "orchestrator.arrays.format.ocdbt",
    "orchestrator.arrays.reading.dividing",
    "launch.lines",
)
IMPURE = {
    *("os", "io", "time", "datetime", "random", "uuid", "secrets", "socket", "threading", "asyncio", "pathlib"),
    *("subprocess", "signal", "absl", "numpy", "orbax", "tensorstore", "etils", "jax"),
}
COMPUTES_WITH_NUMPY = ("orchestrator.arrays.format.ocdbt", "orchestrator.arrays.reading.dividing")
# Whoever imports one of these names (or anything below it) must be one of the modules given.
ONLY_IMPORTERS = {
    "orbax": ("orchestrator.arrays",),
    "tensorstore": ("orchestrator.arrays",),
    "etils": ("orchestrator.arrays",),
    "jax._src": ("orchestrator.arrays.jax_internals",),
    "jaxlib": ("orchestrator.arrays.jax_internals",),
    "jax.experimental.multihost_utils": ("orchestrator.job.rendezvous",),
}


def sources() -> dict[str, str]:
    """Dotted module name -> source, of both packages."""
    found = {}
    for package in ("orchestrator", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path.read_text()
    return found


@functools.cache
def imports(source: str) -> set[str]:
    """Every dotted name that a source imports, `from a import b` as `a.b`, and uses of `jax.x.y` as attributes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"line {node.lineno}: relative imports hide the direction"
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
            case ast.Attribute() if ast.unparse(node).startswith("jax."):
                names.add(ast.unparse(node))
    return names


def rank(module: str) -> int:
    package, _, rest = module.partition(".")
    if package == "launch":
        return LAUNCH
    return RANKS[rest.partition(".")[0]] if rest else FACADE


def is_pure(module: str) -> bool:
    """The leaves are few and small, and some of them read the environment; the rules are pure without exception."""
    return rank(module) == PURE_ROOM or module in PURE_ELSEWHERE


def inside(module: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The package's own modules that `module` imports."""
    for name in imports(modules[module]):
        if name.partition(".")[0] in ("orchestrator", "launch"):
            while name not in modules:
                name = name.rpartition(".")[0]
            if name != module:
                yield name


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def direction_problems(modules: Mapping[str, str]) -> list[str]:
    problems = []
    for module in modules:
        for imported in set(inside(module, modules)):
            if rank(imported) > rank(module):
                problems.append(f"{module} imports {imported}, which is above it")
    return sorted(problems)


def purity_problems(modules: Mapping[str, str]) -> list[str]:
    return sorted(
        f"{module} is pure, but imports {name}"
        for module, source in modules.items()
        if is_pure(module)
        for name in imports(source)
        if name.partition(".")[0] in IMPURE and not (name == "numpy" and module in COMPUTES_WITH_NUMPY)
    )


def importer_problems(modules: Mapping[str, str]) -> list[str]:
    return sorted(
        f"{module} imports {name}; only {' and '.join(owners)} may"
        for module, source in modules.items()
        for name in imports(source)
        for prefix, owners in ONLY_IMPORTERS.items()
        if is_below(name, prefix) and not any(is_below(module, owner) for owner in owners)
    )


def cycle(modules: Mapping[str, str]) -> list[str]:
    """Modules on an import cycle, [] if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(set(inside(module, modules))):
            if found := visit(imported, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(modules) if (found := visit(module, []))), [])


def long_definitions(modules: Mapping[str, str]) -> list[str]:
    """Functions and classes of more lines than they may have."""
    return [
        f"{module}.{node.name}: {length} lines"
        for module, source in modules.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1)
        >= (CLASS_LINES_MAX if isinstance(node, ast.ClassDef) else FUNCTION_LINES_MAX)
    ]


def long_files(modules: Mapping[str, str]) -> list[str]:
    lengths = {module: len(source.splitlines()) for module, source in modules.items()}
    return [f"{module}: {length} lines" for module, length in lengths.items() if length >= FILE_LINES_MAX]


def test_every_module_has_a_rank_and_imports_only_downwards() -> None:
    assert direction_problems(sources()) == []


def test_no_import_cycles() -> None:
    assert cycle(sources()) == []


def test_pure_modules_import_no_clock_no_randomness_no_io_and_no_jax() -> None:
    assert purity_problems(sources()) == []


def test_orbax_tensorstore_multihost_utils_and_jax_internals_each_have_one_importer() -> None:
    assert importer_problems(sources()) == []


def test_functions_are_under_60_lines_and_classes_under_250() -> None:
    assert long_definitions(sources()) == []


def test_every_file_is_under_500_lines(capsys: pytest.CaptureFixture[str]) -> None:
    modules = sources()
    lengths = {module: len(source.splitlines()) for module, source in modules.items()}
    longest = max(lengths, key=lambda module: lengths[module])
    own = sum(length for module, length in lengths.items() if module.startswith("orchestrator"))
    with capsys.disabled():
        print(
            f"\nlongest file: {longest}, {lengths[longest]} lines; orchestrator {own} lines, "
            f"with launch {sum(lengths.values())} lines in {len(lengths)} files"
        )
    assert long_files(modules) == []


GOOD = {name: "" for name in ("orchestrator", "orchestrator.errors", "orchestrator.storage.port", "orchestrator.agent")}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("orchestrator.rules.journal", "from orchestrator.agent import Agent", "journal imports orchestrator.agent"),
        ("orchestrator.rules.journal", "from orchestrator import agent", "journal imports orchestrator.agent"),
        ("orchestrator.arrays", "import orchestrator.agent", "arrays imports orchestrator.agent"),
        ("orchestrator.policy", "def f():\n    from orchestrator import agent", "imports orchestrator.agent"),
        ("orchestrator.rules.keys", "if TYPE_CHECKING:\n    import orchestrator.storage.port", "storage.port"),
        ("orchestrator.rules.journal", "import os", "pure, but imports os"),
        ("orchestrator.rules.attempt", "from time import monotonic", "pure, but imports time.monotonic"),
        ("orchestrator.policy", "import jax.tree_util", "pure, but imports jax.tree_util"),
        ("orchestrator.storage.gcs_replies", "import socket", "pure, but imports socket"),
        ("orchestrator.rules.records", "from absl import logging", "pure, but imports absl.logging"),
        ("orchestrator.job.restore", "import tensorstore as ts", "only orchestrator.arrays may"),
        ("launch.train", "import orbax.checkpoint as ocp", "only orchestrator.arrays may"),
        ("orchestrator.agent", "from jax.experimental import multihost_utils", "only orchestrator.job.rendezvous may"),
        ("launch.train", "import jax\njax._src.distributed.global_state", "only orchestrator."),
    ],
)
def test_the_checker_sees_a_module_that_breaks_a_rule(module: str, source: str, found: str) -> None:
    modules = {**GOOD, module: source}
    problems = direction_problems(modules) + purity_problems(modules) + importer_problems(modules)
    assert any(found in problem for problem in problems), problems


def test_the_checker_sees_a_cycle_and_what_is_too_long() -> None:
    modules = {
        **GOOD,
        "orchestrator.agent": "import orchestrator.reader",
        "orchestrator.reader": "import orchestrator.agent",
        "orchestrator.errors": "def long():\n" + "    pass\n" * FUNCTION_LINES_MAX,
        "orchestrator.texts": "class Long:\n" + "    pass\n" * CLASS_LINES_MAX,
        "orchestrator.rules.keys": "#\n" * FILE_LINES_MAX,
    }
    assert cycle(modules) == ["orchestrator.agent", "orchestrator.reader", "orchestrator.agent"]
    assert long_definitions(modules) == ["orchestrator.errors.long: 61 lines", "orchestrator.texts.Long: 251 lines"]
    assert long_files(modules) == ["orchestrator.rules.keys: 500 lines"]


def test_a_module_outside_the_rooms_fails_the_test() -> None:
    with pytest.raises(KeyError):
        direction_problems({**GOOD, "orchestrator.newcomer": "import orchestrator.errors"})
