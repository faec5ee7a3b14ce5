"""The package beside the versions of its libraries that people have: a row of docs/versions.md for each environment.

    make test-versions                    # ROWS=oldest,newest ONLY=job,checkpoints
    python -m tests.proof.versions [--rows=NAME,...] [--only=tests,job,checkpoints] [--write=docs/versions.md]

Each environment is built by uv below build/versions and kept until what it is made from changes; so are the results,
of which a part that is run anew replaces its own. A result of another source of the package than the one that is here
is told as such. Exit code 1 if anything failed or a row has no environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launch.example.report import ProgressLine, Summary

REPO = Path(__file__).parents[2]
HOME = REPO / "build" / "versions"
PROJECT_FILE = REPO / "pyproject.toml"
PROJECT = ".[train,grain,dev,traces,safetensors]"
SHOWN = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "flax")
# The package's own that start no jobs and take less than ten seconds; not those of launchers, pages and proofs.
FOLDERS = ("arrays", "cli", "compat", "job", "observe", "rules", "run", "storage", "tools")
FILES = ("environment", "public_names", "reader", "reprs", "versions")
TESTS = [*(f"tests/{folder}" for folder in FOLDERS), *(f"tests/test_{file}.py" for file in FILES)]
WORKERS = (os.cpu_count() or 1) + 1  # some of the tests wait
PARTS = ("job", "checkpoints", "tests")
INSTALL_S, JOB_S, CHECKPOINTS_S, TESTS_S = 900.0, 300.0, 300.0, 3600.0
NOT_RUN, OLD = "not run", "of an older source"
BEGIN, END = "<!-- versions: made by `make test-versions` -->", "<!-- end of versions -->"


@dataclass(frozen=True)
class Row:
    """An environment: what uv is to install on which Python."""

    python: str
    install: tuple[str, ...]


ROWS = {
    "oldest": Row("3.11", ("--resolution=lowest-direct", "-e", PROJECT)),
    "jax-0.8": Row("3.11", ("-e", PROJECT, "jax==0.8.3")),
    "jax-0.9": Row("3.11", ("-e", PROJECT, "jax==0.9.2")),
    "lock": Row("3.11", ("-r", "requirements-3.11.lock", "-e", ".")),
    "oldest-orbax": Row("3.11", ("-e", PROJECT, "jax==0.10.2", "orbax-checkpoint==0.11.34")),
    "jax-0.11": Row("3.12", ("-e", PROJECT, "jax==0.11.2")),
    "newest": Row("3.13", ("-r", "requirements-3.12.lock", "-e", ".")),
}


@dataclass
class Result:
    """What was run in a row's environment; None or absent: not yet. job: "" if it went well. restored: by the row that
    wrote the checkpoint, "" if it came back. failed: names of tests. sources: by part, the package's source it was run
    of."""

    key: str
    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    passed: int | None = None
    failed: list[str] = field(default_factory=list)
    job: str | None = None
    restored: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not (self.missing or self.failed or self.job or any(self.restored.values()))


# The rules.


def key_of(row: Row, files: Mapping[str, bytes]) -> str:
    """What an environment is made from: its row, what the project asks for, and the lock that the row names."""
    project = tomllib.loads(files["pyproject.toml"].decode())["project"]
    asked = repr([project["dependencies"], project.get("optional-dependencies")])
    return digest([repr(row).encode(), asked.encode(), *(files[one] for one in row.install if one in files)])


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def counts(junit: str) -> tuple[int, list[str]]:
    """Of pytest's report: how many tests passed, and the names of those that failed or could not be collected."""
    passed, failed = 0, []
    for case in xml.fromstring(junit).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(".".join(filter(None, (case.get("classname"), case.get("name")))))
        elif case.find("skipped") is None:
            passed += 1
    return passed, failed


def job_problem(code: int, lines: list[str], summary: Summary | None) -> str:
    """What is wrong with a job that was to lose a host as it saved step 4, and to go on from step 2; "" if nothing."""
    said = [ProgressLine.parse(line.partition(" ")[2]) for line in lines]
    digests = {one.digest for one in said if one and one.step == 2 and one.digest}
    if code or summary is None:
        return f"exit code {code}"
    if (summary.restored_step, summary.latest_step) != (2, 5):
        return f"restored step {summary.restored_step} and ended with {summary.latest_step}, not 2 and 5"
    return "" if digests == {summary.restored_digest} else f"restored {summary.restored_digest}, saved {digests}"


def table(results: Mapping[str, Result], source: str) -> str:
    """Markdown: a row for each environment, and below it what failed. source: the package's that is here."""
    lines = [
        "| Environment | Python | " + " | ".join(SHOWN) + " | Job of two, killed, resumed | Restores | Tests |",
        "|" + "---|" * (len(SHOWN) + 5),
    ]
    notes = []
    for name, row in ROWS.items():
        result = results.get(name, Result(""))
        numbers = [result.versions.get(each, "") for each in SHOWN]
        cells = {part: told(part, result) for part in PARTS}
        old = [part for part in PARTS if cells[part] != NOT_RUN and result.sources.get(part) != source]
        cells |= {part: f"{cells[part]} ({OLD})" for part in old}
        lines.append("| " + " | ".join([name, row.python, *numbers, *cells.values()]) + " |")
        problems = [result.missing, result.job or "", *(f"`{test}` failed" for test in result.failed)]
        problems += [f"the checkpoint of {writer}: {problem}" for writer, problem in result.restored.items() if problem]
        notes += [f"- {name}: {problem}" for problem in problems if problem]
    run_of = ["", f"Source `{source}`: `orchestrator/` and `launch/` as they were."]
    return "\n".join([*lines, *([""] if notes else []), *notes, *run_of])


def told(part: str, result: Result) -> str:
    """A cell of the table."""
    if part == "job":
        return {None: NOT_RUN, "": "yes"}.get(result.job, "**no**")
    if part == "checkpoints":
        back = sum(not problem for problem in result.restored.values())
        return f"{back} of {len(result.restored)}" if result.restored else NOT_RUN
    if result.passed is None:
        return NOT_RUN
    return f"{result.passed} passed" + f", **{len(result.failed)} failed**" * bool(result.failed)


def with_table(page: str, made: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


# Running it.


def done(command: list[str], timeout_s: float, **environ: str) -> subprocess.CompletedProcess[str]:
    """Ends its whole group at the deadline, which counts as exit code 124."""
    everything = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", **environ}
    everything.pop("VIRTUAL_ENV", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPO, env=everything, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            return subprocess.CompletedProcess(command, 124, out, f"{err}\nnot done within {timeout_s:g} s")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said"])[-1][:200]


def source_here() -> str:
    """What the results are results of: the package and the tests that are run of it."""
    of_package = [path for folder in ("orchestrator", "launch") for path in (REPO / folder).rglob("*.py")]
    return digest(path.read_bytes() for path in sorted(of_package))


def environment_key(row: Row) -> str:
    return key_of(row, {path.name: path.read_bytes() for path in (PROJECT_FILE, *REPO.glob("requirements-*.lock"))})


def stored(name: str) -> Result | None:
    """What was found out in the row's environment, whatever that was made from."""
    kept = HOME / name / "result.json"
    return Result(**json.loads(kept.read_text())) if kept.exists() else None


def found_before(name: str) -> Result | None:
    """What is known of the row's environment as it is to be now."""
    result = stored(name)
    return result if result and result.key == environment_key(ROWS[name]) and not result.missing else None


def prepared(name: str, row: Row) -> Result:
    """The row's environment, built if need be, and what was found out in it before, or in one of the same packages."""
    if before := found_before(name):
        return before
    key, where = environment_key(row), HOME / name
    older = stored(name), installed(where)
    where.mkdir(parents=True, exist_ok=True)
    pythons = [*Path.home().glob(f".pyenv/versions/{row.python}.*/bin/python")]
    python = shutil.which(f"python{row.python}") if not pythons else str(pythons[0])
    if python is None:
        return Result(key, missing=f"no Python {row.python} on this machine")
    for command in (
        [uv(), "venv", "--quiet", "--clear", f"--python={python}", str(where / "venv")],
        [uv(), "pip", "install", "--quiet", f"--python={where}/venv/bin/python", *row.install],
    ):
        step = done(command, INSTALL_S)
        if step.returncode:
            return Result(key, missing=f"cannot be installed: {last_line(step.stderr)}")
    if older[0] and older[1] == installed(where) and not older[0].missing:
        return replace(older[0], key=key)
    ask = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {SHOWN}}}))"
    return Result(key, versions=json.loads(done([f"{where}/venv/bin/python", "-c", ask], 60).stdout))


def uv() -> str:
    return shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "uv"


def installed(where: Path) -> str:
    """Every package of the environment with its version; "" where there is none."""
    python = where / "venv" / "bin" / "python"
    return done([uv(), "pip", "freeze", f"--python={python}"], 60).stdout if python.exists() else ""


def keep(name: str, result: Result) -> None:
    (HOME / name / "result.json").write_text(json.dumps(asdict(result), indent=1))


def finish(name: str, part: str, result: Result, source: str) -> None:
    """Keep what a part has found, beside what others have found meanwhile."""
    found = {"job": ("job",), "checkpoints": ("restored",), "tests": ("passed", "failed")}[part]
    now = found_before(name) or result
    keep(name, replace(now, sources={**now.sources, part: source}, **{each: getattr(result, each) for each in found}))
    print(f"{time.strftime('%H:%M:%S')} {name}: {part}: {told(part, result)}", flush=True)


def run_job(name: str, result: Result) -> None:
    """The example job on two hosts: one is killed as it writes step 4, and the job started again."""
    run, summary = HOME / name / "run", HOME / name / "summary.json"
    shutil.rmtree(run, ignore_errors=True)
    summary.unlink(missing_ok=True)
    python = str(HOME / name / "venv" / "bin" / "python")
    launch = "-m orchestrator launch local --processes=2 --max_restarts=1"
    chaos = "--chaos=save.write=kill@process=1@step=4@restart=0"
    train = f"-m launch.train --root={run} --summary={summary} --steps=6 --save_every=2 --attest=full --digests"
    small = "--layers=1 --width=32 --batch_size=8 --length=32 --log_every=1"
    job = done([python, *launch.split(), chaos, "--", python, *train.split(), *small.split()], JOB_S)
    (HOME / name / "job.log").write_text(job.stdout + job.stderr)
    found = Summary.read(summary) if summary.exists() else None
    result.job = job_problem(job.returncode, job.stdout.splitlines(), found)


def child(name: str, what: str, roots: list[Path]) -> dict[str, str]:
    """What came of each root: "" if all went well."""
    python = str(HOME / name / "venv" / "bin" / "python")
    end = done([python, "-m", "tests.proof.versions_child", what, *map(str, roots)], CHECKPOINTS_S)
    said = map(json.loads, filter(None, end.stdout.splitlines()))
    found = {Path(line["root"]).parent.name: line["problem"] or "" for line in said}
    return {root.parent.name: found.get(root.parent.name, last_line(end.stderr)) for root in roots}


def run_checkpoints(results: dict[str, Result], source: str) -> None:
    """Each environment writes one, and restores those of all."""
    roots = {name: HOME / name / "checkpoint" for name, result in results.items() if not result.missing}
    written = {}
    for name, root in roots.items():
        shutil.rmtree(root, ignore_errors=True)
        written |= child(name, "write", [root])
    others = [HOME / name / "checkpoint" for name in ROWS if name not in roots]
    there = [roots[name] for name, problem in written.items() if not problem]
    there += [root for root in others if root.with_suffix(".json").exists()]
    for name in roots:
        unwritten = {writer: f"not written: {problem}" for writer, problem in written.items() if problem}
        results[name].restored = {**unwritten, **child(name, "restore", there)}
        finish(name, "checkpoints", results[name], source)


def run_tests(name: str, result: Result) -> None:
    report = HOME / name / "junit.xml"
    report.unlink(missing_ok=True)
    command = f"-m pytest -q -n {WORKERS} --dist=loadfile -p no:cacheprovider --junitxml={report}".split()
    python = str(HOME / name / "venv" / "bin" / "python")
    end = done([python, *command, "-m", "not jobs and not slow", *TESTS], TESTS_S)
    (HOME / name / "tests.log").write_text(end.stdout + end.stderr)
    result.passed, result.failed = counts(report.read_text()) if report.exists() else (0, [last_line(end.stderr)])


def names(all_of: tuple[str, ...], text: str) -> list[str]:
    wanted = text.split(",") if text else list(all_of)
    if unknown := set(wanted) - set(all_of):
        raise SystemExit(f"no {', '.join(sorted(unknown))}; choose from {', '.join(all_of)}")
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help=f"of {', '.join(ROWS)}; all if not given")
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)}; all if not given; table: only that")
    parser.add_argument("--write", type=Path, help="the page that has the table, between its marks")
    given = parser.parse_args()
    chosen, parts = names(tuple(ROWS), given.rows), names((*PARTS, "table"), given.only)
    source = source_here()
    results = {name: prepared(name, ROWS[name]) for name in chosen}
    there = {name: result for name, result in results.items() if not result.missing}
    for name, result in results.items():
        keep(name, result)
        print(f"{name}: {result.missing or result.versions}", flush=True)
    for part, run in (("job", run_job), ("tests", run_tests)):
        if part == "tests" and "checkpoints" in parts:
            run_checkpoints(there, source)
        for name, result in there.items() if part in parts else ():
            run(name, result)
            finish(name, part, result, source)
    missing = {name: result for name, result in results.items() if result.missing}
    all_of = {name: found for name in ROWS if (found := found_before(name))} | missing
    made = table(all_of, source_here())
    print(made)
    if given.write:
        given.write.write_text(with_table(given.write.read_text(), made))
    return 0 if all(all_of[name].good for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
