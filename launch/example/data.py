"""The example job's data: real text that every machine has, as batches whose position can be saved and restored.

A batch is a function of (text, seed, batch size, length, position) and of nothing else: not of the mesh, nor of the
number of processes. So a job that resumes on other hosts goes on with exactly the batches it had not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import orchestrator as oc

TEXT_LIMIT_BYTES = 16 * 2**20
# Not part of every installation, so not part of the text.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests"})


def read_text(directory: Path | None = None) -> bytes:
    """All files below `directory` in the order of their names, or the standard library's sources; the first 16 MiB.

    Raises UsageError if there is no such directory, or if it cannot be read.
    """
    if directory is None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        return _join(_files(stdlib, ".py", NOT_STDLIB))
    if not directory.is_dir():
        raise oc.UsageError(f"--data={directory}: not a directory; expected one with text files")
    try:
        return _join(_files(directory))
    except OSError as error:
        raise oc.UsageError(f"--data={directory}: {error.filename}: {error.strerror}") from error


def _files(directory: Path, suffix: str = "", without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """In the order of their paths' parts. Looks no further than it is asked to: site-packages may hold 50,000 files."""
    with os.scandir(directory) as found:
        entries = sorted((entry for entry in found if entry.name not in without), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), suffix, without)
        elif entry.name.endswith(suffix) and entry.is_file():
            yield Path(entry.path)


def _join(paths: Iterable[Path]) -> bytes:
    text = bytearray()
    for path in paths:
        if len(text) >= TEXT_LIMIT_BYTES:
            break
        text += path.read_bytes()
    return bytes(text[:TEXT_LIMIT_BYTES])


class Loader:
    """Endless shuffled batches of windows of `text`: each window once a pass, in a new order on every pass."""

    def __init__(self, text: bytes, *, batch_size: int, length: int, seed: int) -> None:
        """`length`: predicted bytes per window. Raises UsageError if the text is too short for one batch."""
        self._text = np.frombuffer(text, np.uint8)
        self._windows = (len(text) - 1) // length
        if self._windows < batch_size:
            raise oc.UsageError(
                f"the text has {len(text)} bytes; a batch of {batch_size} windows of {length} needs "
                f"{batch_size * length + 1}: use more text or a smaller batch"
            )
        self._settings = {
            "text": hashlib.sha256(text).hexdigest()[:16],
            "batch_size": batch_size,
            "length": length,
            "seed": seed,
        }
        self._batch_size, self._length, self._seed = batch_size, length, seed
        self._pass, self._order = -1, np.empty(0, np.int64)
        self.position = 0  # batches taken

    def next(self) -> NDArray[np.int32]:
        """The next global batch, the same on every process: int32[batch_size, length + 1]."""
        number, batch = divmod(self.position, self._windows // self._batch_size)
        if number != self._pass:
            self._pass, self._order = number, np.random.default_rng([self._seed, number]).permutation(self._windows)
        self.position += 1
        windows = self._order[batch * self._batch_size :][: self._batch_size]
        at = windows[:, None] * self._length + np.arange(self._length + 1)
        tokens: NDArray[np.int32] = self._text[at].astype(np.int32)
        return tokens

    def state_bytes(self) -> bytes:
        """What `restore` needs to go on after the last batch taken."""
        return json.dumps({**self._settings, "position": self.position}).encode()

    def restore(self, states: Iterable[bytes]) -> None:
        """Go on where the saving processes were; they all took the same global batches, so one state speaks for all.

        Raises UsageError if text, seed or sizes are not those of the checkpoint, Damaged if the states differ.
        """
        distinct = set(states)
        if len(distinct) != 1:
            raise oc.Damaged(f"data: the checkpoint holds {len(distinct)} different data positions; expected one")
        saved = json.loads(distinct.pop())
        for name, value in self._settings.items():
            if saved[name] != value:
                raise oc.UsageError(
                    f"data: {name} is {value}, the checkpoint was trained with {saved[name]}; "
                    "give the same --data, --seed and sizes, or another --root"
                )
        self.position = saved["position"]
