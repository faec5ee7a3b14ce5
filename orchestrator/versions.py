"""The newest releases that were tested of the libraries whose internals or formats this package uses. The package asks
for no version below a bound of its own, as pip would then downgrade what a job has; a newer one is a warning, given
once. docs/versions.md has the table of what was run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import metadata

from absl import logging

TESTED = {"jax": "0.12", "orbax-checkpoint": "0.12", "tensorstore": "0.1"}  # all releases of these series
_asked = False


def newer(installed: Callable[[str], str] = metadata.version) -> Iterator[str]:
    """What is newer than everything tested, a line for each. What is not installed, or has no number, is not."""
    for name, tested in TESTED.items():
        try:
            have = installed(name)
        except (metadata.PackageNotFoundError, OSError):  # a word of advice, which nothing may fail at
            continue
        if _series(have) > _series(tested):
            yield f"{name} {have} is newer than any that this package was tested with ({tested})"


def warn_of_newer(installed: Callable[[str], str] = metadata.version) -> None:
    """Log `newer`, once in a process: it reads files of the packages, a few milliseconds."""
    global _asked
    if _asked:
        return
    _asked = True
    for line in newer(installed):
        logging.warning("%s; if something is amiss, look for a newer checkpoint-orchestrator", line)


def _series(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
