"""The command line on real runs: what people see, what programs get, and how mistakes and damage end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator.cli import usage, verify
from orchestrator.cli.command import live_step, open_store
from orchestrator.cli.main import COMMANDS
from orchestrator.rules.keys import journal_key
from orchestrator.tools.verify import read_back, total_bytes
from tests.support.commands import orchestrator
from tests.support.snapshots import snapshot


@pytest.fixture
def run(root: Path) -> Path:
    """Steps 0, 10 and 20 with a loss; 0 is pinned, 10 was saved again by a second incarnation."""
    options = oc.Options(async_save=False)
    with oc.Agent(root, save=oc.every(10), options=options) as agent:
        for step in (0, 10, 20):
            agent.save(step, {"w": jnp.full((4, 2), step), "lr": 0.5}, metrics={"loss": 1 / (step + 1)})
    return root


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_ls_shows_every_step_and_marks_the_one_a_restore_takes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("ls", run) == 0
    header, *rows, counts = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "status", "age", "saved", "size", "metrics"]
    assert [row.split()[0] for row in rows] == ["*", "10", "0"]
    assert "loss=0.047619" in rows[0] and counts.startswith("3 steps, ") and time.strftime("%Z") in rows[0]
    orchestrator("pin", run, 0, "--name=release")
    capsys.readouterr()
    assert orchestrator("ls", run, "--wide") == 0
    header, *rows, counts = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "attempt", "status", "age", "saved", "size", "metrics"]
    assert rows[2].rstrip().endswith("release") and "e0001-a01" in rows[2]


def test_ls_says_why_a_step_is_quarantined_and_when_none_is_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (0, 10, 20):
        orchestrator("quarantine", run, step, "--reason=loss spike", "--force")
    capsys.readouterr()
    assert orchestrator("ls", run) == 0
    out = capsys.readouterr().out
    assert "no step can be restored" in out and out.count("quarantined by hand, ") == 3 and "loss spike" in out


def test_the_last_restorable_step_is_quarantined_only_by_force(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("quarantine", run, 10, "--reason=x") == orchestrator("quarantine", run, 0, "--reason=x") == 0
    before = snapshot(run)
    capsys.readouterr()
    assert orchestrator("quarantine", run, 20, "--reason=x") == 2
    assert "step 20 is the only step that can be restored" in (said := capsys.readouterr().err) and "--force" in said
    assert snapshot(run) == before
    assert orchestrator("quarantine", run, 10, "--reason=x") == 0  # it is quarantined already
    assert orchestrator("quarantine", run, 20, "--reason=x", "--force") == 0
    assert oc.open_run(run).all_steps() == []


def test_a_pin_on_a_quarantined_step_warns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orchestrator("quarantine", run, 10, "--reason=x")
    capsys.readouterr()
    assert orchestrator("pin", run, 20) == 0 and "warning" not in capsys.readouterr().out
    assert orchestrator("pin", run, 10) == 0
    assert "warning: step 10 is quarantined: the pin keeps its data" in capsys.readouterr().out
    assert orchestrator("pin", run, 10, "--json") == 0 and "quarantined" in printed_json(capsys)["warning"]


@pytest.mark.parametrize("name", ["inspect", "plan", "verify", "pin", "unpin", "log"])
def test_the_step_is_a_word_after_the_root_or_a_flag(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator(name, run, 10, "--json") == 0
    by_word = capsys.readouterr().out
    assert orchestrator(name, run, "--step=10", "--json") == 0
    changing = ("pin", "verify")  # the second time there is nothing to change
    assert name in changing or json.loads(capsys.readouterr().out) == json.loads(by_word)
    assert orchestrator(name, run, 10, "--step=10") == 0
    assert orchestrator(name, run, 10, "--step=20") == 2
    assert "two steps, 10 and --step=20: give one" in capsys.readouterr().err


def test_newest_is_a_step_where_one_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("inspect", run, "newest") == 0 and "step 20 e0001" in capsys.readouterr().out
    assert orchestrator("diff", run, 10, "newest") == 1 and "step 10 and step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{run}/steps", "it is inside the run {run}; give that instead"),
        ("{run}/steps/00000010", "it is inside the run {run}; give that instead"),
        ("{run}/journal", "it is inside the run {run}; give that instead"),
        ("{run}/nothing/here", "it is inside the run {run}; give that instead"),
        ("{above}/empty", "the directory is empty"),
        ("{above}/other", "the directory has no journal/ in it"),
        ("{above}/file", "it is a file, and a run is a directory"),
        ("{above}", "it is a directory of runs, of which one must be given: run"),
        ("{above}/runn", "there is no such directory; did you mean {run}?"),
        ("{above}/zzz", "there is no such directory"),
    ],
)
def test_what_is_not_a_run_is_called_by_what_it_is(
    run: Path, tmp_path: Path, place: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    above = tmp_path / "above"
    (above / "empty").mkdir(parents=True)
    (above / "other" / "things").mkdir(parents=True)
    (above / "file").write_text("x")
    run = run.rename(above / "run")
    assert orchestrator("ls", place.format(run=run, above=above)) == 3
    assert f"not a run: {said.format(run=run, above=above)}\n" in capsys.readouterr().err


def test_a_verdict_is_shown_before_anything_is_written(run: Path) -> None:
    versions = list((run / "journal").iterdir())
    judged = next(verify.run(str(run), usage.parse("verify", COMMANDS["verify"], [str(run)])[1]))
    lines = iter(verify.show(judged, {}))
    assert "step 20 e0001-a01: good" in str(next(lines)) and list((run / "journal").iterdir()) == versions
    assert list(lines) == [] and len(list((run / "journal").iterdir())) == len(versions) + 1


def test_a_verdict_that_cannot_be_recorded_is_a_second_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "steps" / "00000000")  # nothing may be appended to a run that has lost entries
    (run / journal_key(2)).unlink()
    assert orchestrator("verify", run, 20) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 20 e0001-a01: good, ")
    assert second.startswith("step 20 e0001-a01: good, but not recorded in the journal: ")


def test_the_bytes_of_a_verify_add_up_to_what_the_step_holds(run: Path) -> None:
    store = open_store(str(run))
    live = live_step(store, None)
    counted: list[int] = []
    read_back(store, live, on_bytes=counted.append)
    total = total_bytes(store.step(live).manifest)
    assert total <= live.bytes and 0.8 * total < sum(counted) <= total


def test_diff_goes_on_past_a_leaf_that_cannot_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        for step in (1, 2):
            state = {"a": jnp.full(9, step), "b": jnp.full((64, 64), step), "c": jnp.zeros(3)}
            agent.save(step, state)
    data = max((root / "steps" / "00000002").rglob("d/*"), key=lambda path: path.stat().st_size)
    body = bytearray(data.read_bytes())
    body[len(body) // 2] ^= 4
    data.write_bytes(body)
    assert orchestrator("diff", root, 1, 2) == 4
    out = capsys.readouterr().out
    assert "1 of 3 leaves differ" in out and "1 leaves could not be read" in out and "b: " in out
    assert orchestrator("diff", root, 1, 2, "--json") == 4
    told = printed_json(capsys)
    assert (told["equal"], [one["leaf"] for one in told["differing"]]) == (1, ["a"])
    assert [(one["leaf"], one["state"]) for one in told["unreadable"]] == [("b", "unreadable")]


def test_log_is_short_for_people_and_whole_for_programs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(15):
        orchestrator("pin", run, 0)
        orchestrator("unpin", run, 0)
    orchestrator("gc", run, "--keep_last=1")
    capsys.readouterr()

    def versions(*flags: str) -> list[str]:
        assert orchestrator("log", run, *flags) == 0
        return [row.split()[0] for row in capsys.readouterr().out.splitlines() if row.split()[0].isdecimal()]

    assert versions() == [str(version) for version in range(15, 35)]  # 35: what was collected
    assert versions("--all") == [str(version) for version in range(36)]
    assert versions("--last=2") == ["33", "34"] and versions("--last=2", "--all") == ["34", "35"]
    assert versions("20") == ["3"]
    assert orchestrator("log", run, "--json") == 0 and len(printed_json(capsys)) == 36


def test_ls_json_is_what_a_program_needs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("ls", run, "--json") == 0
    said = printed_json(capsys)
    assert (said["newest"], said["epoch"], said["version"]) == (20, 1, 3)
    assert [step["step"] for step in said["steps"]] == [0, 10, 20]
    assert set(said["steps"][0]) >= {"attempt", "trust", "bytes", "metrics", "time", "pins", "manifest_crc32c"}
    assert said["retired"] == said["uncommitted"] == []


def test_ls_counts_what_a_crash_has_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run / "steps" / "00000030" / "e0001-a01"
    left.mkdir(parents=True)
    (left / "intent.json").write_text("half")
    assert orchestrator("ls", run, "--json") == 0
    assert printed_json(capsys)["uncommitted"] == [{"step": 30, "attempt": "e0001-a01"}]


def test_inspect_shows_leaves_shardings_and_who_wrote_what(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("inspect", run, "--step=10") == 0
    out = capsys.readouterr().out
    assert "step 10 e0001-a01: committed" in out and "1 process, 8 devices" in out
    assert "w     i32[4,2]" in out and "32 B" in out and "0x1.0000000000000p-1" in out
    assert orchestrator("inspect", run, "--json") == 0
    said = printed_json(capsys)
    assert said["step"]["step"] == 20 and [leaf["bytes"] for leaf in said["leaves"]] == [0, 32]
    assert said["processes"][0]["files"] >= 2 and "write" in said["processes"][0]["seconds"]


def test_log_lists_the_events_in_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orchestrator("quarantine", run, "--step=20", "--reason=loss spike")
    capsys.readouterr()
    assert orchestrator("log", run, "--json") == 0
    kinds = [entry["event"]["kind"] for entry in printed_json(capsys)]
    assert kinds == ["opened-epoch", "committed", "committed", "committed", "quarantined"]
    assert orchestrator("log", run, "--last=1") == 0
    out = capsys.readouterr().out
    assert "loss spike" in out and "; by " in out and len(out.splitlines()) == 3
    assert orchestrator("log", run, "--last=1", "--wide") == 0 and "cli/" in capsys.readouterr().out


def test_a_pin_keeps_a_step_through_gc_until_it_is_taken_off(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("pin", run, "--step=0", "--name=release") == 0
    assert orchestrator("pin", run, "--step=0", "--name=release", "--json") == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["changed"] is False
    assert orchestrator("gc", run, "--keep_last=1") == 0
    assert "deleted step 10 e0001-a01 (retention)" in capsys.readouterr().out
    assert oc.open_run(run).all_steps() == [0, 20]
    assert orchestrator("unpin", run, "--step=0", "--name=release") == 0
    assert orchestrator("gc", run, "--keep_last=1", "--json") == 0
    assert oc.open_run(run).all_steps() == [20]
    assert not (run / "steps" / "00000000").exists()


def test_a_dry_run_says_what_gc_would_do_and_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    assert orchestrator("gc", run, "--dry_run", "--keep_last=1") == 0
    assert "would retire steps 0, 10" in capsys.readouterr().out
    assert snapshot(run) == before


def test_quarantine_is_lifted_by_release_and_its_data_goes_only_by_name(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = run / "steps" / "00000010" / "e0001-a01"
    orchestrator("quarantine", run, "--step=10", "--reason=loss spike")
    before = snapshot(attempt)
    assert orchestrator("gc", run, "--keep_last=1") == 0
    with oc.Agent(run, keep=oc.last(1), options=oc.Options(async_save=False)) as agent:
        agent.save(30, {"w": jnp.full((4, 2), 30), "lr": 0.5})
    assert snapshot(attempt) == before  # neither gc nor a job's retention
    capsys.readouterr()
    assert orchestrator("ls", run, "--json") == 0
    listed = printed_json(capsys)
    first = listed["steps"][0]
    assert (first["step"], first["trust"], listed["aside"]) == (10, "quarantined", [])
    assert first["quarantine"]["reason"] == "loss spike" and first["quarantine"]["by_hand"]
    assert orchestrator("release", run, "--step=10", "--reason=it was the data") == 0
    assert "released step 10" in capsys.readouterr().out
    assert 10 in oc.open_run(run).all_steps()
    assert orchestrator("release", run, "--step=10") == 0 and "nothing to change" in capsys.readouterr().out
    orchestrator("log", run)
    assert "it was the data" in capsys.readouterr().out
    orchestrator("quarantine", run, "--step=10", "--reason=again")
    assert orchestrator("gc", run, "--quarantined=10", "--dry_run", "--json") == 0
    assert attempt.exists()
    assert orchestrator("gc", run, "--quarantined=10") == 0
    assert not attempt.exists() and oc.open_run(run).all_steps() == [30]
    capsys.readouterr()
    assert orchestrator("gc", run, "--quarantined=30") == 6
    assert "step 30 has no quarantined attempt" in capsys.readouterr().err


def test_a_quarantined_step_is_not_restored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("quarantine", run, "--step=20", "--reason=x") == 0
    assert oc.open_run(run).latest_step() == 10
    capsys.readouterr()
    orchestrator("ls", run, "--json")
    assert printed_json(capsys)["newest"] == 10


def test_verify_reads_all_back_records_it_and_finds_a_flipped_bit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert orchestrator("verify", run, "--all") == 0
    assert capsys.readouterr().out.count(": good, ") == 3
    orchestrator("ls", run, "--json")
    assert [step["trust"] for step in printed_json(capsys)["steps"]] == ["verified"] * 3
    data = max((run / "steps" / "00000010").rglob("d/*"), key=lambda path: path.stat().st_size)
    body = bytearray(data.read_bytes())
    body[len(body) // 2] ^= 4
    data.write_bytes(body)
    assert orchestrator("verify", run, "--step=10") == 4
    out = capsys.readouterr().out
    assert "step 10 e0001-a01: damaged" in out and data.name in out and "the manifest says" in out
    assert orchestrator("verify", run, "--step=20") == 0


def no_run(root: Path) -> None:
    (root / "journal").rename(root / "elsewhere")


def newer_format(root: Path) -> None:
    from orchestrator.rules.records import crc32c

    path = root / journal_key(3)
    body = path.read_bytes().replace(b'"format":1', b'"format":9')[:-22]
    path.write_bytes(body + b',"crc32c":"' + crc32c(body).encode() + b'"}\n')


def truncated(root: Path) -> None:
    path = root / journal_key(3)
    path.write_bytes(path.read_bytes()[:-30])


def edited(root: Path) -> None:
    path = root / journal_key(3)
    path.write_bytes(path.read_bytes().replace(b'"step":20', b'"step":99'))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (no_run, 4, "there is no journal, but attempts are, such as step 0 e0001-a01; nothing was changed"),
        (newer_format, 3, "format 9, this version reads up to 1"),
        (truncated, 4, "truncated or not a record"),
        (edited, 4, "it was edited or damaged"),
    ],
)
@pytest.mark.parametrize("command", ["ls", "inspect", "log", "gc", "pin", "verify", "quarantine"])
def test_a_run_that_cannot_be_trusted_is_one_line_a_code_and_no_change(
    run: Path, damage: Any, code: int, message: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    before = snapshot(run)
    flags = {"pin": ["--step=10"], "quarantine": ["10", "--reason=x"]}.get(command, [])
    assert orchestrator(command, run, *flags) == code
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith(f"orchestrator {command}: ") and said.err.count("\n") == 1
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "{run}", "--step=7"], 6, "step 7 is not in this run; it has: 0, 10, 20"),
        (["pin", "{run}", "--step=7"], 6, "step 7 is not in this run; it has: 0, 10, 20"),
        (["quarantine", "{run}", "--step=7", "--reason=x"], 6, "step 7 is not in this run"),
        (["pin", "{run}"], 2, "the STEP is missing"),
        (["pin", "{run}", "newest"], 2, "STEP 'newest': expected the number of a step"),
        (["quarantine", "{run}", "10"], 2, "--reason is missing"),
        (["quarantine", "{run}", "10", "--reason= "], 2, "--reason=: expected why"),
        (["inspect", "{run}", "1O"], 2, "STEP '1O': expected the number of a step, or newest"),
        (["verify", "{run}", "--smaple=10%"], 2, "no flag --smaple; did you mean --sample? choose from --step, "),
        (["verify", "{run}", "--repair_journal=nver"], 2, "did you mean never? choose from auto, never"),
        (["export", "{run}", "10", "x", "--format=safetensor"], 2, "did you mean safetensors? choose from orbax, "),
        (["export", "{run}", "10", "x.safetensors"], 2, "--format=orbax makes a directory; for a file *.safetensors"),
        (["frobnicate"], 2, "no command 'frobnicate'; choose from ls, "),
        (["ls"], 2, "the run's ROOT is missing"),
        (["ls", "{run}", "more"], 2, "unexpected 'more'"),
        (["ls", "{run}", "--nope"], 2, "nope"),
        (["inspect", "{run}", "--step=x"], 2, "orchestrator inspect: --step=x: expected a whole number"),
        (["inspect", "{run}", "--step="], 2, "orchestrator inspect: --step=: expected a whole number"),
        (["ls", "{run}", "--json=maybe"], 2, "orchestrator ls: --json=maybe: expected true or false"),
        (["watch", "{run}", "--interval_s=x"], 2, "orchestrator watch: --interval_s=x: expected a number"),
        (["watch", "{run}", "--once", "--interval_s=nan"], 2, "--interval_s=nan: expected a positive number"),
        (["gc", "{run}", "--keep_last=0"], 2, "--keep_last=0: expected a whole number of at least 1"),
        (["gc", "{run}", "--keep_last=-1", "--dry_run"], 2, "--keep_last=-1: expected a whole number of at least 1"),
        (["log", "{run}", "--last=-3"], 2, "--last=-3: expected a whole number of at least 0"),
        (["plan", "{run}", "--processes=0"], 2, "--processes=0: expected a whole number of at least 1"),
        (["pin", "{run}", "--step=10", "--name="], 2, "--name=: expected the pin's name"),
        (["ls", "a\udcff"], 2, "expected a name in UTF-8"),
        (["inspect", "{run}", "--step=7", "--json"], 6, "step 7 is not in this run; it has: 0, 10, 20"),
        (["report", "{run}", "-o", "{run}/journal"], 1, "journal cannot be written: Is a directory"),
        (["ls", "s3://bucket/run"], 2, "no storage for s3://"),
        (["unlink", "{run}"], 2, "no command 'unlink'; did you mean unpin? choose from ls, "),
        (["ls", "/dev/null/run"], 3, "not a run"),
    ],
)
def test_a_users_mistake_is_one_line_and_its_code(
    run: Path,
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # a mistake that is not noticed writes there
    before = snapshot(run)
    assert orchestrator(*(argument.format(run=run) for argument in arguments)) == code
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert snapshot(run) == before


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: orchestrator {name} ROOT" in out and "examples:" in out
    for example in COMMANDS[name].examples:
        assert example.startswith((f"orchestrator {name} /data/run", f"orchestrator {name} gs://bucket/run")), example


def test_ls_as_a_process_needs_no_jax_and_survives_a_closed_pipe(run: Path) -> None:
    script = (
        "import sys; from orchestrator.cli.main import main; code = main(['orchestrator', 'ls', sys.argv[1]])\n"
        "heavy = {'jax', 'numpy', 'orbax', 'tensorstore', 'gcsfs', 'fsspec', 'aiohttp'}\n"
        "assert not heavy & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("ls '{run}' | true", 141, ""),  # a table
        ("log '{run}' --json | true", 141, ""),
        ("ls '{run}' >/dev/full", 1, "orchestrator: No space left on device\n"),
        ("ls '{run}' --json >/dev/full", 1, "orchestrator: No space left on device\n"),
        ("ls '{run}' >&-", 0, ""),
        ("log '{run}' | LC_ALL=C grep -q 'by hand'", 0, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(run: Path, redirected: str, code: int, said: str) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    orchestrator("quarantine", run, "--step=10", "--reason=by hand: \u00fcber")
    line = f"set -o pipefail; '{sys.executable}' -m orchestrator.cli {redirected.format(run=run)}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=environ)
    assert (done.stderr, done.returncode) == (said, code)


def test_help_of_a_command_may_be_asked_for_in_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("help", "gc") == 0
    first = capsys.readouterr().out
    assert orchestrator("gc", "--help") == 0
    assert capsys.readouterr().out == first


def test_metrics_that_are_not_finite_and_many_are_shown_and_json_stays_json(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    metrics = {name: float(word) for name, word in words.items()} | {f"m{number}": 1.0 for number in range(100)}
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        agent.save(1, {"w": jnp.ones(2)}, metrics=metrics, extra={"best": float("inf")})
    commands = ("ls", "inspect", "report")
    for command in commands:
        assert orchestrator(command, root, "--json") == 0
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        (step,) = told["saves"] if command == "report" else told["steps"] if command == "ls" else [told["step"]]
        assert {name: step["metrics"][name] for name in words} == words and len(step["metrics"]) == 64
        if command == "inspect":
            assert told["metrics"] == metrics | words and told["extra"] == {"best": {"$number": "Infinity"}}
            assert step["metrics_omitted"] == 39
    assert orchestrator("ls", root) == 0 and "a=nan b=inf c=-inf" in (shown := capsys.readouterr().out)
    assert "and 95 more" in shown
    assert orchestrator("inspect", root) == 0 and "m99=1" in capsys.readouterr().out
    assert orchestrator("report", root, f"--output={tmp_path}/report.html") == 0
    assert "NaN" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert orchestrator("export", root, 1, tmp_path / "numpy", "--format=numpy") == 0
    index = json.loads((tmp_path / "numpy" / "index.json").read_text(), parse_constant=pytest.fail)
    assert index["metrics"] == metrics | words
