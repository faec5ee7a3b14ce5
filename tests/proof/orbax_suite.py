"""Orbax's own tests of its CheckpointManager and of its v1 API, run with ours: which cases pass, and why others do not.

    git clone --depth=1 https://github.com/google/orbax
    make test-orbax ORBAX=orbax                   # ONLY=REGEX; MANAGER=orbax: the same with Orbax's own manager
    python -m tests.proof.orbax_suite ORBAX [--api=v1] [--only=REGEX] [--manager=orbax] [--write=docs/from-orbax.md]

Nothing of Orbax's is kept here: its files are read from the checkout and run as they stand, with `CheckpointManager`,
or the module `v1`, of `orchestrator.compat` in the place of Orbax's own. One process, eight devices. A case is not
applicable where it asks for Orbax's insides; `REASONS` says so for each by name (v1: `tests/proof/orbax_v1_suite.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import types
import unittest
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.reporting import put

DEVICES = 8
CASE_S = 120
SOURCE = "checkpoint/orbax/checkpoint/checkpoint_manager_test.py"
_HELPER = "orbax.checkpoint._src.testing.multiprocess_test"

_INSIDE = "replaces insides of Orbax's own saving (`finalize`, metadata writer, commit callback)"
_STORE = "makes Orbax take a directory for a bucket, and asks for its commit file"
_CLOCK = "replaces `datetime.datetime` in the process, by which Orbax dates steps"
_TEMPORARY = "asks for the temporary directory that Orbax's failed save leaves"

# A case's name is matched by -> why it is not asked of ours.
REASONS = {
    "test_save_preempted_mock": _INSIDE,
    "test_metadata_(save|finalize)_preemption": _INSIDE,
    "test_async_continuous_checkpointing": _INSIDE,
    "test_slow_save_logs_warning": _INSIDE,
    "test_legacy_api_timeout": "asks for the timeouts inside Orbax's checkpointer",
    "test_save_restore_gcs": _STORE,
    "test_save_preempted_gcs": _STORE,
    "test_save_gcs_with": _STORE,
    "test_configure_atomicity": "asks for Orbax's commit file",
    "test_removes_old_saves_time_interval": _CLOCK,
    "test_max_to_keep_zero_other_conditions": _CLOCK,
    "test_async_error_(subsequent|wait)": _TEMPORARY,
    "test_lightweight": "asks for the private list `_checkpoints`",
    "test_save_on_preemption": "replaces `reached_preemption_sync_point`; one process asks for SIGTERM itself here",
    "test_single_host_load_and_broadcast": "replaces Orbax's broadcast; fails with this Orbax itself",
}
# A case's name is matched by -> why ours answers otherwise, on purpose.
OTHERWISE = {
    "test_max_to_keep_zero": "retention never empties a run: where the policy keeps nothing, the newest step stays",
    "test_delete$": "the run's journal stays in the directory, which Orbax leaves empty",
    "test_item_metadata_access_no_handlers_and": "`item_metadata` needs no handler, where Orbax gives None",
    "test_default_item_metadata_with_new": "`item_metadata` needs no handler, where Orbax gives None",
    "test_default_init_multi_item": "an item needs no configured handler to be restored",
}


@dataclass(frozen=True)
class Outcome:
    """Of one case. kind: pass, fails or not applicable. why: its reason, or the error's last line."""

    name: str
    kind: str
    why: str = ""


def run(checkout: Path, only: str, manager: str) -> list[Outcome]:
    """Run the cases whose names match `only`, each in a root of its own."""
    module = _load(checkout, manager)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(module.CheckpointManagerTest)
    return list(run_cases(suite, only, manager, REASONS, OTHERWISE))


def run_cases(
    suite: unittest.TestSuite, only: str, manager: str, reasons: dict[str, str], on_purpose: dict[str, str]
) -> Iterator[Outcome]:
    for case in suite:
        name = getattr(case, "_testMethodName", str(case))
        if not re.search(only, name):
            continue
        reason = next((why for pattern, why in reasons.items() if re.match(pattern, name)), None)
        if reason and manager != "orbax":
            yield Outcome(name, "not applicable", reason)
            continue
        outcome = _run_case(case, name)
        otherwise = next((why for pattern, why in on_purpose.items() if re.match(pattern, name)), None)
        if outcome.kind == "fails" and otherwise and manager != "orbax":
            outcome = Outcome(name, "fails", f"on purpose: {otherwise}")
        print(f"{outcome.kind:14} {name}  {outcome.why}", file=sys.stderr, flush=True)
        yield outcome


def _run_case(case: unittest.TestCase | unittest.TestSuite, name: str) -> Outcome:
    result = unittest.TestResult()
    with _deadline(CASE_S):
        case.run(result)
    if result.skipped:
        return Outcome(name, "not applicable", result.skipped[0][1])
    found = result.errors + result.failures
    if not found:
        return Outcome(name, "pass")
    if os.environ.get("ORBAX_SUITE_TRACES"):
        print(found[0][1], file=sys.stderr)
    return Outcome(name, "fails", _last_line(found[0][1]))


def _last_line(trace: str) -> str:
    lines = [line for line in trace.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Exists\w*|\w+): ", line)]
    return (lines or trace.splitlines())[-1][:200]


@contextlib.contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _load(checkout: Path, manager: str) -> Any:
    """Orbax's test module, with our names in it."""
    module = load_module(checkout, SOURCE)
    if manager != "orbax":
        module.CheckpointManager = _probed()
        compare_classes_of_errors(module.CheckpointManagerTest)
    return module


def compare_classes_of_errors(cases: Any) -> None:
    """Messages are ours."""
    cases.assertRaisesRegex = lambda self, kind, _, *rest, **more: self.assertRaises(kind, *rest, **more)


def load_module(checkout: Path, name: str) -> Any:
    """A test module of Orbax's, by its file. What its helpers start processes with is not in Orbax's wheel."""
    source = checkout / name
    if not source.is_file():
        raise SystemExit(f"{checkout}: no {name} there; ORBAX= is a checkout of https://github.com/google/orbax")
    from absl.testing import absltest

    class MultiProcessTest(absltest.TestCase):
        def multiprocess_create_tempdir(self, name: str) -> str:
            folder = tempfile.mkdtemp(prefix="orbax-suite-")
            self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
            path = os.path.join(folder, name)
            os.mkdir(path)
            return path

    helper = types.ModuleType(_HELPER)
    helper.MultiProcessTest, helper.main = MultiProcessTest, absltest.main  # type: ignore[attr-defined]
    package = importlib.import_module(_HELPER.rpartition(".")[0])
    package.multiprocess_test = helper  # type: ignore[attr-defined]
    sys.modules[_HELPER] = helper
    module = types.ModuleType(f"orbax_{source.stem}")
    module.__file__ = str(source)
    sys.modules[module.__name__] = module
    exec(compile(source.read_text(), str(source), "exec"), module.__dict__)
    return module


def _probed() -> type:
    """Ours, with the private names that the file reads, answered from what ours knows under names of its own."""
    from orchestrator import compat

    class Probed(compat.CheckpointManager):
        @property
        def _default_item(self) -> Any:
            return types.SimpleNamespace(get=lambda: self._items.single)

        @property
        def _checkpointer(self) -> Any:
            from orbax.checkpoint import AsyncCheckpointer

            checkpointer = AsyncCheckpointer.__new__(AsyncCheckpointer)
            timeout_s = self._run.agent().options.save_timeout_s
            checkpointer._async_manager = types.SimpleNamespace(_timeout_secs=timeout_s)
            return checkpointer

        def _root_metadata_file_path(self) -> Any:
            file = self.directory / "metadata" / "_ROOT_METADATA"
            if not file.exists():
                raise ValueError("no metadata")
            return file

    return Probed


def table(outcomes: list[Outcome]) -> str:
    """Counts, then the cases that do not pass, by reason."""
    counts = Counter(outcome.kind for outcome in outcomes)
    applicable = counts["pass"] + counts["fails"]
    lines = [
        f"{counts['pass']} of {applicable} applicable cases pass; {counts['not applicable']} are not applicable.",
        "",
    ]
    lines += ["| | cases | reason | names |", "|---|---|---|---|"]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.kind != "pass":
            by_reason.setdefault((outcome.kind, outcome.why), []).append(outcome.name)
    for (kind, why), names in sorted(by_reason.items()):
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {kind} | {len(names)} | {why.replace('|', '/')} | {shown} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="", help="cases whose names match this regular expression")
    parser.add_argument("--api", default="manager", choices=("manager", "v1"), help="whose tests to run")
    parser.add_argument("--manager", default="ours", choices=("ours", "orbax"))
    parser.add_argument("--write", type=Path, help="the page that gets the table")
    given = parser.parse_args()
    import jax
    from absl import flags

    flags.FLAGS([sys.argv[0]])
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0)
    from tests.proof import orbax_v1_suite

    chosen = run if given.api == "manager" else orbax_v1_suite.run
    outcomes = chosen(given.checkout, given.only, given.manager)
    text = table(outcomes)
    print(text)
    if given.write:
        put(given.write, "make test-orbax" if given.api == "manager" else "make test-orbax, of v1", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
