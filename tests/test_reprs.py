"""What a prompt or a notebook shows of a value: what it is, as a person would type it, and never its arrays."""

from __future__ import annotations

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator.job.read_step import Restored


@pytest.mark.parametrize(
    "text",
    [
        "every(10)",
        "every_seconds(600)",
        "auto(max_loss_s=60)",
        "at([3, 100])",
        "continuous(min_interval_s=30)",
        "every(10) | auto(max_loss_s=600) | at([7])",
        "last(3)",
        "every_nth(1000)",
        "best('loss', 2, mode='max')",
        "within(3600)",
        "last(3) | best('loss', 1, mode='min')",
        "Options()",
        "Options(host_bytes_max=4096, attest='full')",
    ],
)
def test_a_policy_shows_itself_as_it_is_written(text: str) -> None:
    value = eval(text, {name: getattr(oc, name) for name in oc.__all__})
    assert repr(value) == text
    assert eval(repr(value), {name: getattr(oc, name) for name in oc.__all__}) == value


def test_agent_run_and_restored_say_what_they_are(tmp_path: Path) -> None:
    state = {"w": jnp.zeros((256, 1024)), "step": 0}
    with oc.Agent(tmp_path / "run") as agent:
        assert repr(agent) == f"<Agent file://{tmp_path}/run: process 0 of 1, not opened yet>"
        agent.save(7, state, metrics={"loss": 0.5}, process_state=b"abc")
        agent.wait_until_finished()
        assert repr(agent) == f"<Agent file://{tmp_path}/run: process 0 of 1, epoch 1>"
    run = oc.open_run(tmp_path / "run")
    assert repr(run) == f"<Run file://{tmp_path}/run, read-only>"
    shown = repr(run.restore())
    assert shown.startswith("Restored(step=7, state=<2 leaves, 1.0 MiB>, metrics={'loss': 0.5}, extra={'timestamp': ")
    assert shown.endswith("process_states={0: 3 B})")


def test_a_restored_step_is_shown_without_a_value_of_its_arrays() -> None:
    class Array:
        nbytes = 2**30

        def __repr__(self) -> str:
            raise AssertionError("an array was shown")

    text = repr(Restored(1, [Array()] * 3, {"note": "x" * 10**6}, {}, {0: b"y" * 10**6}))
    assert "<3 leaves, 3072.0 MiB>" in text and len(text) < 300
    assert len(jax.tree.leaves([Array()])) == 1  # and it counts as one


def test_help_of_the_agent_explains_every_argument_and_names_the_policies() -> None:
    text = inspect.getdoc(oc.Agent) or ""
    for argument in list(inspect.signature(oc.Agent).parameters):
        assert f"\n{argument}: " in text, argument
    for policy in ("every", "every_seconds", "at", "auto", "continuous", "last", "every_nth", "best", "within"):
        assert f"{policy}(" in text, policy
        assert policy in (oc.__doc__ or ""), policy
