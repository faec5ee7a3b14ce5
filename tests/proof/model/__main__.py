"""Prints what the checker explored and which invariant caught which mutation; 1 if anything is not as it should be."""

from __future__ import annotations

import sys
import time

from . import host_scenarios, hosts
from .mutations import MUTATIONS
from .scenarios import SCENARIOS
from .search import explore


def main() -> int:
    wrong = 0
    print("| scenario | who acts | states | crash images | seconds |\n|---|---|---|---|---|")
    for scenario in SCENARIOS:
        started = time.monotonic()
        result = explore(scenario)
        actors = ", ".join(actor.name for actor in scenario.actors)
        seconds = time.monotonic() - started
        print(f"| {scenario.name} | {actors} | {result.states} | {result.images} | {seconds:.1f} |", flush=True)
        if result.violation:
            wrong += 1
            print(result.violation)
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    print("\n| mutation | in scenario | caught by invariant | after states |\n|---|---|---|---|")
    for mutation in MUTATIONS:
        result = explore(by_name[mutation.scenario], mutation.rules())
        caught = result.violation.problems[0].partition(":")[0] if result.violation else "NOT CAUGHT"
        wrong += caught != mutation.caught_by
        print(f"| {mutation.name} | {mutation.scenario} | {caught} | {result.states} |", flush=True)
    return 1 if wrong + _of_hosts() else 0


def _of_hosts() -> int:
    wrong = 0
    print("\n| held steps: scenario | hosts' slices, copies | states | restores | seconds |\n|---|---|---|---|---|")
    for scenario in host_scenarios.SCENARIOS:
        started = time.monotonic()
        found = hosts.explore(scenario)
        seconds = time.monotonic() - started
        placed = f"{' '.join(scenario.domains)}, {scenario.copies}"
        print(f"| {scenario.name} | {placed} | {found.states} | {found.choices} | {seconds:.1f} |", flush=True)
        if found.violation:
            wrong += 1
            print(found.violation, *found.trace, sep="\n")
    by_name = {scenario.name: scenario for scenario in host_scenarios.SCENARIOS}
    print("\n| held steps: mutation | in scenario | caught | after states |\n|---|---|---|---|")
    for mutation in host_scenarios.MUTATIONS:
        found = hosts.explore(by_name[mutation.scenario], mutation.rules())
        caught = mutation.caught in (found.violation or "")
        wrong += not caught
        said = found.violation if caught else f"NOT CAUGHT ({found.violation})"
        print(f"| {mutation.name} | {mutation.scenario} | {said} | {found.states} |", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
