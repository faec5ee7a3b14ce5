"""Orbax's own tests of its v1 API for `tests/proof/orbax_suite.py`: the files, and why a case is not asked of ours."""

from __future__ import annotations

import unittest
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.proof import orbax_suite

_V1 = "checkpoint/orbax/checkpoint/experimental/v1/_src"
_INSIDE = "replaces insides of Orbax's own saving, or asks for its temporary directory"
_PRIVATE = "asks for the private `_manager`"
_OVER_TIME = "replaces `datetime.datetime` in the process, by which Orbax dates steps"


@dataclass(frozen=True)
class File:
    """One file of Orbax's tests. cases: the class of its cases. reasons, otherwise: as in `orbax_suite`."""

    name: str
    cases: str
    reasons: dict[str, str]
    otherwise: dict[str, str]


FILES = (
    File(
        f"{_V1}/training/checkpointer_test_base.py",
        "CheckpointerTestBase.Test",
        {
            "test_save_async$": _INSIDE,
            "test_preservation[0-9]": _OVER_TIME,
            "test_(cleanup_tmp|gcs_deletion|lightweight)": _PRIVATE,
            "test_save_async_raises_on": _PRIVATE,
            "test_context_constructor_override": "asks for Orbax's files without OCDBT",
        },
        {
            "test_preservation_metrics3": "a run is never emptied: without one that the policy keeps, the newest stays",
            "test_reload": "a step's directory is a view: without it, the step is still there",
        },
    ),
    File(
        f"{_V1}/testing/save_load_test.py",
        "SaveLoadTestSuite.SaveLoadTest",
        {
            "test_save_async$": _INSIDE,
            "test_async_(save_overall|directory|save_completes)": _INSIDE,
            "test_primary_host_background_error": _INSIDE,
            "test_overwrites": "asks for the texts that Orbax logs",
            "test_subchunking": "asks for the chunks that Orbax's own format has",
        },
        {
            "test_save_checkpointables_deleted": "the directory of an object is a view of what is committed",
            "test_empty_array": "an array without elements can be saved",
            "test_load_and_broadcast": "arrays come back onto their shardings without a target, with this option too",
        },
    ),
)


def run(checkout: Path, only: str, manager: str) -> list[orbax_suite.Outcome]:
    """As `orbax_suite.run`."""
    found = []
    for file in FILES:
        module = _load(checkout, file.name, manager)
        outer, _, inner = file.cases.partition(".")
        cases = getattr(getattr(module, outer), inner)
        if manager != "orbax":
            orbax_suite.compare_classes_of_errors(cases)
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(cases)
        found += orbax_suite.run_cases(suite, only, manager, file.reasons, file.otherwise)
    return found


def _load(checkout: Path, file: str, manager: str) -> Any:
    from orbax.checkpoint import v1 as theirs

    register = theirs.handlers.register_handler

    def once(kind: type, **more: Any) -> type:  # each file registers its handlers
        already = {each.__qualname__ for each, _ in theirs.handlers.global_registry().get_all_entries()}
        return kind if kind.__qualname__ in already else register(kind, **more)

    theirs.handlers.register_handler = once
    try:
        module = orbax_suite.load_module(checkout, file)
    finally:
        theirs.handlers.register_handler = register
    if manager != "orbax":
        from orchestrator.compat import v1

        module.ocp = v1
        module.Checkpointer = v1.training.Checkpointer
    return module
