"""What a step that is held in memory costs training, beside NVRx's local checkpointing and Orbax's emergency manager.

    python -m benchmarks.tier_cost --mib 256 2048 --rounds=5 --repeats=3
    python -m benchmarks.tier_cost --nvrx_python=venv/bin/python      # of an environment with torch and NVRx

Four hosts, each a process with a directory of its own in /dev/shm. A step of training is a wait of 50 ms, as for an
accelerator, an addition to one array, and a sum over all hosts. *Lost* is as in `benchmarks.goals`: the time from the
call until the step is safe on all hosts, less what the steps that ran meanwhile take when nothing else happens. It runs
in a network namespace of its own (with root), whose loopback counts what the hosts send one another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.lines import Line, keep
from benchmarks.tier_peers import PEERS, installed, store
from benchmarks.worker import peak, reset_peak

HOSTS, STEP_S, SAMPLES, LIMIT_S = 4, 0.05, 20, 240.0
APART = ("unshare", "--net", "sh", "-c", 'ip link set lo up && TIER_COST_APART=1 exec "$0" "$@"')
COLUMNS = ("lost", "blocked", "held", "steps", "sent", "kept", "most kept", "process")


def main() -> None:
    args = parse()
    if args.worker:
        index, port, _ = args.worker
        try:
            work(args, int(index), port)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # whatever threads wait for
    if os.geteuid() == 0 and shutil.which(APART[0]) and "TIER_COST_APART" not in os.environ:
        os.execvp(APART[0], [*APART, sys.executable, "-m", "benchmarks.tier_cost", *sys.argv[1:]])
    made = itertools.product(range(args.repeats), args.mib, args.peers)
    print(table(keep(({"peer": name, "mib": mib, **measure(name, mib, args)} for _, mib, name in made), args.out)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="*", default=[256], help="of the whole state")
    parser.add_argument("--rounds", type=int, default=5, help="of each job, after one that warms up")
    parser.add_argument("--repeats", type=int, default=1, help="of each job, interleaved")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--nvrx_python", default=sys.executable, help="the Python of NVRx's jobs")
    parser.add_argument("--directory", type=jobs.directory, default="/dev/shm", help="where the hosts' memory is")
    parser.add_argument("--out", type=Path, help="append each line to it, and print the table of all that are in it")
    parser.add_argument("--worker", nargs=3, metavar=("INDEX", "PORT", "PORT2"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, mib: int, args: argparse.Namespace) -> Line:
    """A job of one peer. `failed` says why there are no figures."""
    python = args.nvrx_python if name.startswith("NVRx") else sys.executable
    base = tempfile.mkdtemp(prefix="tier-cost-", dir=args.directory)
    arguments = [f"--mib={mib}", f"--rounds={args.rounds}", f"--peers={name}", f"--directory={base}"]
    try:
        return dict(jobs.run("benchmarks.tier_cost", arguments, HOSTS, python=python, limit_s=LIMIT_S))
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {LIMIT_S:.0f} s"}
    except SystemExit as error:
        return {"failed": str(error).splitlines()[-1]}
    finally:
        for path in (base, store(Path(base))):
            shutil.rmtree(path, ignore_errors=True)


def work(args: argparse.Namespace, index: int, port: str) -> None:
    """One process of a job. Process 0 prints what it and the machine have seen."""
    kind, base, where = PEERS[args.peers[0]], Path(args.directory), f"127.0.0.1:{port}"
    if not installed(args.peers[0]):
        raise SystemExit(f"{kind.package} is not installed in {sys.executable}")
    if kind.package == "nvidia_resiliency_ext":
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"tcp://{where}", rank=index, world_size=HOSTS)
    else:
        import jax

        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_platforms", "cpu")
        jax.distributed.initialize(where, HOSTS, index, coordinator_bind_address=where)
    training = kind.training(args.mib[0] << 20, HOSTS, kind.replicas)
    (base / f"host-{index}").mkdir(exist_ok=True)
    peer = kind(base, index, training)
    usual_s = statistics.median(_step(training, False)[0] for _ in range(SAMPLES))
    share = sum(_own_bytes(leaf) for leaf in training.state.values())
    rounds = [_round(peer, training, number + 1, usual_s, base, share) for number in range(args.rounds + 1)]
    if index == 0:
        figures = {column: [one[column] for one in rounds[1:]] for column in COLUMNS}
        print(json.dumps({"share_mib": share >> 20, "step_ms": round(1000 * usual_s, 1), **figures}), flush=True)
    _step(training, True)  # nobody leaves before the others have come so far
    time.sleep(1)
    os._exit(0)


def _step(training: Any, done: bool) -> tuple[float, bool]:
    """(seconds, whether all are done)."""
    started = time.perf_counter()
    time.sleep(STEP_S)
    all_done = training.step(done)
    return time.perf_counter() - started, all_done


def _round(peer: Any, training: Any, number: int, usual_s: float, base: Path, share: int) -> Line:
    for _ in range(10):  # what the one before has left to do
        _step(training, False)
    watch = Watch(base)
    quiet = _quiet_bytes(training)
    before, sent = reset_peak(), loopback_bytes()
    started = time.perf_counter()
    peer.hold(number, training.state)
    blocked_s = time.perf_counter() - started
    steps, all_done = 0, False
    while not all_done:
        all_done, steps = _step(training, peer.is_done())[1], steps + 1
    peer.finish()
    total_s = time.perf_counter() - started
    sent = loopback_bytes() - sent - steps * quiet
    for _ in range(20):  # what is held no more is freed behind it
        _step(training, False)
    return {
        "lost": round(1000 * (total_s - steps * usual_s), 1),
        "blocked": round(1000 * blocked_s, 1),
        "held": round(1000 * total_s),
        "steps": steps,
        "sent": round(sent / HOSTS / share, 3),
        "most kept": round(watch.end() / HOSTS / share, 3),
        "kept": round(held_bytes(base) / HOSTS / share, 3),
        "process": round((peak() - before) / share, 3),
    }


def _quiet_bytes(training: Any) -> float:
    """What a step of training sends by itself."""
    before = loopback_bytes()
    for _ in range(10):
        _step(training, False)
    return (loopback_bytes() - before) / 10


def _own_bytes(leaf: Any) -> int:
    if hasattr(leaf, "addressable_shards"):
        return sum(shard.data.nbytes for shard in leaf.addressable_shards)
    return int(leaf.nbytes)


def loopback_bytes() -> int:
    """What has been sent over this network namespace's loopback."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def held_bytes(base: Path) -> int:
    """In the memory of all hosts."""
    found = 0
    for folder, _, names in os.walk(base):
        if folder.startswith(str(base / "host-")):
            for name in names:
                try:
                    found += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue
    return found


class Watch:
    """The most that hosts have held at any moment, looked at again and again."""

    def __init__(self, base: Path) -> None:
        self._base, self._most, self._over = base, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, held_bytes(self._base))

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most


def table(lines: Sequence[Line]) -> str:
    """Medians over all rounds; bytes in shares of a host."""
    made = [
        "| state | | lost | blocked | safe after | steps | sent | held | most held | process |",
        "|---|---|" + "---|" * 8,
    ]
    for mib, name in dict.fromkeys((line["mib"], line["peer"]) for line in lines):
        mine = [line for line in lines if (line["mib"], line["peer"]) == (mib, name)]
        good = [line for line in mine if "failed" not in line]
        if not good:
            made.append(f"| {mib} MiB | {name} | {mine[-1]['failed'][:200]} | | | | | | | |")
            continue
        lost, blocked, held, steps, *shares = (
            statistics.median(value for line in good for value in line[column]) for column in COLUMNS
        )
        cells = [
            f"{lost:.0f} ms",
            f"{blocked:.0f} ms",
            f"{held / 1000:.2f} s",
            f"{steps:.0f}",
            *(f"{one:.2f}" for one in shares),
        ]
        made.append(f"| {mib} MiB | {name} | " + " | ".join(cells) + " |")
    return "\n".join(made) + "\n"


if __name__ == "__main__":
    main()
