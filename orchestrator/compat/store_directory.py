"""The directory of a run in an object store: a path like any other, but where Orbax has a directory for each step, ours
raises. What looks there for files of a step must not take their absence for an answer."""

from __future__ import annotations

import os
import re
from typing import Any

from orchestrator.arrays.format import orbax_api
from orchestrator.errors import UsageError

_STEP = re.compile(r"(?:.*_)?[0-9]+")


class StoreDirectory(os.PathLike[str]):
    """Of `url`, as `CheckpointManager.directory` is in Orbax."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __fspath__(self) -> str:
        return self._url

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"StoreDirectory({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return os.fspath(other) == self._url if isinstance(other, str | os.PathLike) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str | os.PathLike[str]) -> Any:
        first = os.fspath(name).partition("/")[0]
        if _STEP.fullmatch(first):
            raise UsageError(
                f"{self._url}/{os.fspath(name)}: in a store a run has no directory for a step; ask "
                "manager.item_metadata(step), manager.metrics(step) or manager.metadata(step) what the step holds"
            )
        return orbax_api.path(self._url) / name

    def joinpath(self, *names: str | os.PathLike[str]) -> Any:
        joined: Any = self
        for name in names:
            joined = joined / name
        return joined

    def iterdir(self) -> Any:
        raise UsageError(f"{self._url}: in a store a run has no directories for steps; use manager.all_steps()")

    glob = rglob = iterdir

    def __getattr__(self, name: str) -> Any:
        return getattr(orbax_api.path(self._url), name)
