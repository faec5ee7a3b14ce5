"""What a launcher leaves out of its hosts' output says nothing, or says it again; errors are all there."""

from __future__ import annotations

import pytest

from launch.noise import Noise

GLOO = "[Gloo] Rank {} is connected to {} peer ranks. Expected number of connected peer ranks is : {}"
BEGINS = "Traceback (most recent call last):"
CALL = '  File "train.py", line 6, in <module>'
INT = [BEGINS, CALL, "KeyboardInterrupt"]
BUG = [BEGINS, CALL, "    step()", "ValueError: a bug of the program's own"]
CAUSED = ["", "The above exception was the direct cause of the following exception:", ""]
DURING = ["", "During handling of the above exception, another exception occurred:", ""]
IMPORT = [BEGINS, CALL, "ImportError: numpy._core.multiarray failed to import"]
Lines = list[tuple[int, str]]


def said(*parts: tuple[int, list[str]]) -> Lines:
    return [(host, line) for host, lines in parts for line in lines]


# What hosts say once Ctrl-C was passed to them, and what is shown of it.
INTERRUPTED: dict[str, tuple[Lines, Lines]] = {
    "one": (said((0, INT)), said((0, INT))),
    "two": (said((0, INT), (1, INT)), said((0, INT), (1, INT[-1:]))),
    "mixed": (
        [pair for both in zip(said((1, INT)), said((0, INT)), strict=True) for pair in both],
        said((1, INT), (0, INT[-1:])),
    ),
    "what it caused": (
        said((0, INT + CAUSED + IMPORT), (1, INT + CAUSED + IMPORT)),
        said((0, INT + IMPORT[-1:]), (1, INT[-1:] + IMPORT[-1:])),
    ),
    "what an extension made of it": (
        said((0, INT + IMPORT[-1:] + CAUSED + IMPORT), (1, INT + IMPORT[-1:] + CAUSED + IMPORT)),
        said((0, INT + IMPORT[-1:] * 2), (1, INT[-1:] + IMPORT[-1:] * 2)),
    ),
    "ignored by Python": (
        said((0, INT), (1, ["Exception ignored in: <function f>", BEGINS, CALL, "    ", "KeyboardInterrupt: ", "on"])),
        said((0, INT), (1, ["Exception ignored in: <function f>", "KeyboardInterrupt: ", "on"])),
    ),
    "a bug on one host": (said((0, INT), (1, BUG)), said((0, INT), (1, BUG))),
    "a bug on each": (said((0, BUG), (1, BUG)), said((0, BUG), (1, BUG))),
    "a bug, then Ctrl-C": (said((0, BUG + DURING + INT)), said((0, BUG + DURING + INT[-1:]))),
    "a bug after something else": (
        said((0, INT), (1, [*INT, "closing", *BUG])),
        said((0, INT), (1, [INT[-1], "closing", *BUG])),
    ),
    "a bug right after": (said((0, INT), (1, INT + BUG)), said((0, INT), (1, INT[-1:] + BUG))),
    "a bug like it": (
        said((0, INT), (1, [BEGINS, CALL, "KeyboardInterruptLost: x"])),
        said((0, INT), (1, [BEGINS, CALL, "KeyboardInterruptLost: x"])),
    ),
    "cut off": (said((0, INT), (1, INT[:2])), said((0, INT), (1, INT[:2]))),
    "no traceback": (said((0, ["a", "", "  b", "KeyboardInterrupt"])),) * 2,
}


def shown(noise: Noise, lines: Lines) -> Lines:
    found = [(host, text) for host, line in lines for text in noise.without(f"host-{host}", line)]
    return found + [(host, text) for host in (0, 1) for text in noise.rest(f"host-{host}")]


@pytest.mark.parametrize("case", INTERRUPTED)
def test_one_traceback_of_a_ctrl_c_is_shown_and_every_other_error(case: str) -> None:
    lines, expected = INTERRUPTED[case]
    noise = Noise()
    noise.interrupted = True
    assert shown(noise, lines) == expected


@pytest.mark.parametrize("case", INTERRUPTED)
def test_without_a_ctrl_c_nothing_of_it_is_left_out(case: str) -> None:
    lines, _ = INTERRUPTED[case]
    assert shown(Noise(), lines) == lines


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        (GLOO.format(0, 1, 1), True),
        (GLOO.format(17, 63, 63), True),
        ("[Gloo] Rank " + GLOO.format(0, 1, 1), True),
        ("0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1", True),
        (GLOO.format(0, 1, 1) + GLOO.format(1, 1, 3), False),
        ("[Gloo] Rank 0 is connected to ", False),
        ("17", False),
        (GLOO.format(0, 1, 3), False),
        (GLOO.format(0, 1, 11), False),
        (GLOO.format(0, 1, 1) + " but", False),
        ("[Gloo] Rank 0 is not connected", False),
        ("ValueError: UNKNOWN: Gloo all-reduce failed: Connection closed by peer", False),
    ],
)
def test_of_gloo_only_that_all_is_well_is_left_out(line: str, left_out: bool) -> None:
    assert Noise().without("host-0", line) == ([] if left_out else [line])
