"""Harm to stored files, as a disk or a person does it."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, fraction: float = 0.5) -> None:
    """One bit, so far into the file."""
    body = bytearray(path.read_bytes())
    body[int(len(body) * fraction)] ^= 4
    path.write_bytes(body)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
