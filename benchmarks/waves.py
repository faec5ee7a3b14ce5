"""How often an opening, a save and a restore wait for Cloud Storage, one request after another, beside Orbax.

    python -m benchmarks.waves                        # 1 and 2 processes, three times each; --write=docs/gcs.md
    python -m benchmarks.waves --processes=2 --repeats=1 --latency_ms=20 --json

A wave is one latency: the longest chain of requests in which each began after the one before was answered, by the
emulator's own log, in which every request takes `latency_ms` longer than it would. Ours and Orbax's CheckpointManager
take turns; what is shown are medians. open: an agent (a manager) is made on a run that has steps. restore: its first
restore, which opens the incarnation's epoch. again: a restore after that. save: the second of an incarnation.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gcs_jobs import BUCKET, LEAF_BYTES, Phase, abstract, is_worker, parser, run

PHASES = ("open", "restore", "again", "save")
NAMES = {"ours": "here", "orbax": "Orbax"}
BEGIN, END = "<!-- waves: made by `python -m benchmarks.waves --write=docs/gcs.md` -->", "<!-- end of waves -->"


def main() -> None:
    flags = parser(__doc__, processes=[1, 2], latency_ms=50.0)
    flags.add_argument("--leaves", type=int, choices=sorted(LEAF_BYTES), default=8)
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--write", help="a page whose table of waves is made again")
    args = flags.parse_args()
    if is_worker(args, {"ours": ours, "orbax": orbax}, args.leaves):
        return
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for count in args.processes:
            for peer in NAMES:
                measured = run(peer, count, args.leaves, args.latency_ms, "benchmarks.waves")
                if "failed" in measured:
                    sys.exit(f"{peer}, {count} processes: {measured['failed']}")
                found.setdefault((count, peer), []).append(measured)
    rows = [{"processes": count, "peer": peer, **medians(runs)} for (count, peer), runs in found.items()]
    print(json.dumps(rows) if args.json else table(rows))
    if args.write:
        page = Path(args.write)
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each phase: median waves and seconds; requests by operation and the chain, of the run in the middle."""
    middle = {}
    for phase in PHASES:
        ordered = sorted((one[phase] for one in runs), key=lambda one: (one["waves"], one["seconds"]))
        middle[phase] = {
            "waves": statistics.median_low(one["waves"] for one in ordered),
            "seconds": statistics.median(one["seconds"] for one in ordered),
            **{name: ordered[(len(ordered) - 1) // 2][name] for name in ("operations", "chain")},
        }
    return middle


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| processes | | " + " | ".join(f"{phase}: waves | seconds | requests" for phase in PHASES) + " |",
        "|---|---|" + "---|---|---|" * len(PHASES),
    ]
    for row in rows:
        cells = []
        for phase in PHASES:
            one = row[phase]
            by = ", ".join(f"{count} {operation}" for operation, count in sorted(one["operations"].items()))
            cells += [str(one["waves"]), f"{one['seconds']:.2f}", by]
        lines.append(f"| {row['processes']} | {NAMES[row['peer']]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ours(state: Any, counted: Phase) -> None:
    import jax

    import orchestrator as oc

    options = oc.Options(async_save=False, on_save_failure="raise")
    root = f"gs://{BUCKET}/ours"
    target = abstract(state)
    with oc.Agent(root, options=options) as agent:
        agent.save(1, state)
    agents: list[oc.Agent] = []
    counted("open", lambda: agents.append(oc.Agent(root, options=options)))
    for phase in ("restore", "again"):
        counted(phase, lambda: jax.block_until_ready(agents[0].restore(target).state) and None)  # type: ignore[union-attr]
    agents[0].save(2, state)
    time.sleep(2)  # what the save before has begun in the background is over, and no part of the next
    counted("save", lambda: agents[0].save(3, state) and None)
    agents[0].close()


def orbax(state: Any, counted: Phase) -> None:
    import jax
    import orbax.checkpoint as ocp

    root = f"gs://{BUCKET}/orbax"
    target = abstract(state)
    arguments = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))

    def opened() -> ocp.CheckpointManager:
        return ocp.CheckpointManager(root, item_handlers=ocp.PyTreeCheckpointHandler())

    def save(manager: ocp.CheckpointManager, step: int) -> None:
        manager.save(step, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()

    with opened() as manager:
        save(manager, 1)
    managers: list[ocp.CheckpointManager] = []
    counted("open", lambda: managers.append(opened()))
    for phase in ("restore", "again"):
        counted(
            phase,
            lambda: jax.block_until_ready(managers[0].restore(managers[0].latest_step(), args=arguments)) and None,
        )
    save(managers[0], 2)
    counted("save", lambda: save(managers[0], 3))
    managers[0].close()


if __name__ == "__main__":
    main()
