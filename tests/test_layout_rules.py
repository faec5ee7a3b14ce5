"""The shape of the sources, read from their syntax trees: who may import what, and how long things may get.

The direction is launch -> cli -> roles -> adapters -> ports -> pure. A module may import its own rank (without
cycles) and everything below, never above.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

PURE, PORTS, ADAPTERS, ROLES, FACADE, CLI, LAUNCH = range(7)
# Add a name to the end of its rank's last line.
_NAMES = {
    PURE: """errors layout records journal evidence protocol plan policy options chunks contents attest cadence forecast
        arguments texts json_words dtypes codec validate holders configuration storage.gcs_replies""",
    PORTS: """storage.base""",
    ADAPTERS: """storage storage.read_only storage.memory storage.directory storage.posix storage.gcs storage.gcs_client
        tree arrays arrays.store arrays.orbax arrays.foreign arrays.writing arrays.reading arrays.fingerprint
        arrays.ocdbt arrays.datafiles arrays.orbax_files arrays.localstore arrays.placing arrays.staging arrays.sharing
        arrays.feed arrays.planning arrays.merging arrays.dividing arrays.orbax_json arrays.compressed arrays.external
        arrays.stored_tree arrays.own_copies arrays.owned arrays.wanted arrays.buckets arrays.naming
        storage.gcs_credentials storage.gcs_identity
        jax_context overlap rendezvous environment events eventlog story metrics tracing telemetry failpoints heartbeat
        garbage sigterm leaving last_words""",
    ROLES: """compat orbax_manager orbax_items orbax_options adopt
        agent opening saving coordinator restore reader stored_step proof verify diff collect survey recover catalog
        pacing export orbax_steps agreeing meeting""",
}
RANKS = {name: rank for rank, names in _NAMES.items() for name in names.split()}
RANKS[""] = FACADE  # orchestrator/__init__.py gives the roles their public names
IMPURE = {
    *("os", "io", "time", "datetime", "random", "uuid", "secrets", "socket", "threading", "asyncio", "pathlib"),
    *("subprocess", "signal", "absl", "numpy", "orbax", "tensorstore", "etils"),
}
MAY_USE_JAX_TREES = frozenset({"plan"})
# Whoever imports one of these names (or anything below it) must be one of the modules given.
ONLY_IMPORTERS = {
    "orbax": ("orchestrator.arrays",),
    "tensorstore": ("orchestrator.arrays",),
    "etils": ("orchestrator.arrays",),
    "jax._src": ("orchestrator.job.rendezvous", "orchestrator.arrays"),
    "jaxlib": ("orchestrator.job.rendezvous",),
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
    return CLI if rest == "cli" or rest.startswith("cli.") else RANKS[rest]


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
    problems = []
    for module, source in modules.items():
        if rank(module) > PURE:
            continue
        for name in imports(source):
            top = name.partition(".")[0]
            jax_allowed = module.rpartition(".")[2] in MAY_USE_JAX_TREES
            if top in IMPURE or (top == "jax" and not jax_allowed):
                problems.append(f"{module} is pure, but imports {name}")
    return sorted(problems)


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


def long_functions(modules: Mapping[str, str]) -> list[str]:
    return [
        f"{module}.{node.name}: {length} lines"
        for module, source in modules.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) >= FUNCTION_LINES_MAX
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


def test_every_function_is_under_70_lines() -> None:
    assert long_functions(sources()) == []


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


GOOD = {"orchestrator": "", "orchestrator.errors": "", "orchestrator.storage.port": "", "orchestrator.agent": ""}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("orchestrator.rules.journal", "from orchestrator.agent import Agent", "journal imports orchestrator.agent"),
        ("orchestrator.rules.journal", "from orchestrator import agent", "journal imports orchestrator.agent"),
        ("orchestrator.arrays", "import orchestrator.agent", "arrays imports orchestrator.agent"),
        ("orchestrator.rules.journal", "def f():\n    from orchestrator import agent", "imports orchestrator.agent"),
        ("orchestrator.rules.journal", "if TYPE_CHECKING:\n    import orchestrator.storage.port", "storage.base"),
        ("orchestrator.rules.journal", "import os", "pure, but imports os"),
        ("orchestrator.rules.attempt", "from time import monotonic", "pure, but imports time.monotonic"),
        ("orchestrator.policy", "import jax.tree_util", "pure, but imports jax.tree_util"),
        ("orchestrator.rules.records", "from absl import logging", "pure, but imports absl.logging"),
        ("orchestrator.restore", "import tensorstore as ts", "only orchestrator.arrays may"),
        ("launch.train", "import orbax.checkpoint as ocp", "only orchestrator.arrays may"),
        ("orchestrator.agent", "from jax.experimental import multihost_utils", "only orchestrator.job.rendezvous may"),
        ("launch.train", "import jax\njax._src.distributed.global_state", "only orchestrator.job.rendezvous and"),
    ],
)
def test_the_checker_sees_a_module_that_breaks_a_rule(module: str, source: str, found: str) -> None:
    modules = {**GOOD, module: source}
    problems = direction_problems(modules) + purity_problems(modules) + importer_problems(modules)
    assert any(found in problem for problem in problems), problems


def test_the_checker_sees_a_cycle_a_long_function_and_a_long_file() -> None:
    modules = {
        **GOOD,
        "orchestrator.agent": "import orchestrator.restore",
        "orchestrator.restore": "import orchestrator.agent",
        "orchestrator.errors": "def long():\n" + "    pass\n" * FUNCTION_LINES_MAX,
        "orchestrator.plan": "#\n" * FILE_LINES_MAX,
    }
    assert cycle(modules) == ["orchestrator.agent", "orchestrator.restore", "orchestrator.agent"]
    assert long_functions(modules) == ["orchestrator.errors.long: 71 lines"]
    assert long_files(modules) == ["orchestrator.plan: 500 lines"]


def test_a_new_module_without_a_rank_fails_the_test() -> None:
    with pytest.raises(KeyError):
        direction_problems({**GOOD, "orchestrator.newcomer": "import orchestrator.errors"})
