"""Matching a target against a checkpoint: every problem is named before any array is read."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import Mismatch
from orchestrator.rules.matching import TargetLeaf, brief, match, tree_differences
from orchestrator.rules.records import LeafSpec, TreeSpec
from tests.support.builders import leaf

SAVED = TreeSpec(
    leaves=(
        leaf("params/w", (8, 4)),
        leaf("params/b", (4,), dtype="bfloat16"),
        leaf("rng", (), "key", "key<fry>"),
        leaf("count", (), "int", ""),
        leaf("opt/none", (), "none", ""),
    )
)


def target(path: str, shape: tuple[int, ...] = (), dtype: str = "", kind: str = "array") -> TargetLeaf:
    return TargetLeaf(tuple(path.split("/")), kind, shape, dtype)


WHOLE = [
    target("params/w", (8, 4), "float32"),
    target("params/b", (4,), "bfloat16"),
    target("rng", (), "key<fry>", "key"),
    target("count", kind="int"),
    target("opt/none", kind="none"),
]


def problems(*changes: TargetLeaf, without: tuple[str, ...] = (), **arguments: Any) -> list[str]:
    """What is wrong with the whole target after these changes."""
    wanted = {"/".join(each.path): each for each in WHOLE if "/".join(each.path) not in without}
    wanted.update({"/".join(each.path): each for each in changes})
    try:
        match(SAVED, list(wanted.values()), where="run step 5", **arguments)
    except Mismatch as error:
        return list(error.problems)
    return []


def test_a_target_that_fits_gets_its_saved_leaves_in_its_own_order() -> None:
    backwards = WHOLE[::-1]
    chosen = match(SAVED, backwards)
    assert [each.path for each in chosen if each] == [each.path for each in backwards]


def test_array_kinds_may_stand_for_each_other() -> None:
    assert problems(target("params/w", (8, 4), "float32", "numpy")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            target("params/w", (8, 4), "bfloat16"),
            "params/w: checkpoint f32[8,4], target bf16[8,4]; restore as f32 and cast, or pass cast=True",
        ),
        (target("params/w", (4, 8), "float32"), "params/w: checkpoint f32[8,4], target f32[4,8]; shapes must be equal"),
        (
            target("params/wx", (8, 4), "float32"),
            "params/wx: not in the checkpoint, target f32[8,4]; it holds under params: b, w",
        ),
        (
            target("head", (2,), "int8"),
            "head: not in the checkpoint, target i8[2]; it holds under (root): count, opt, params, rng",
        ),
        (
            target("rng", (), "key<rbg>", "key"),
            "rng: checkpoint key<fry>[], target key<rbg>[]; PRNG keys cannot be cast",
        ),
        (target("rng", (), "uint32"), "rng: checkpoint key<fry>[], target u32[]; PRNG keys cannot be cast"),
        (target("count", (), "int32"), ""),
        (target("count", (), "float32"), "count: checkpoint int, target f32[]"),
        (target("count", (1,), "int32"), "count: checkpoint int, target i32[1]"),
        (target("params/b", kind="float"), "params/b: checkpoint bf16[4], target float"),
        (target("new", kind="none"), ""),
        (
            target("params", kind="empty"),
            "params: checkpoint has 2 leaves below, target an empty container; give them a target",
        ),
    ],
)
def test_a_leaf_that_does_not_fit_says_where_got_wanted_and_what_next(change: TargetLeaf, said: str) -> None:
    assert problems(change) == ([said] if said else [])


def test_saved_leaves_that_the_target_leaves_out_are_named_unless_partial() -> None:
    left_out = problems(without=("params/w", "count", "opt/none"))
    assert left_out == [
        "params/w: checkpoint f32[8,4], not in the target; add it, or restore with partial=True",
        "count: checkpoint int, not in the target; add it, or restore with partial=True",
    ]
    assert problems(without=("params/w", "count"), partial=True) == []


def test_cast_allows_another_dtype_but_not_another_shape_nor_another_kind_of_key() -> None:
    assert problems(target("params/w", (8, 4), "bfloat16"), cast=True) == []
    assert len(problems(target("params/w", (8,), "bfloat16"), cast=True)) == 1
    assert len(problems(target("rng", (), "key<rbg>", "key"), cast=True)) == 1


def test_all_problems_are_listed_at_once_and_a_long_list_is_cut() -> None:
    with pytest.raises(Mismatch) as caught:
        match(SAVED, [target(f"x{index}", (1,), "int8") for index in range(30)], where="run step 5")
    assert len(caught.value.problems) == 30 + 4
    lines = str(caught.value).splitlines()
    assert lines[0] == "run step 5: 34 leaves do not fit the target"
    assert lines[-1] == "  ... and 14 more"


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "said"),
    [
        ("array", (8, 4), "float32", "f32[8,4]"),
        ("array", (), "bfloat16", "bf16[]"),
        ("numpy", (2,), "uint4", "u4[2]"),
        ("array", (2,), "complex64", "c64[2]"),
        ("array", (2,), "float8_e4m3fn", "f8_e4m3fn[2]"),
        ("array", (2,), "bool", "bool[2]"),
        ("int", (), "", "int"),
        ("none", (), "", "None"),
    ],
)
def test_short_names_of_leaves(kind: str, shape: tuple[int, ...], dtype: str, said: str) -> None:
    assert brief(kind, shape, dtype) == said


def test_tree_differences_name_what_changed_and_nothing_for_the_same_job() -> None:
    assert tree_differences(SAVED, SAVED) == []
    reordered = TreeSpec(leaves=SAVED.leaves[::-1])
    assert tree_differences(SAVED, reordered) == []
    other = TreeSpec(leaves=(leaf("params/w", (8, 5)), *SAVED.leaves[1:4], LeafSpec(path=(), kind="float")))
    assert tree_differences(SAVED, other) == [
        "(root): the run has nothing, this job float",
        "opt/none: the run has None, this job nothing",
        "params/w: the run has f32[8,4], this job f32[8,5]",
    ]
    assert len(tree_differences(SAVED, TreeSpec(leaves=()), limit=2)) == 2


def test_a_tree_of_the_same_shapes_but_another_kind_of_array_is_a_difference() -> None:
    (line,) = tree_differences(TreeSpec(leaves=(leaf("w"),)), TreeSpec(leaves=(leaf("w", kind="numpy"),)))
    of_jax, of_numpy = line.removeprefix("w: the run has ").split(", this job ")
    assert of_jax.removesuffix(" (jax.Array)") == of_numpy.removesuffix(" (numpy array)") != of_jax
