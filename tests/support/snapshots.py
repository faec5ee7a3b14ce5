"""What lies below a directory, to compare before and after."""

from __future__ import annotations

import hashlib
from pathlib import Path


def snapshot(root: Path) -> dict[str, str]:
    """Every file and directory below `root` with a digest of its content: equal snapshots mean nothing changed.
    Events are no part of a run's state: they are left out."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if "events" not in path.relative_to(root).parts):
        name = str(path.relative_to(root))
        found[name] = "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found
