"""`orchestrator launch`: the `launch` package, found by its place.

Users have a `launch.py` or a folder `launch/` of their own, in the working directory or on PYTHONPATH. `import launch`
and `python -m launch` take that one, and run it. Ours is installed beside this package, and is loaded from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import orchestrator
from orchestrator.errors import UsageError

NAME = "launch"
ABOUT = "start a job: local, slurm, gke, tpu-vm (launch --help)"


def run(words: Sequence[str]) -> int:
    """Run what follows `orchestrator launch`, and return its exit code. Raises UsageError where it is not installed."""
    # By name: nothing in this package may depend on `launch`, which stands above it.
    try:
        load()
        programs = importlib.import_module("launch.programs")
        engines = None
        if not words or words[0] not in programs.PROGRAMS:  # a probe needs no engine
            engines = importlib.import_module("launch.__main__")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    code: int = engines.main(["launch", *words]) if engines else programs.run(words)
    return code


def load(beside: Path | None = None) -> None:
    """Have `import launch` mean the package beside ours, from now on in this process."""
    home = (beside or Path(orchestrator.__file__).parents[1]) / NAME
    start = home / "__init__.py"
    known = getattr(sys.modules.get(NAME), "__file__", None)
    if known is not None and Path(known) == start:
        return
    spec = importlib.util.spec_from_file_location(NAME, start, submodule_search_locations=[str(home)])
    if spec is None or spec.loader is None or not start.is_file():
        raise UsageError(f"launch: expected the package at {home}; install checkpoint-orchestrator again, whole")
    for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
        del sys.modules[name]  # another's
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
