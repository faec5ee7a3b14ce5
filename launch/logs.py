"""Where a job's logs go: `DIR/restart-R/host-I.log`, and never over the logs of an earlier run."""

from __future__ import annotations

from pathlib import Path

from launch.command import LaunchError

FIRST = "restart-0"
_TRIES = 100


def claim(log_dir: Path) -> Path:
    """The folder for one run's `restart-R` folders: `log_dir` itself for the first run there, then `log_dir/run-2` and
    so on. Its `restart-0` exists afterwards, and is nobody else's. Raises: LaunchError."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):  # another launcher may start at the same moment
            folder = _next(log_dir)
            try:
                (folder / FIRST).mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise LaunchError(f"--log_dir {log_dir}: {error.strerror}") from error
    raise LaunchError(f"--log_dir {log_dir}: {_TRIES} other launchers took their folders there first; try again")


def _next(log_dir: Path) -> Path:
    if not (log_dir / FIRST).exists():
        return log_dir
    numbers = [entry.name.removeprefix("run-") for entry in log_dir.glob("run-*")]
    return log_dir / f"run-{1 + max((int(text) for text in numbers if text.isascii() and text.isdecimal()), default=1)}"
