"""Where on a host is what was fetched for a restore (`prefetch`): beside the directories of its processes, as if a
process that no job has had written it, and without a log. Whoever looks for files of an attempt there finds it."""

from __future__ import annotations

import os

from absl import logging

from orchestrator.errors import OrchestratorError
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.run import survey, tier_directory
from orchestrator.storage import PosixStorage

PROCESS = 999_999_999


def of_run(directory: str | None, run: str) -> str:
    return tier_directory.of_process(directory, run, PROCESS)


def beside(own: str) -> str:
    """On the host of the process whose directory is `own`."""
    return os.path.join(os.path.dirname(own), f"process-{PROCESS}")


def forget(path: str, but: AttemptId | None = None) -> None:
    """Free what is there, `but` of one attempt: once all have restored, it is of no use. Never raises."""
    if not os.path.lexists(path):
        return
    try:
        tier_directory.check_path(path)
        storage = PosixStorage(path)
        for attempt in survey.attempts(storage):
            if attempt != but:
                keys = [entry.key for entry in storage.list(attempt.prefix)]
                for key in sorted(keys, key=lambda key: (key != attempt.manifest_key, key)):  # by which it is found
                    storage.delete(key)
    except OrchestratorError as error:
        logging.warning("%s: what was fetched for a restore stays for now: %s", path, error)
