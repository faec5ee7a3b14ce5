"""A reader meets nobody: what it imports knows of one process."""

from __future__ import annotations

from tests.test_layout_rules import inside, sources

TOGETHER = {f"orchestrator.job.{name}" for name in ("rendezvous", "rounds", "restore", "restore_rounds", "opening")}


def test_a_reader_imports_nothing_that_several_hosts_do_together() -> None:
    modules = sources()
    assert modules.keys() > TOGETHER
    left, reached = ["orchestrator.reader"], set[str]()
    while left:
        module = left.pop()
        if module not in reached:
            reached.add(module)
            left += inside(module, modules)
    assert "orchestrator.job.read_step" in reached and not reached & TOGETHER
