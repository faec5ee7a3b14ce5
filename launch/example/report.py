"""What a training run reports: a line for each step and each save on standard output, and a summary at its end."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_LINE = re.compile(r"step (\d+) +(?:loss (\S+)|saving)(?: +batch (\w+))?(?: +digest (\w+))?")


@dataclass(frozen=True)
class ProgressLine:
    """One line of progress: `loss` of a trained step, or None where a save of the step has started.

    `batch`: checksum of the global batch; `digest`: that of the state being saved; both only with --digests.
    """

    step: int
    loss: float | None = None
    batch: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        what = "saving" if self.loss is None else f"loss {self.loss:.6f}"
        batch = f"  batch {self.batch}" if self.batch else ""
        digest = f"  digest {self.digest}" if self.digest else ""
        return f"step {self.step:<5} {what}{batch}{digest}"

    @classmethod
    def parse(cls, text: str) -> ProgressLine | None:
        """The line that was printed as `text`; None for any other text."""
        found = _LINE.fullmatch(text)
        if not found:
            return None
        step, loss, batch, digest = found.groups()
        return cls(int(step), None if loss is None else float(loss), batch, digest)


@dataclass
class Summary:
    """How a run went. Steps are keys; `restored_*` are None if it started from nothing; digests are `state_digest`'s.

    losses, batches: of the steps trained here. saved_digests: of the states handed to saves (with --digests).
    restored_from: where arrays were read: `store`, `memory`, `peers`. interrupted_saves: saves that did not commit.
    latest_step: the newest in the store.
    """

    process_count: int
    device_count: int
    mesh: dict[str, int]
    start_step: int = 0
    restored_step: int | None = None
    restored_digest: str | None = None
    restored_from: list[str] = field(default_factory=list)
    final_step: int | None = None
    losses: dict[int, float] = field(default_factory=dict)
    batches: dict[int, str] = field(default_factory=dict)
    saved_digests: dict[int, str] = field(default_factory=dict)
    state_digest: str = ""
    latest_step: int | None = None
    interrupted_saves: int = 0
    preempted: bool = False

    def write(self, path: Path) -> None:
        """Put the summary at `path` in one step: a reader sees all of it or the file before."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(asdict(self), indent=1))
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Summary:
        fields: dict[str, Any] = json.loads(path.read_text())
        for name in ("losses", "batches", "saved_digests"):  # JSON's keys are strings
            fields[name] = {int(step): value for step, value in fields[name].items()}
        return cls(**fields)


def state_digest(state: Any, mesh: Mesh) -> str:
    """SHA-256 of the whole state's paths, types, shapes and bits, however it is sharded. A collective: all call it."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(state)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        value = np.asarray(leaf.addressable_data(0))
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
