"""Errors of JAX and numpy about one leaf of thousands name it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.errors import OrchestratorError
from orchestrator.rules.records import LeafSpec


@contextlib.contextmanager
def about(leaf: LeafSpec) -> Iterator[None]:
    """Whatever goes wrong inside is an error that names the leaf; a lack of memory, and errors of ours, stay as they
    are."""
    try:
        yield
    except (OrchestratorError, MemoryError):
        raise
    except Exception as error:
        raise named(leaf, error) from error


def named(leaf: LeafSpec, error: Exception) -> OrchestratorError:
    return OrchestratorError(f"{leaf.label}: {type(error).__name__}: {error}")
