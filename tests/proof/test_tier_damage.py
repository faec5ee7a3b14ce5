"""Damage in a tier, of every kind and anywhere: what comes back is what was saved, from wherever."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator.job.read_step import Restored
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.restore import RestoreOptions, restore_together
from tests.proof import tier_damage
from tests.support.runs import LIKE, state, store_of
from tests.support.tiers import crashed_at_14, held_dir

ROUNDS = 100
ANYWHERE = 25
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


def test_wrong_bytes_on_two_hosts_and_in_copies_between_them_are_never_restored_and_always_named(
    tmp_path: Path,
) -> None:
    """A sample of what `python -m tests.proof.tier_damage` does: it raises where something is silent."""
    came = tier_damage.run(ANYWHERE, SEED, tmp_path)
    by_outcome = Counter(outcome for _, outcome in came.elements())
    assert by_outcome.total() == ANYWHERE and by_outcome[tier_damage.NAMED] and by_outcome[tier_damage.STEPPED_DOWN]


def test_a_campaign_notices_what_is_restored_wrongly_or_without_a_word() -> None:
    what = ("flipped", "intent.json", 1)
    wrong = Restored(14, state(14) | {"w": state(13)["w"]}, {"at": 14}, {}, {0: b"at 14"})
    with pytest.raises(tier_damage.Silent, match="other arrays"):
        tier_damage.judged([wrong], [], what)
    older = Restored(12, state(12), {"at": 12}, {}, {0: b"at 12"})
    with pytest.raises(tier_damage.Silent, match="step 12 came back, dropped"):
        tier_damage.judged([older], [], what)
