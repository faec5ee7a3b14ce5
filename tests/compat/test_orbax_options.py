"""Every option of Orbax's manager: honoured, without effect and said, or rejected by name; beside Orbax itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from absl import logging

import orchestrator as oc
from orchestrator import compat
from orchestrator.compat import orbax_options, save_args

STATE = ocp.args.StandardSave({"w": jnp.ones(2)})
MADE = (ocp.CheckpointManagerOptions(), ocp.options.AsyncOptions(), ocp.options.MultiprocessingOptions())


def known(kind: str) -> list[str]:
    tables = (orbax_options.WITHOUT_EFFECT, orbax_options.ALREADY_SO, orbax_options.COUNTERPARTS)
    return [name for table in tables for name in table.get(kind, ())]


@pytest.mark.parametrize("made", MADE, ids=lambda made: type(made).__name__)
def test_it_is_said_of_every_option_of_this_orbax_what_becomes_of_it(made: Any) -> None:
    names = known(type(made).__name__)
    assert len(names) == len(set(names))
    assert {each.name for each in dataclasses.fields(made)} <= set(names)


@pytest.mark.parametrize("made", MADE, ids=lambda made: type(made).__name__)
def test_the_page_for_people_who_come_from_orbax_names_every_option(made: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/from-orbax.md").read_text()
    assert [name for name in known(type(made).__name__) if f"`{name}" not in page and f".{name}`" not in page] == []


def test_an_option_that_only_a_newer_orbax_has_is_rejected_by_name(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    table = {**orbax_options.COUNTERPARTS, "CheckpointManagerOptions": ("create",)}
    monkeypatch.setattr(orbax_options, "COUNTERPARTS", table)
    compat.CheckpointManager(root, options=ocp.CheckpointManagerOptions()).close()  # with its default, nothing is asked
    with pytest.raises(oc.UsageError, match=r"CheckpointManagerOptions\.max_to_keep came with a newer Orbax"):
        compat.CheckpointManager(root, options=ocp.CheckpointManagerOptions(max_to_keep=1))


OTHER_VALUES: dict[str, Any] = {
    "atomicity_options": lambda: ocp.options.AtomicityOptions(),
    "temporary_path_class": lambda: object,
    "file_options": lambda: ocp.options.FileOptions(path_permission_mode=0o700),
    "enable_per_process_directory_creation": lambda: True,
    "enable_should_save_is_saving_in_progress_check": lambda: False,
    "barrier_sync_fn": lambda: print,
    "create_directories_asynchronously": lambda: False,
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in orbax_options.WITHOUT_EFFECT.items() for name in names]
)
def test_an_option_without_effect_is_said_once(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr(save_args, "_said", set())
    default = ocp.CheckpointManagerOptions()
    if not hasattr(default if kind == "CheckpointManagerOptions" else ocp.options.AsyncOptions(), name):
        pytest.skip("not in this Orbax")
    if kind == "AsyncOptions":
        default.async_options = ocp.options.AsyncOptions(**{name: OTHER_VALUES[name]()})
    else:
        object.__setattr__(default, name, OTHER_VALUES[name]())
    for _ in range(2):
        compat.CheckpointManager(root, options=default).close()
    assert len([text for text in said if f"{kind}.{name} has no effect" in text]) == 1


def test_should_keep_fn_of_older_versions_keeps_steps_beside_the_others(root: Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    asked = lambda step: step == 1 or 1 // (step - 2) > 9  # noqa: E731 -- fails on step 2, which stays
    object.__setattr__(options, "should_keep_fn", asked)
    with compat.CheckpointManager(root, options=options) as manager:
        for step in range(5):
            manager.save(step, args=STATE)
        assert manager.all_steps() == [1, 2, 4]
