"""Programs of ours that `orchestrator launch` and `python -m launch` run, beside the engines.

Imports little: a health probe runs every few seconds beside the job.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

_HELP = ("-h", "-help", "--help", "--helpfull")
_BROKEN_PIPE = 128 + 13
# Name -> (module, about). Each is `python -m MODULE`, too.
PROGRAMS = {
    "train": ("launch.train", "the example job, to go after the --: a transformer, its data and checkpoints"),
    "demo": ("launch.demo", "four simulated hosts, one killed in the middle of a save, resumed on two"),
    "health": ("launch.health", "for probes: does the job in this container still make progress?"),
    "gcs-emulator": ("launch.gcs_emulator", "an emulated Cloud Storage, for tests"),
}
# Of the extra `train`, which a plain install does not have.
NEEDS = {"train": ("flax", "optax"), "demo": ("flax", "matplotlib", "optax")}


def run(words: Sequence[str]) -> int:
    """Run one of PROGRAMS with its arguments. Most end the process themselves, with their own exit code."""
    if missing := [name for name in NEEDS.get(words[0], ()) if find_spec(name) is None]:
        need = f"needs {' and '.join(missing)}, of the `train` extra: pip install {' '.join(missing)}"
        print(f"launch {words[0]}: {need}", file=sys.stderr)
        return 2
    sys.argv = [f"orchestrator launch {words[0]}", *words[1:]]
    asked = any(word in _HELP for word in words[1:])
    try:
        _run_module(PROGRAMS[words[0]][0], flush=asked)
    except BrokenPipeError:
        if not asked:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # not at exit once more
        return _BROKEN_PIPE
    return 0


def _run_module(name: str, *, flush: bool) -> None:
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit:
        if flush:  # whoever reads a help may have seen enough of it (`| head`)
            sys.stdout.flush()
        raise


def command(name: str) -> list[str]:
    """The command line of one of PROGRAMS, for a child process. -P: the working directory may hold another `launch`."""
    return [sys.executable, "-P", "-m", "orchestrator", "launch", name]
