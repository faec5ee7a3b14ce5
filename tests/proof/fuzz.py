"""Changes stored runs in seeded ways, by accident and by forgery, and looks what reading them ends in.

    python -m tests.proof.fuzz --mutations=2000 --seed=1 --report=fuzz.md

Five runs of three steps: plain, compressed, attested, and two adopted from Orbax. Each mutation is applied to a copy,
which is then restored, verified and shown by commands, in a process that may use 6 GB of address space and 10 s of a
processor. What may come out: the newest step as it was saved, an older one as it was saved, or an error of ours. Of a
forgery also a value that was signed as such: somebody who can write to the root can save a step. Whatever else comes
out is a failure, and ends this program with 1. `tests/proof/forged.py` has the cases that are known by name.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import orchestrator as oc
from orchestrator.cli.main import main as command
from orchestrator.compat.adopt import adopt
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.tools.verify import read_back
from tests.support.images import DIRECTORY, NEWEST, Image, accident, forgery

ADDRESS_SPACE = 6 << 30
SECONDS_MAX = 10.0  # of a processor, which a busy machine does not change
SILENT_S = 60.0  # without a sign of life a child hangs
BATCH = 200  # mutations that one child plays, unless it ends sooner
RUNS = ("plain", "compressed", "attested", "adopted", "adopted-zarr3")
COMMANDS = (["ls"], ["inspect"], ["log"], ["plan", "--mesh=data=2"])
RIGHT, OLDER, CLEAR, AS_SIGNED = "right", "older, right", "clear error", "as signed"
TOO_LONG = "took too long"
ALLOWED = frozenset((RIGHT, OLDER, CLEAR, AS_SIGNED))

State = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`change` says what it has done to the image of `run`. `forged`: checksums were made right again."""

    name: str
    run: str
    change: Callable[[Image], str | None]
    forged: bool


@dataclass(frozen=True)
class Outcome:
    case: str
    run: str
    forged: bool
    what: str
    outcome: str
    detail: str
    seconds: float
    peak_mb: int

    @property
    def good(self) -> bool:
        return self.outcome in ALLOWED


# Runs.


def state(step: int) -> State:
    return {
        "w": jnp.arange(4096, dtype=jnp.float32).reshape(64, 64) + step,
        "b": {"s": jnp.full(8, step, jnp.float32), "k": jax.random.key(step)},
        "n": np.arange(6, dtype=np.int16) + step,
        "same": jnp.full(1000, step, jnp.float32),
        **{"i": step, "f": step / 3, "name": f"step {step}", "raw": bytes([step]), "none": None, "e": []},
    }


def make_runs(base: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    for name in RUNS[:3]:
        options = oc.Options(
            async_save=False,
            on_save_failure="raise",
            compression=name == "compressed",
            attest="save" if name == "attested" else "off",
        )
        with oc.Agent(base / name, options=options) as agent:
            for step in range(1, NEWEST + 1):
                agent.save(step, state(step), metrics={"loss": 1 / step}, extra={"at": step}, process_state=b"reader")
    import orbax.checkpoint as ocp  # slow, and needed here only

    for name, handler in zip(
        RUNS[3:], (None, ocp.PyTreeCheckpointHandler(use_zarr3=True, use_ocdbt=False)), strict=True
    ):
        source = base / "orbax" / name
        more = {} if handler is None else {"item_handlers": handler}
        with ocp.CheckpointManager(source, **more) as manager:
            for step in range(1, NEWEST + 1):
                kept = {key: value for key, value in state(step).items() if key not in ("raw", "none", "e")}
                manager.save(step, args=ocp.args.PyTreeSave(kept), metrics={"loss": 1 / step})
        adopt(JournalStore(PosixStorage(str(base / name)), "fuzz"), str(source))


def image_of(root: Path) -> dict[str, bytes]:
    """Events are no part of a run."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    found = {str(path.relative_to(root)): path.read_bytes() for path in paths}
    return {name: body for name, body in found.items() if name.startswith(("journal/", "steps/"))}


# What reading ends in.


def summary(restored: oc.Restored) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(restored.state, is_leaf=lambda value: value is None)[0]:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        told = repr(value)
        if hasattr(value, "dtype"):
            array = np.asarray(value)
            told = f"{array.dtype}{list(array.shape)} {zlib.crc32(array.tobytes()):08x}"
        leaves[jax.tree_util.keystr(path)] = told
    beside = {name: value for name, value in restored.extra.items() if name != "timestamp"}
    processes = {str(process): body.hex() for process, body in restored.process_states.items()}
    return {"leaves": leaves, "metrics": restored.metrics, "extra": beside, "processes": processes}


class Judge:
    """What a changed run is compared with: what its steps were."""

    def __init__(self, root: Path, commands: bool) -> None:
        self._root, self._commands = root, commands
        self._attest = root.name == "attested"
        self._clean = {step: json.dumps(summary(self._restore(step)), sort_keys=True) for step in range(1, NEWEST + 1)}
        arrays = [json.loads(text)["leaves"].values() for text in self._clean.values()]
        self._bits = {told.split()[-1] for leaves in arrays for told in leaves if "[" in told}

    def _restore(self, step: int | None = None) -> oc.Restored:
        return oc.open_run(self._root).restore(step=step, attest=self._attest)

    def __call__(self, case: Case, begins: Callable[[], None]) -> tuple[str, str]:
        """(outcome, what was said). Calls `begins` before each thing that has the time to itself."""
        begins()
        outcome, detail, newest = self._restored(case)
        if outcome not in ALLOWED:
            return outcome, detail
        begins()
        try:
            verdict = self._verified()
        except oc.OrchestratorError as error:
            verdict = f"{type(error).__name__}: {error}"
        except BaseException as error:
            return "other error", f"verify: {_told(error)}"
        if verdict == "good" and not newest and "UsageError" not in detail:
            return "verify says good, restore does not", detail
        if not detail and verdict != "good":
            detail = verdict
        for name, *flags in COMMANDS if self._commands else ():
            begins()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    command(["orchestrator", name, str(self._root), *flags])
            except SystemExit:
                pass
            except BaseException as error:
                return "other error", f"{name}: {_told(error)}"
        return outcome, detail

    def _restored(self, case: Case) -> tuple[str, str, bool]:
        try:
            restored = self._restore()
            found = json.dumps(summary(restored), sort_keys=True)
        except oc.OrchestratorError as error:
            return CLEAR, f"{type(error).__name__}: {error}", False
        except BaseException as error:
            return "other error", f"restore: {_told(error)}", False
        newest = restored.step == NEWEST
        if self._clean.get(restored.step) == found:
            return RIGHT if newest else OLDER, "", newest
        leaves = json.loads(found)["leaves"]
        strange = {name: told for name, told in leaves.items() if "[" in told and told.split()[-1] not in self._bits}
        empty = {name for name, told in strange.items() if told.endswith(" 00000000")}  # no elements
        unsigned = case.run.startswith("adopted")  # Orbax's chunks have no checksums of their own: a forger signs any
        if case.forged and (unsigned or strange.keys() <= empty):
            return AS_SIGNED, f"step {restored.step}", newest
        return "WRONG VALUE", f"step {restored.step}: {strange or found}", newest

    def _verified(self) -> str:
        store = JournalStore(PosixStorage(str(self._root)), "fuzz")
        live = store.find(None)
        if live is None or live.step != NEWEST:
            return "not the newest"
        verdict = read_back(store, live)
        return "good" if verdict.good else "; ".join([*verdict.damaged, *verdict.unread])


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames) if "orchestrator" in one.filename]
    return f"{type(error).__name__}: {str(error)[:200]} at {' < '.join(where[:4])}"


# Playing.


def apply(root: Path, image: Image) -> None:
    for name, body in image.changed.items():
        path = root / name
        if body is None or body is DIRECTORY:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # where it was the last one
    for name, body in image.changed.items():
        path = root / name
        if body is DIRECTORY:
            path.mkdir(parents=True)
        elif isinstance(body, bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
    for action in image.after:
        action(root)


def undo(root: Path, image: Image, pristine: Path) -> None:
    if image.after:
        shutil.rmtree(root)
        shutil.copytree(pristine, root)
        return
    for name, body in image.changed.items():
        path = root / name
        if body is DIRECTORY:
            path.rmdir()
        elif isinstance(body, bytes):
            path.unlink(missing_ok=True)
    for name in image.changed:
        path = root / name
        if name in image.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.files[name])


def serve(cases: Sequence[Case], pristine: Path, root: Path, commands: bool, pipe: int) -> None:
    """A child's work: play cases one after the other, and report each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    logging.set_verbosity(logging.FATAL)
    files = image_of(pristine)
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(pristine, root)
    judge = Judge(root, commands)
    for case in cases:
        image = Image(files)
        what = case.change(image) or case.name
        apply(root, image)
        times: list[float] = []

        def begins(times: list[float] = times) -> None:
            times.append(time.process_time())
            os.write(pipe, b"\n")

        outcome, detail = judge(case, begins)
        times.append(time.process_time())
        seconds = max(after - before for before, after in itertools.pairwise(times))
        outcome = TOO_LONG if seconds >= SECONDS_MAX and outcome in ALLOWED else outcome
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        told = Outcome(case.name, case.run, case.forged, what, outcome, detail[:1000], round(seconds, 2), peak)
        os.write(pipe, json.dumps(asdict(told)).encode() + b"\n")
        undo(root, image, pristine)


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """(pid, pipe to read from). The parent must never have used JAX or TensorStore: their threads do not fork."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            work(writing)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    return pid, reading


def lines(pipe: int, patience_s: float) -> Iterator[bytes]:
    """What comes out of a pipe, b"" where nothing has come for so long or it has ended."""
    left, started = b"", True
    while True:
        limit = 120.0 if started else patience_s  # JAX starts, and the clean steps are read
        ready, _, _ = select.select([pipe], [], [], limit)
        part = os.read(pipe, 1 << 16) if ready else b""
        if not part:
            yield b""
            return
        *whole, left = (left + part).split(b"\n")
        started = False
        yield from (line or b" " for line in whole)


def play(cases: Sequence[Case], base: Path, *, commands: bool = False, alone: bool = False) -> Iterator[Outcome]:
    """The outcome of each case, all of one run, in children. `alone`: each in one of its own."""
    left = list(cases)
    while left:
        batch = left[: 1 if alone else BATCH]
        pristine, root = base / batch[0].run, base / "copies" / batch[0].run
        pid, pipe = in_child(lambda writing: serve(batch, pristine, root, commands, writing))  # noqa: B023
        done, started = 0, time.monotonic()
        for line in lines(pipe, SILENT_S):
            if line.strip():
                yield Outcome(**json.loads(line))
                done += 1
            elif line:
                started = time.monotonic()
            if done == len(batch):
                break
        seconds = time.monotonic() - started
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(pipe)
        _, status = os.waitpid(pid, 0)
        if done < len(batch):
            case, how = batch[done], TOO_LONG if seconds >= SILENT_S else f"ended with status {status}"
            yield Outcome(case.name, case.run, case.forged, case.name, how, "", round(seconds, 2), 0)
            done += 1
        left = left[done:]


def drawn(seed: int) -> Case:
    """One mutation. Of two, one is an accident and one a forgery."""
    chance = random.Random(f"fuzz {seed}")
    run, forged = RUNS[seed // 2 % len(RUNS)], seed % 2 == 1
    return Case(f"mutation {seed}", run, lambda image: (forgery if forged else accident)(image, chance), forged)


def campaign(cases: Iterable[Case], base: Path, **how: bool) -> Iterator[Outcome]:
    by_run = collections.defaultdict(list)
    for case in cases:
        by_run[case.run].append(case)
    for of_run in by_run.values():
        yield from play(of_run, base, **how)


@contextlib.contextmanager
def runs() -> Iterator[Path]:
    """A folder with all runs in it, made by a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        base = Path(scratch)
        pid, pipe = in_child(lambda writing: make_runs(base))
        _, status = os.waitpid(pid, 0)
        os.close(pipe)
        assert status == 0, "the runs could not be made"
        (base / "copies").mkdir()
        yield base


# The report.


def report(drawn_ones: Sequence[Outcome], forged: Sequence[Outcome], seed: int) -> str:
    names = [RIGHT, OLDER, CLEAR, AS_SIGNED, *sorted({one.outcome for one in drawn_ones} - ALLOWED)]
    rows = ["| mutations | " + " | ".join(names) + " | peak MB | longest s |", "|---|" + "---|" * (len(names) + 2)]
    for run in RUNS:
        for is_forged in (False, True):
            mine = [one for one in drawn_ones if (one.run, one.forged) == (run, is_forged)]
            if mine:
                count = collections.Counter(one.outcome for one in mine)
                cells = " | ".join(str(count[name]) for name in names)
                peak, longest = max(one.peak_mb for one in mine), max(one.seconds for one in mine)
                rows.append(f"| {run}, {'forged' if is_forged else 'accidents'} | {cells} | {peak} | {longest:.1f} |")
    bad = [one for one in (*drawn_ones, *forged) if not one.good]
    rows += ["", f"{len(drawn_ones)} mutations with seed {seed}; {len(bad)} ended in anything else.", ""]
    if forged:
        rows += ["| forged | run | outcome | what was said | peak MB | s |", "|---|---|---|---|---|---|"]
        for one in forged:
            said = _cell(_short(one.detail))
            cells = (_cell(one.case), one.run, one.outcome, said, str(one.peak_mb), f"{one.seconds:.1f}")
            rows.append(f"| {' | '.join(cells)} |")
    rows += [f"- {one.run}, {one.case}: {one.what}: {one.outcome}: {one.detail}" for one in bad]
    return "\n".join(rows) + "\n"


def _short(said: str) -> str:
    """Without where the run was."""
    return re.sub(r"(?:file://)?/\S*/(journal/|e\d{4}-a\d\d/)", r"\1", said)[:140]


def _cell(said: str) -> str:
    plain = said.replace("\n", " ").encode("unicode_escape").decode()
    return plain.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--outcomes", type=Path, help="every outcome, one JSON object a line")
    parser.add_argument("--commands", action="store_true", help="show each changed run with commands, too")
    parser.add_argument("--named", choices=("all", "none", "only"), default="all", help="of tests/proof/forged.py")
    parser.add_argument("--alone", action="store_true", help="a process for each named case, to measure its memory")
    args = parser.parse_args()
    if args.mutations < 1:
        parser.error(f"--mutations={args.mutations}: expected at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.modules.setdefault("fuzz", sys.modules["__main__"])  # so that there is one class of cases
    from tests.proof.forged import CASES

    first = args.seed * 10_000_000
    seeds = range(first, first + args.mutations) if args.named in ("all", "none") else ()
    by_name = [] if args.named == "none" else CASES
    with runs() as base:
        found = list(campaign(map(drawn, seeds), base, commands=args.commands))
        named = list(campaign(by_name, base, commands=args.commands, alone=args.alone))
    table = report(found, named, args.seed)
    print(table)
    if args.report:
        args.report.write_text(table)
    if args.outcomes:
        args.outcomes.write_text("".join(json.dumps(asdict(one)) + "\n" for one in (*found, *named)))
    return 0 if all(one.good for one in (*found, *named)) else 1


if __name__ == "__main__":
    sys.exit(main())
