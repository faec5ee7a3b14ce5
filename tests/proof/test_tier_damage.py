"""Damage in a tier, of every kind and anywhere: what comes back is what was saved, from wherever."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import jax.numpy as jnp

import orchestrator as oc
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.restore import RestoreOptions, restore_together
from tests.support.runs import LIKE, state, store_of
from tests.support.tiers import crashed_at_14, held_dir

ROUNDS = 100
SEED = 7


def spoil(path: Path, files: list[Path], chance: random.Random) -> None:
    body = bytearray(path.read_bytes())
    at = chance.randrange(max(1, len(body)))
    match chance.choice(("flip", "flip", "flip", "truncate", "zero", "swap", "unlink")):
        case "flip":
            body[at : at + 1] = bytes(each ^ 1 << chance.randrange(8) for each in body[at : at + 1])
            path.write_bytes(body)
        case "truncate":
            path.write_bytes(body[:at])
        case "zero":
            body[at : at + 64] = bytes(len(body[at : at + 64]))
            path.write_bytes(body)
        case "swap":
            path.write_bytes(chance.choice(files).read_bytes())
        case "unlink":
            path.unlink()


def test_no_damage_in_a_tier_is_ever_restored(root: Path) -> None:
    crashed_at_14(root)
    tier, whole = held_dir(root), root.parent / "whole"
    shutil.copytree(tier, whole)
    chance, came = random.Random(SEED), Counter[tuple[int, str]]()
    memory = oc.memory(directory=root.parent / "tier")
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for _ in range(ROUNDS):
        name = chance.choice(names)
        spoil(tier / name, [whole / other for other in names], chance)
        options = RestoreOptions(5.0, record=False)
        restored = restore_together(store_of(root), SingleProcess(), LIKE, options, None, memory)
        assert restored is not None
        step = restored.step
        assert jnp.array_equal(restored.state["w"], state(step)["w"]) and restored.state["count"] == step, name
        assert restored.process_states == {0: f"at {step}".encode()} and restored.extra["at"] == step, name
        came[step, *restored.sources] += 1
        (tier / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole / name, tier / name)
    print(dict(came))
    assert came[14, "memory"] and came[12, "memory"], "damage was felt, and no more was lost than had to be"
