"""Metrics in `orchestrator.compat`, beside Orbax itself: which steps stay when numbers are not finite, and what comes
back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.arrays.format import orbax_api
from orchestrator.compat import orbax_options
from orchestrator.rules import journal
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage

NAN, INF = math.nan, math.inf
STATE = ocp.args.StandardSave({"w": jnp.ones(2)})
LOSSES = {
    "all NaN": [NAN] * 7,
    "all inf": [INF] * 7,
    "all -inf": [-INF] * 7,
    "inf first": [INF, 3.0, 2.0, 1.0, 4.0, 5.0],
    "turns NaN": [5.0, 4.0, 3.0, NAN, NAN, NAN, NAN],
    "turns inf": [5.0, 4.0, 3.0, INF, INF, INF],
    "NaN first": [NAN, NAN, 3.0, 2.0, 1.0, 4.0],
    "NaN in between": [3.0, NAN, 2.0, NAN, 1.0, NAN],
    "finite": [3.0, 1.0, 2.0, 5.0, 4.0],
}


def run(module: Any, root: Path, losses: list[float], keep: int, mode: str) -> tuple[list[set[int]], int | None]:
    """The steps after each save, and the best step. Metrics come back as they were."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, best_fn=lambda metrics: metrics["loss"], best_mode=mode, enable_async_checkpointing=False
    )
    with module.CheckpointManager(root, options=options) as manager:
        after = []
        for step, loss in enumerate(losses):
            manager.save(step, args=STATE, metrics={"loss": loss})
            manager.wait_until_finished()
            after.append(set(manager.all_steps()))
        for step in after[-1]:
            assert repr(manager.metrics(step)) == repr({"loss": losses[step]})
        return after, manager.best_step()


@pytest.mark.parametrize(("keep", "mode"), [(1, "min"), (2, "max")])
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_the_steps_that_orbax_keeps_are_kept_and_no_good_one_is_deleted_for_nan(
    losses: list[float], keep: int, mode: str, tmp_path: Path
) -> None:
    theirs, their_best = run(ocp, tmp_path / "orbax", losses, keep, mode)
    ours, our_best = run(compat, tmp_path / "here", losses, keep, mode)
    numbers = [loss for loss in losses if not math.isnan(loss)]
    if len(numbers) in (0, len(losses)):
        assert ours == theirs
        assert our_best == their_best
        return
    # Orbax's order depends on where a NaN stands, and deletes the best.
    for step, here in enumerate(ours):
        known = [loss for loss in losses[: step + 1] if not math.isnan(loss)]
        best = sorted(known, reverse=mode == "max")[:keep]
        assert set(best) <= {losses[each] for each in here}, f"after step {step}"
        assert len(here) <= 2 * keep
    assert losses[our_best or 0] == (min if mode == "min" else max)(numbers)


def test_a_step_on_which_best_fn_fails_stays_and_no_save_is_lost(root: Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with compat.CheckpointManager(root, options=options) as manager:
        for step, metrics in enumerate([{"loss": 1.0}, {"accuracy": 1.0}, {"loss": 0.5}, {"loss": 2.0}]):
            assert manager.save(step, args=STATE, metrics=metrics)
            manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        with pytest.raises(KeyError):  # as in Orbax
            manager.best_step()


def test_root_metadata_stays_as_the_first_manager_gave_it_as_in_orbax(tmp_path: Path) -> None:
    seen = []
    for module in (ocp, compat):
        root = tmp_path / module.__name__
        for step, metadata in enumerate([{"run": "A", "best": INF}, None, {"run": "B"}]):
            with module.CheckpointManager(root, metadata=metadata) as manager:
                manager.save(step, args=STATE)
        seen.append(module.CheckpointManager(root).metadata().custom_metadata)
    assert seen == [{"run": "A", "best": INF}] * 2


VALUES: list[Any] = [
    *({"best": INF}, {"best": [NAN, -INF]}, {"$number": "NaN"}, {"$number": {"$$number": 3}}, {"p": None, "x": (1, 2)}),
    *([1, 2], "text", 5, INF, {1: "a"}, {"é": -0.0}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_comes_back_as_from_orbax(value: Any, tmp_path: Path) -> None:
    seen = []
    for module in (ocp, compat):
        with module.CheckpointManager(tmp_path / module.__name__) as manager:
            args = ocp.args.Composite(state=STATE, meta=ocp.args.JsonSave(value))
            custom = {"value": value} if module is compat else {"value": 1}
            assert manager.save(1, args=args, custom_metadata=custom)
            manager.wait_until_finished()
            seen.append(manager.restore(1)["meta"])
    assert repr(seen[1]) == repr(seen[0])
    assert repr(manager.metadata(1).custom_metadata) == repr({"value": seen[0]})


@pytest.mark.parametrize("value", [b"x", {1, 2}, np.zeros(2), jnp.zeros(()), object(), "\ud800"], ids=range(6))
def test_what_json_cannot_hold_is_named_by_its_item_before_anything_is_written(value: Any, root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        with pytest.raises(oc.UsageError, match=r"item 'meta'=.*plain JSON"):
            manager.save(1, args=ocp.args.Composite(state=STATE, meta=ocp.args.JsonSave({"a": value})))
        with pytest.raises(oc.UsageError, match=r"custom_metadata\['a'\]=.*plain JSON"):
            manager.save(1, args=STATE, custom_metadata={"a": value})
        assert manager.save(1, args=STATE, custom_metadata={"a": np.float32("nan"), "n": np.int64(3)})
    with pytest.raises(oc.UsageError, match=r"metadata\['a'\]=.*plain JSON"):
        compat.CheckpointManager(root, metadata={"a": value})


# Many metrics.


def many(step: int, loss: float) -> dict[str, float]:
    """A thousand, the one that decides last."""
    return {**{f"layer_{number}/norm": float(step) for number in range(1000)}, "loss": loss}


@pytest.mark.parametrize(
    ("score", "names"),
    [
        (lambda metrics: metrics["loss"], {"loss"}),
        (lambda metrics: metrics["loss"] + 2 * metrics.get("m1", 0.0), {"loss", "m1"}),
        (lambda metrics: metrics.get("absent", 0.0), {"absent"}),
        (lambda metrics: -metrics["loss"] if "m2" in metrics else 0.0, {"loss", "m2"}),
        (lambda metrics: sum(metrics.values()), None),
        (lambda metrics: min(metrics[name] for name in metrics), None),
        (lambda metrics: dict(metrics)["loss"], None),
        (lambda metrics: {**metrics}["loss"], None),
        (lambda metrics: float(len(metrics)), None),
        (lambda metrics: metrics["absent"], None),
        (lambda metrics: metrics.copy()["loss"], None),  # no dict to look at: all are carried
        (lambda metrics: 0.0, set()),
    ],
)
def test_what_best_fn_looks_at_is_found_by_watching_it(score: Any, names: set[str] | None) -> None:
    keeps = orbax_api.Keeps(ocp.CheckpointManagerOptions(best_fn=score, max_to_keep=1))
    assert orbax_options.KeepAsOrbax(keeps).metrics_needed({"loss": 1.0, "m1": 2.0, "m2": 3.0}) == names


def test_a_preservation_policy_of_the_users_own_may_look_at_all() -> None:
    class Own(ocp.checkpoint_managers.LatestN):
        pass

    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([Own(n=1)])
    )
    assert orbax_options.KeepAsOrbax(orbax_api.Keeps(options)).metrics_needed({"loss": 1.0}) is None


BEST = {
    "best_fn": {"best_fn": lambda metrics: metrics["loss"], "best_mode": "min", "max_to_keep": 2},
    "policy": {
        "preservation_policy": ocp.checkpoint_managers.AnyPreservationPolicy(
            [
                ocp.checkpoint_managers.CustomSteps([0]),
                ocp.checkpoint_managers.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=2),
            ]
        )
    },
}


@pytest.mark.parametrize("options", BEST.values(), ids=BEST)
def test_a_head_carries_the_metric_that_decides_and_the_others_come_from_the_step(
    options: dict[str, Any], root: Path
) -> None:
    options = {**options, "enable_async_checkpointing": False}
    with compat.CheckpointManager(root, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step, loss in enumerate([1.0, 9.0, 2.0, 8.0, 3.0]):
            manager.save(step, args=STATE, metrics=many(step, loss))
        assert manager.all_steps() == [0, 2]
        assert manager.metrics(2) == manager.metadata(2).metrics == many(2, 2.0)
        if "best_fn" in options:
            assert manager.best_step() == 0
    head = JournalStore(open_storage(root), writer="test").require_head()
    for live in head.live:
        assert live.metrics["loss"] == many(live.step, live.metrics["loss"])["loss"]
        assert len(live.metrics) == 64 and live.metrics_omitted == 1001 - 64
    assert oc.open_run(root).restore().metrics == many(2, 2.0)


def test_a_step_is_not_judged_without_the_metric_that_decides(root: Path) -> None:
    """Saved when another metric decided: it stays, and `best_step` reads what the journal does not carry."""
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        for step, loss in enumerate([5.0, 1.0]):
            agent.save(step, {"w": jnp.ones(2)}, metrics=many(step, loss))
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with compat.CheckpointManager(root, options=options) as manager:
        for step, loss in ((2, 9.0), (3, 3.0), (4, 7.0)):
            manager.save(step, args=STATE, metrics=many(step, loss))
            manager.wait_until_finished()
        assert manager.all_steps() == [0, 1, 3]
        assert manager.best_step() == 1
        assert journal.find(manager._run.store.require_head(), 0).metrics_omitted  # type: ignore[union-attr]
