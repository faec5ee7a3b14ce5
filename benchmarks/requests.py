"""Requests to Cloud Storage per save, restore and opening, beside Orbax's CheckpointManager on the same emulator.

    python -m benchmarks.requests                    # 1, 4 and 8 processes; 16 leaves of 1 MiB and 2000 of 64 B
    python -m benchmarks.requests --processes=4 --leaves=16 --latency_ms=20

Class A are writes and listings, class B reads; deletes are free. Counted for the second save of a job, which is what
every later one costs. Each request is answered after `latency_ms`, so that seconds mean something, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.gcs_jobs import BUCKET, LEAF_BYTES, Peer, Phase, abstract, is_worker, parser, run


def main() -> None:
    flags = parser(__doc__, processes=[1, 4, 8], latency_ms=20.0)
    flags.add_argument("--leaves", type=int, nargs="*", choices=sorted(LEAF_BYTES), default=[16, 2000])
    args = flags.parse_args()
    if is_worker(args, PEERS, args.leaves[0]):
        return
    rows = []
    for count in args.processes:
        for leaves in args.leaves:
            for peer in PEERS:
                measured = run(peer, count, leaves, args.latency_ms, "benchmarks.requests")
                rows.append({"peer": peer, "processes": count, "leaves": leaves, **measured})
                if not args.json:
                    print(row(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows))


def row(measured: dict[str, Any]) -> str:
    name = f"{measured['processes']} processes, {measured['leaves']:4} leaves, {measured['peer']:5}"
    if "failed" in measured:
        return f"{name}: {measured['failed']}"
    parts = []
    for phase in ("open", "save", "restore"):
        one = measured[phase]
        parts.append(f"{phase} {one['A']:3} A {one['B']:4} B {one['free']:3} free {one['seconds']:6.2f} s")
    return f"{name}: " + "; ".join(parts)


def ours(state: Any, counted: Phase) -> None:
    import jax

    import orchestrator as oc

    options = oc.Options(async_save=False, on_save_failure="raise")
    root = f"gs://{BUCKET}/ours"
    with oc.Agent(root, options=options) as agent:
        agent.save(1, state)
        counted("save", lambda: agent.save(2, state) and None)
        counted("restore", lambda: jax.block_until_ready(agent.restore(abstract(state)).state) and None)  # type: ignore[union-attr]
        if jax.process_index() == 0:
            time.sleep(1)  # the collector of this save has ended
        counted("open", lambda: oc.open_run(root).latest_step() and None if jax.process_index() == 0 else None)


def orbax_manager(state: Any, counted: Phase) -> None:
    import jax
    import orbax.checkpoint as ocp

    root = f"gs://{BUCKET}/orbax"

    def save(step: int) -> None:
        manager.save(step, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()

    def restore() -> None:
        target = abstract(state)
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        jax.block_until_ready(manager.restore(2, args=arguments))

    def reopen() -> None:
        if jax.process_index() == 0:
            ocp.utils.checkpoint_steps(root)

    with ocp.CheckpointManager(root, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        save(1)
        counted("save", lambda: save(2))
        counted("restore", restore)
        counted("open", reopen)


PEERS: Mapping[str, Peer] = {"ours": ours, "orbax": orbax_manager}


if __name__ == "__main__":
    main()
