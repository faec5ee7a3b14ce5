"""Small runs in one process, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

import orchestrator as oc
from orchestrator.catalog import Catalog
from orchestrator.records import Head
from orchestrator.storage import PosixStorage

LIKE = {"w": jnp.zeros(4), "count": 0}


def state(step: int) -> dict[str, Any]:
    return {"w": jnp.full(4, float(step)), "count": step}


def journal_of(root: Path) -> list[Head]:
    return list(Catalog(PosixStorage(str(root)), "test").entries())


def kinds(root: Path) -> list[str]:
    return [head.event.kind for head in journal_of(root)]


def now(**more: Any) -> oc.Options:
    return oc.Options(**{"async_save": False, "on_save_failure": "raise", **more})


def fill(root: Path, *steps: int, **arguments: Any) -> None:
    """A run with these steps."""
    with oc.Agent(root, options=now(), **arguments) as agent:
        for step in steps:
            assert agent.save(step, state(step), extra={"at": step}, process_state=f"reader at {step}".encode())
