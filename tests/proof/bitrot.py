"""Damages a committed step in seeded ways, restores, and looks whether a wrong bit got through.

    python -m tests.proof.bitrot --faults=700 --seed=1 --report=bitrot.md

The run: three steps of a job of two processes. Each fault hits one file of the newest step's attempt, whichever it is:
data, store metadata, records, process states. Then, from the same damaged files: `verify` must find it; a restarted
agent restores what it thinks is good, and every bit of that is compared; plain Orbax loads the step's directory, too.
Ends with 1 if a wrong bit was restored, or `verify` missed a fault.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

import orchestrator as oc
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.tools.verify import read_back
from tests.support.processes import job

PAGE = 4096
NEWEST = 2
LIKE: Any = {
    "w": np.zeros((16, 8), np.float32),
    "bf16": np.zeros((16, 8), jnp.bfloat16),
    "bias": np.zeros(8, np.float32),
    "big": np.zeros((512, 64), np.float32),
    "host_local": np.float32(0),
    "numpy": np.zeros(3, np.int64),
    "count": 0,
}


@dataclass(frozen=True)
class Fault:
    """`file`: relative to the attempt. `body`: what stands there now; None: nothing."""

    kind: str
    file: str
    body: bytes | None


def flip(body: bytes, other: bytes, chance: random.Random) -> bytes:
    changed = bytearray(body)
    changed[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def swap(body: bytes, other: bytes, chance: random.Random) -> bytes:
    """Two neighbouring bytes change places: sums and parities stay the same."""
    changed = bytearray(body)
    at = chance.randrange(max(1, len(body) - 1))
    changed[at : at + 2] = changed[at : at + 2][::-1]
    return bytes(changed)


def zero_page(body: bytes, other: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(0, len(body), PAGE)
    return body[:start] + bytes(len(body[start : start + PAGE])) + body[start + PAGE :]


def truncate(body: bytes, other: bytes, chance: random.Random) -> bytes:
    return body[: chance.randrange(len(body))]


def missing(body: bytes, other: bytes, chance: random.Random) -> None:
    return None


def of_another_step(body: bytes, other: bytes, chance: random.Random) -> bytes:
    """What a careless copy leaves: whole and valid, in the wrong place."""
    return other


KINDS: dict[str, Callable[[bytes, bytes, random.Random], bytes | None]] = {
    "one bit flipped": flip,
    "two bytes swapped": swap,
    "a page zeroed": zero_page,
    "file cut": truncate,
    "file missing": missing,
    "file of another step": of_another_step,
    "stale manifest": of_another_step,
}


def make_run(base: Path) -> Path:
    """Three committed steps of two processes."""
    root = base / "run"
    with job(2, 1, root, base / "logs", mesh="2x1", steps=NEWEST + 1, keep=9, big=1) as running:
        assert running.wait(90) == [0, 0], running.story()
    return root


def attempt(root: Path, step: int) -> Path:
    (found,) = (root / "steps" / f"{step:08d}").iterdir()
    return found


def twin(root: Path, file: str, chance: random.Random) -> bytes:
    """The file of an older step that has this one's role. Data files have random names: one of the same directory."""
    older = attempt(root, chance.randrange(NEWEST))
    if "/d/" not in file:
        return (older / file).read_bytes()
    beside = sorted((older / file).parent.iterdir())
    size = (attempt(root, NEWEST) / file).stat().st_size
    return min(beside, key=lambda path: abs(path.stat().st_size - size)).read_bytes()


def draw(root: Path, seed: int) -> Fault:
    """One fault that changes something. Half of those that choose a file choose one with array data."""
    chance = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    newest = attempt(root, NEWEST)
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    data = [name for name in files if "/d/" in name]
    while True:
        name = chance.choice(data if chance.random() < 0.5 else files)
        name = "manifest.json" if kind == "stale manifest" else name
        before = (newest / name).read_bytes()
        after = KINDS[kind](before, twin(root, name, chance), chance)
        if after != before:
            return Fault(kind, name, after)


def plain_orbax(state: Path, wanted: dict[str, np.ndarray[Any, Any]]) -> str:
    """What Orbax makes of the directory: right, WRONG, or rejected."""
    like = {name: wanted[name] for name in LIKE if name not in ("count", "host_local")}
    args = ocp.checkpoint_utils.construct_restore_args(like)
    try:
        got = ocp.PyTreeCheckpointer().restore(
            state, args=ocp.args.PyTreeRestore(item=like, restore_args=args, partial_restore=True)
        )
    except Exception:
        return "refused"
    return "right" if all(same(got[name], like[name]) for name in like) else "WRONG"


def same(got: Any, wanted: Any) -> bool:
    return np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


_FOUND_BY = (
    (r"manifest does not list", "the manifest's list of files"),
    (r"belongs to another save", "chunk's CRC, against the manifest"),
    (r"crc32c [0-9a-f]{8}, written", "chunk's own CRC"),
    (r"manifest\.json: crc32c is|manifest\.json: is missing", "the journal's CRC of the manifest"),
    (r"bytes, the manifest says|is missing, the manifest", "sizes in the manifest"),
    (r"is missing", "sizes in the manifest"),
    (r"bytes with crc32c", "the manifest's CRC of the file"),
    (
        r"OCDBT store|its header has|it ends with|DATA_LOSS|cannot be (read|opened)|has \d+ bytes, expected",
        "the store's own checksums",
    ),
    (r"edited or damaged|do not end in a checksum", "the record's CRC"),
)


def found_by(text: str) -> str:
    return next((name for pattern, name in _FOUND_BY if re.search(pattern, text)), f"other: {text[:80]}")


@dataclass(frozen=True)
class Outcome:
    fault: Fault
    restore: str
    found_by: str
    verified: bool
    orbax: str


def play(root: Path, reference: dict[int, dict[str, Any]], seed: int, scratch: Path, orbax: bool = True) -> Outcome:
    """Damage a copy of the run, and see what verify, a restart and plain Orbax say."""
    fault = draw(root, seed)
    copy = scratch / str(seed)
    shutil.copytree(root, copy)
    target = attempt(copy, NEWEST) / fault.file
    target.unlink()
    if fault.body is not None:
        target.write_bytes(fault.body)
    store = JournalStore(PosixStorage(str(copy)), "bitrot")
    live = store.find(NEWEST)
    assert live is not None
    verified = bool(read_back(store, live).damaged)
    by_orbax = plain_orbax(attempt(copy, NEWEST) / "state", reference[NEWEST]) if orbax else ""
    try:
        with oc.Agent(copy) as agent:
            restored = agent.restore(LIKE)
        assert restored is not None
        right = all(same(restored.state[name], reference[restored.step][name]) for name in LIKE)
        right = right and restored.process_states == reference[restored.step]["process_states"]
        unharmed = restored.step == NEWEST
        restore = "WRONG" if not right else "not needed, right bits" if unharmed else "stepped down, right bits"
    except oc.OrchestratorError as error:
        restore = f"raised {type(error).__name__}"
    events = [head.event for head in store.entries() if head.event.kind == "quarantined"]
    told = found_by(events[0].reason) if events else ""
    shutil.rmtree(copy)
    return Outcome(fault, restore, told, verified, by_orbax)


def references(root: Path) -> dict[int, dict[str, Any]]:
    reader = oc.open_run(root)
    found = {}
    for step in range(NEWEST + 1):
        restored = reader.restore(LIKE, step=step)
        found[step] = {**restored.state, "process_states": restored.process_states}
    return found


def campaign(count: int, seed: int, base: Path, orbax: bool = True) -> Iterator[Outcome]:
    root = make_run(base)
    reference = references(root)
    for number in range(count):
        yield play(root, reference, seed * 100_000 + number, base / "copies", orbax)


def wrong(outcome: Outcome) -> bool:
    return outcome.restore not in ("not needed, right bits", "stepped down, right bits") or not outcome.verified


def report(outcomes: list[Outcome], seed: int) -> str:
    lines = [
        "| fault | faults | found by `verify` | restore | what found it at the restore | plain Orbax, same files |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        mine = [one for one in outcomes if one.fault.kind == kind]
        cells = [
            ", ".join(f"{name}: {number}" for name, number in collections.Counter(values).most_common())
            for values in (
                [one.restore for one in mine],
                [one.found_by for one in mine if one.found_by],
                [one.orbax for one in mine],
            )
        ]
        lines.append(f"| {kind} | {len(mine)} | {sum(one.verified for one in mine)} | " + " | ".join(cells) + " |")
    bad = [one for one in outcomes if wrong(one)]
    files = len({re.sub(r"/d/.*", "/d/*", one.fault.file) for one in outcomes})
    lines += ["", f"{len(outcomes)} faults with seed {seed} on {files} kinds of files; {len(bad)} silent."]
    return "\n".join([*lines, *(f"- {one.fault.kind} of {one.fault.file}: {one.restore}" for one in bad)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=700)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.faults < 1:
        parser.error(f"--faults={args.faults}: expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="bitrot-") as scratch:
        for one in campaign(args.faults, args.seed, Path(scratch)):
            outcomes.append(one)
            if wrong(one) or len(outcomes) % 50 == 0:
                print(f"{len(outcomes):4} {one.fault.kind} of {one.fault.file}: {one.restore}", flush=True)
    table = report(outcomes, args.seed)
    print(table)
    if args.report:
        args.report.write_text(table)
    return 1 if any(map(wrong, outcomes)) else 0


if __name__ == "__main__":
    sys.exit(main())
