"""What comparing every save's tree with the run's costs the training loop: `save` with and without the check, in turn.

python -m benchmarks.tree_check
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import jax.numpy as jnp

import orchestrator as oc
from orchestrator.arrays import Flat
from orchestrator.job.opening import Opening

ROUNDS = 40


def state_of(leaves: int) -> dict[str, Any]:
    return {f"layer{number:04}": jnp.full(16, float(number)) for number in range(leaves)}


def blocked_s(agent: oc.Agent, step: int, state: Any) -> float:
    began = time.perf_counter()
    agent.save(step, state)
    took_s = time.perf_counter() - began
    agent.wait_until_finished()
    return took_s


def compare(leaves: int, *, new_dict: bool) -> tuple[float, float, float]:
    """Median seconds: that `save` blocks, (with the check, without), and of the processor for the check itself.
    new_dict: each save is given a dict of its own, and not the one before."""
    check, own_s = Opening.check_tree, list[float]()
    times: dict[bool, list[float]] = {True: [], False: []}
    state = state_of(leaves)

    def timed(opening: Opening, flat: Flat) -> None:
        if checked:
            began = time.thread_time()
            check(opening, flat)
            own_s.append(time.thread_time() - began)

    with tempfile.TemporaryDirectory() as root, oc.Agent(root, keep=oc.last(1)) as agent:
        for step in range(2):
            blocked_s(agent, step, state)
        Opening.check_tree = timed  # type: ignore[method-assign]
        for step in range(2, 2 + 2 * ROUNDS):
            checked = (step + step // 2) % 2 == 0  # neither is always the first of a pair
            times[checked].append(blocked_s(agent, step, dict(state) if new_dict else state))
        Opening.check_tree = check  # type: ignore[method-assign]
    return statistics.median(times[True]), statistics.median(times[False]), statistics.median(own_s)


def main() -> None:
    for leaves in (20, 2000):
        for new_dict in (False, True):
            checked_s, unchecked_s, own_s = compare(leaves, new_dict=new_dict)
            print(
                f"{leaves} leaves, {'another dict each time' if new_dict else 'the same dict'}: blocked "
                f"{checked_s * 1e3:.2f} ms with the check, {unchecked_s * 1e3:.2f} ms without "
                f"(x{checked_s / unchecked_s:.2f}); the check itself {own_s * 1e6:.0f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
