"""The other rooms use what `orchestrator.arrays` gives, and a few modules of it whole."""

from __future__ import annotations

import orchestrator.arrays
from tests.test_layout_rules import imports, is_below, sources

WHOLE_NAMES = (
    "fingerprint",
    "jax_context",
    "jax_internals",
    "format.orbax_api",
    "format.orbax_json",
    "format.orbax_v1",
)
WHOLE = tuple(f"orchestrator.arrays.{name}" for name in WHOLE_NAMES)


def strays(modules: dict[str, str]) -> list[str]:
    given = {f"orchestrator.arrays.{name}" for name in orchestrator.arrays.__all__}
    return [
        f"{module} imports {name}"
        for module, source in modules.items()
        for name in imports(source)
        if not is_below(module, "orchestrator.arrays") and is_below(name, "orchestrator.arrays")
        if name not in {"orchestrator.arrays", *given} and not any(is_below(name, whole) for whole in WHOLE)
    ]


def test_no_room_reaches_into_arrays() -> None:
    assert strays(sources()) == []
    assert strays({"orchestrator.agent": "from orchestrator.arrays.tree import flatten"}) != []
