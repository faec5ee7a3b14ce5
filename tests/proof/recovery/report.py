"""The campaign's rounds, for people. Pure but for the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.lines import Line


def newest(lines: Sequence[Line]) -> list[Line]:
    """Of each round."""
    return list({(line["seed"], line["within"], line["round"]): line for line in lines}.values())


def told(line: Line) -> str:
    """One round, on a line."""
    name = f"{'' if line['within'] else 'outside '}{line['round']:3} {line['setting']}: {line['kind']}"
    who = f"lost {list(line['lost'])}, crashed {list(line['crashed'])} after {line['moment_s']:.2f} s"
    if "seconds" not in line:
        return f"{name}: {who}: !! {line['problems']}"
    result = f"step {line['restored']} (expected {line['expected']}) in {line['seconds']:5.1f} s"
    return f"{name}: {who}: {result} {line['sources']}" + "".join(f"\n  !! {text}" for text in line["problems"])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not less than `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def table(rounds: Sequence[Line]) -> str:
    made = ["| setting | what is lost | rounds | recovered | p50 | p99 |", "|---|---|---|---|---|---|"]
    for inside in (True, False):
        some = [line for line in rounds if line["within"] is inside]
        for setting in dict.fromkeys(line["setting"] for line in some):
            of_setting = [line for line in some if line["setting"] == setting]
            for kind in sorted({line["kind"] for line in of_setting}):
                made.append(_row(setting, kind, [line for line in of_setting if line["kind"] == kind]))
        if some:
            made.append(_row("**all**", "within the promise" if inside else "outside the promise", some))
    return "\n".join(made) + "\n"


def _row(setting: str, kind: str, rounds: Sequence[Line]) -> str:
    good = [line for line in rounds if not line["problems"]]
    seconds = [float(line["seconds"]) for line in rounds if "seconds" in line]
    if not seconds:
        return f"| {setting} | {kind} | {len(rounds)} | {len(good)} | | |"
    figures = (percentile(seconds, 0.5), percentile(seconds, 0.99))
    return (
        f"| {setting} | {kind} | {len(rounds)} | {len(good)} | " + " | ".join(f"{one:.1f} s" for one in figures) + " |"
    )


def write(page: Path, name: str, text: str) -> None:
    """Renew what is between the marks of that name. Raises ValueError if the page has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page}: expected {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text.rstrip()}\n{end}{after}")
