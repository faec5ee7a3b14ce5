"""The package beside the versions of its libraries that people have: a row of docs/versions.md for each environment.

    make test-versions                    # ROWS=oldest,newest ONLY=job,checkpoints
    python -m tests.proof.versions [--rows=NAME,...] [--only=tests,job,checkpoints] [--write=docs/versions.md]

Each environment is built by uv below build/versions and kept until what it is made from changes; so are the results,
of which a part that is run anew replaces its own. Exit code 1 if anything failed or a row has no environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch.example.report import ProgressLine, Summary

REPO = Path(__file__).parents[2]
HOME = REPO / "build" / "versions"
PROJECT = ".[train,grain,dev,traces,safetensors]"
SHOWN = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "flax")
TESTS = ["tests/arrays", "tests/test_reader.py", "tests/compat", "tests/run", "tests/tools", "tests/job"]
PARTS = ("job", "checkpoints", "tests")
INSTALL_S, JOB_S, CHECKPOINTS_S, TESTS_S = 900.0, 300.0, 300.0, 3600.0
BEGIN, END = "<!-- versions: made by `make test-versions` -->", "<!-- end of versions -->"


@dataclass(frozen=True)
class Row:
    """An environment: what uv is to install on which Python."""

    python: str
    install: tuple[str, ...]


ROWS = {
    "oldest": Row("3.11", ("--resolution=lowest-direct", "-e", PROJECT)),
    "jax-0.9": Row("3.11", ("-e", PROJECT, "jax==0.9.2")),
    "lock": Row("3.11", ("-r", "requirements-3.11.lock", "-e", ".")),
    "oldest-orbax": Row("3.11", ("-e", PROJECT, "jax==0.10.2", "orbax-checkpoint==0.11.34")),
    "jax-0.11": Row("3.12", ("-e", PROJECT, "jax==0.11.2")),
    "newest": Row("3.13", ("-r", "requirements-3.12.lock", "-e", ".")),
}


@dataclass
class Result:
    """What was run in a row's environment; None or absent: not yet. job: "" if it went well. restored: by the row that
    wrote the checkpoint, "" if it came back. failed: names of tests."""

    key: str
    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    passed: int | None = None
    failed: list[str] = field(default_factory=list)
    job: str | None = None
    restored: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not (self.missing or self.failed or self.job or any(self.restored.values()))


# The rules.


def key_of(row: Row, files: Mapping[str, bytes]) -> str:
    """What an environment is made from: its row, the project's file, and the lock that the row names."""
    made_from = [repr(row).encode(), files["pyproject.toml"], *(files[one] for one in row.install if one in files)]
    return hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]


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


def table(results: Mapping[str, Result]) -> str:
    """Markdown: a row for each environment, and below it what failed."""
    lines = [
        "| Environment | Python | " + " | ".join(SHOWN) + " | Job of two, killed, resumed | Restores | Tests |",
        "|" + "---|" * (len(SHOWN) + 5),
    ]
    notes = []
    for name, row in ROWS.items():
        result = results.get(name, Result(""))
        numbers = [result.versions.get(each, "") for each in SHOWN]
        job = {None: "not run", "": "yes"}.get(result.job, "**no**")
        back = sum(not problem for problem in result.restored.values())
        restores = f"{back} of {len(result.restored)}" if result.restored else "not run"
        tests = "not run"
        if result.passed is not None:
            tests = f"{result.passed} passed" + f", **{len(result.failed)} failed**" * bool(result.failed)
        lines.append("| " + " | ".join([name, row.python, *numbers, job, restores, tests]) + " |")
        problems = [result.missing, result.job or "", *(f"`{test}` failed" for test in result.failed)]
        problems += [f"the checkpoint of {writer}: {problem}" for writer, problem in result.restored.items() if problem]
        notes += [f"- {name}: {problem}" for problem in problems if problem]
    return "\n".join([*lines, *([""] if notes else []), *notes])


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


def prepared(name: str, row: Row) -> Result:
    """The row's environment, built if need be, and what was found out in it before."""
    files = {path.name: path.read_bytes() for path in (REPO / "pyproject.toml", *REPO.glob("requirements-*.lock"))}
    key, where = key_of(row, files), HOME / name
    kept = where / "result.json"
    if kept.exists():
        result = Result(**json.loads(kept.read_text()))
        if result.key == key and not result.missing:
            return result
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "uv"
    pythons = [*Path.home().glob(f".pyenv/versions/{row.python}.*/bin/python")]
    python = shutil.which(f"python{row.python}") if not pythons else str(pythons[0])
    if python is None:
        return Result(key, missing=f"no Python {row.python} on this machine")
    venv = where / "venv"
    for command in (
        [uv, "venv", "--quiet", f"--python={python}", str(venv)],
        [uv, "pip", "install", "--quiet", f"--python={venv}/bin/python", *row.install],
    ):
        step = done(command, INSTALL_S)
        if step.returncode:
            return Result(key, missing=f"cannot be installed: {last_line(step.stderr)}")
    ask = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {SHOWN}}}))"
    return Result(key, versions=json.loads(done([f"{venv}/bin/python", "-c", ask], 60).stdout))


def keep(name: str, result: Result) -> None:
    (HOME / name / "result.json").write_text(json.dumps(asdict(result), indent=1))


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


def run_checkpoints(results: dict[str, Result]) -> None:
    """Each environment writes one, and restores those of all."""
    roots = {name: HOME / name / "checkpoint" for name, result in results.items() if not result.missing}
    written = {}
    for name, root in roots.items():
        shutil.rmtree(root, ignore_errors=True)
        written |= child(name, "write", [root])
    there = [roots[name] for name, problem in written.items() if not problem]
    for name in roots:
        unwritten = {writer: f"not written: {problem}" for writer, problem in written.items() if problem}
        results[name].restored |= {**unwritten, **child(name, "restore", there)}
        keep(name, results[name])


def run_tests(name: str, result: Result) -> None:
    report = HOME / name / "junit.xml"
    report.unlink(missing_ok=True)
    command = f"-m pytest -q -n 2 --dist=loadfile -p no:cacheprovider --junitxml={report}".split()
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
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)}; all if not given")
    parser.add_argument("--write", type=Path, help="the page that has the table, between its marks")
    given = parser.parse_args()
    chosen, parts = names(tuple(ROWS), given.rows), names(PARTS, given.only)
    results = {name: prepared(name, ROWS[name]) for name in chosen}
    there = {name: result for name, result in results.items() if not result.missing}
    for name, result in results.items():
        keep(name, result)
        print(f"{name}: {result.missing or result.versions}", flush=True)
    for part, run in (("job", run_job), ("tests", run_tests)):
        if part == "tests" and "checkpoints" in parts:
            run_checkpoints(there)
        for name, result in there.items() if part in parts else ():
            run(name, result)
            keep(name, result)
            print(f"{name}: {part} {result.job if part == 'job' else (result.passed, result.failed)}", flush=True)
    known = {name: HOME / name / "result.json" for name in ROWS}
    all_of = {name: Result(**json.loads(path.read_text())) for name, path in known.items() if path.exists()}
    made = table(all_of)
    print(made)
    if given.write:
        given.write.write_text(with_table(given.write.read_text(), made))
    return 0 if all(all_of[name].good for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
