"""Who may act in each search. Together they cover every pair of roles; commands may come at any moment of a save."""

from __future__ import annotations

from .search import Scenario
from .world import Collector, Coordinator, Tool, Worker

SCENARIOS = (
    # Zombies: two incarnations save the same step, one collects, and any put may be lost, late or repeated.
    Scenario(
        "rivals",
        (Coordinator("A", (1, 2)), Coordinator("B", (2, 3)), Collector("collect-B", boss=1)),
        losses=1,
    ),
    Scenario("three rivals", (Coordinator("A", (1,)), Coordinator("B", (1,)), Coordinator("C", (1,))), losses=1),
    # Two processes: one may fail, leave a hole, or stay silent; a step is tried twice.
    Scenario(
        "processes",
        (
            Coordinator("A", (1, 1)),
            Worker("A1", 0, (1, 1), ("yes", "short", "no")),
            Collector("collect-A", boss=0),
        ),
        processes=2,
        losses=1,
    ),
    Scenario(
        "rival processes",
        (
            Coordinator("A", (1,)),
            Worker("A1", 0, (1,), ("yes", "no")),
            Coordinator("B", (1,)),
            Worker("B1", 2, (1,), ("yes",)),
        ),
        processes=2,
    ),
    # Commands at any time beside a saving run.
    Scenario(
        "commands",
        (
            Coordinator("A", (1, 2, 3)),
            Tool("pin", "pin", 1),
            Tool("quarantine", "quarantine"),
            Tool("verify", "verify"),
        ),
    ),
    Scenario(
        "gc",
        (
            Coordinator("A", (1, 2)),
            Coordinator("B", (2,)),
            Collector("gc", retires=True),
            Tool("quarantine", "quarantine"),
        ),
        keep=2,
    ),
)
