"""Whether this process may write to a run, found out without changing the run."""

from __future__ import annotations

import uuid

from absl import logging

from orchestrator import layout, overlap
from orchestrator.errors import StorageError
from orchestrator.overlap import Begun
from orchestrator.storage.base import Storage


def probe(storage: Storage) -> Begun[None]:
    """Create an object among the attempts, and begin to delete it: whether this process may save here at all. The
    journal needs no probe, as opening an epoch is one create in it. Raises StorageError; nothing is left then."""
    key = f"{layout.STEPS}.probe-{uuid.uuid4().hex}"
    storage.create(key, b"")

    def delete() -> None:
        try:
            storage.delete(key)
        except StorageError as error:  # saving needs no right to delete, retention does
            logging.warning("%s/%s: cannot be deleted, nor will old steps be: %s", storage.url, key, error)

    return overlap.begin(delete)
