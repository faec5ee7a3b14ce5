"""Who may act in each search. Together they cover every pair of roles; commands may come at any moment of a save."""

from __future__ import annotations

from .groups import Leader, Member
from .others import Collector, Copy, Reader, Recover, Restore, Rot, Tool
from .search import Scenario
from .world import Coordinator, Worker

SCENARIOS = (
    # Zombies: two incarnations save the same step, one collects, and any put may be lost, late or repeated.
    Scenario(
        "rivals",
        (
            Coordinator("A", (1, 2), at_once=True, early=True),
            Coordinator("B", (2, 3), at_once=True),
            Collector("collect-B", boss=1),
        ),
        losses=1,
    ),
    Scenario("three rivals", tuple(Coordinator(name, (1,), at_once=True) for name in "ABC"), losses=1),
    # Two processes: one may fail, leave a hole, or stay silent; a step is tried twice.
    Scenario(
        "processes",
        (
            Coordinator("A", (1, 1), early=True),
            Worker("A1", 0, (1, 1), ("yes", "short", "no")),
            Collector("collect-A", boss=0),
        ),
        processes=2,
        losses=1,
    ),
    Scenario(
        "rival processes",
        (
            Coordinator("A", (1,), early=True),
            Worker("A1", 0, (1,), ("yes", "no")),
            Coordinator("B", (1,), early=True),
            Worker("B1", 2, (1,), ("yes",)),
        ),
        processes=2,
    ),
    # Two processes of three sign together; either may fail, be slow, lose a message or act after a newer incarnation.
    Scenario(
        "groups",
        (
            Coordinator("A", (1,), at_once=True),
            Leader("A1", 0, (1,), ("yes", "no"), member=2),
            Member("A2", 0, (1,), ("yes", "no")),
            Coordinator("B", (2,), at_once=True),
        ),
        processes=3,
    ),
    # Commands at any time beside a saving run.
    Scenario(
        "commands",
        (
            Coordinator("A", (1, 2, 3), early=True),
            Tool("pin", "pin", 1),
            Tool("quarantine", "quarantine"),
            Tool("verify", "verify"),
        ),
    ),
    Scenario(
        "gc",
        (
            Coordinator("A", (1, 2), at_once=True),
            Coordinator("B", (2,), at_once=True),
            Collector("gc", retires=True),
            Tool("quarantine", "quarantine"),
        ),
        keep=2,
    ),
    # A job of another tree, and one that only reads, beside the job that owns the run.
    Scenario(
        "strangers",
        (
            Coordinator("A", (1, 2), tree="t", early=True),
            Coordinator("S", (1,), tree="s", early=True),
            Reader("reader"),
        ),
        losses=1,
    ),
    # A copy of the run that lacks the journal's newest entries; a job, its collector and `recover` begin there.
    Scenario(
        "broken copy",
        (
            Coordinator("A", (1, 2), early=True),
            Copy("copy"),
            Coordinator("B", (2, 3), after_actor=1, early=True),
            Collector("collect-B", boss=2),
            Recover("recover", "recover", after_actor=1),
        ),
    ),
    # Evidence: a step is quarantined, saved again and released beside a collector; or deleted by name beside retention.
    Scenario(
        "evidence",
        (
            Coordinator("A", (1,)),
            Coordinator("B", (1,)),
            Collector("collect-B", boss=1),
            Tool("quarantine", "quarantine"),
            Tool("release", "release"),
        ),
    ),
    Scenario(
        "by name",
        (
            Coordinator("A", (1, 2, 3)),
            Collector("gc", retires=True),
            Tool("quarantine", "quarantine"),
            Tool("discard", "discard"),
        ),
    ),
    # A step that rots, or only seems to.
    Scenario("unread", (Coordinator("A", (1, 2)), Rot("rot"), Restore("restore"), Tool("release", "release")), keep=2),
)
