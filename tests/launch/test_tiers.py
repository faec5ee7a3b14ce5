"""Each simulated host has a memory tier of its own, and loses it as it would with its machine."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import tiers
from launch.supervise import Exit
from orchestrator.errors import StorageError
from orchestrator.storage.peer import Peer
from tests.support.launching import DEADLINE_S, eventually, launch, launched
from tests.support.runs import fill

ENVIRON = "e = os.environ; r = int(e['ORCHESTRATOR_RESTART_COUNT']); t = e['ORCHESTRATOR_TIER_DIR']\n"


@pytest.mark.parametrize(
    ("hosts", "before", "lost", "machines"),
    [
        pytest.param(3, (), (), (0, 1, 2), id="the first start"),
        pytest.param(3, (0, 1, 2), (1,), (0, 1, 2), id="the lost one is replaced"),
        pytest.param(2, (0, 1, 2, 3), (1,), (0, 2), id="fewer: those that are there"),
        pytest.param(2, (0, 1, 2, 3), (), (0, 1), id="fewer, none lost"),
        pytest.param(2, (0, 1, 2), (0, 1), (0, 2), id="fewer are left than run"),
        pytest.param(4, (0, 2), (), (0, 2, 1, 3), id="more: those that were there first"),
    ],
)
def test_processes_stay_on_their_machines(
    hosts: int, before: tuple[int, ...], lost: tuple[int, ...], machines: tuple[int, ...]
) -> None:
    assert tiers.machines(hosts, before, lost) == machines


@pytest.mark.parametrize(
    ("hosts", "domains", "sizes"),
    [(4, 2, [2, 2]), (4, 4, [1, 1, 1, 1]), (5, 2, [3, 2]), (4, 3, [2, 1, 1]), (3, 1, [3])],
)
def test_hosts_are_spread_evenly_over_domains(hosts: int, domains: int, sizes: list[int]) -> None:
    found = [tiers.domain(machine, hosts, domains) for machine in range(hosts)]
    assert [found.count(f"domain-{index}") for index in range(domains)] == sizes and found == sorted(found)
    assert tiers.domain(2, hosts, None) == "node=host-2", "each a machine of its own, though they share one here"
    assert tiers.domain(hosts + 3, hosts, domains) == f"domain-{domains - 1}", "a machine that came later"


@pytest.mark.parametrize(
    ("returncode", "sent", "lost"),
    [
        pytest.param(-signal.SIGKILL, (), True, id="killed, by whomever"),
        pytest.param(-signal.SIGTERM, (), True, id="ended by a stranger"),
        pytest.param(-signal.SIGKILL, (signal.SIGTERM,), True, id="killed while it was being ended"),
        pytest.param(128 + signal.SIGKILL, (), True, id="below a shell"),
        pytest.param(-signal.SIGKILL, (signal.SIGTERM, signal.SIGKILL), False, id="killed by the supervisor"),
        pytest.param(-signal.SIGTERM, (signal.SIGTERM,), False, id="ended by the supervisor"),
        pytest.param(-signal.SIGABRT, (), False, id="its JAX has lost a peer"),
        pytest.param(-signal.SIGSEGV, (), False, id="crashed"),
        pytest.param(0, (), False, id="done"),
        pytest.param(1, (), False, id="failed"),
        pytest.param(75, (), False, id="preempted"),
        pytest.param(255, (), False, id="a code above all signals"),
    ],
)
def test_a_host_dies_with_its_machine_if_the_signal_came_from_outside(
    returncode: int, sent: tuple[int, ...], lost: bool
) -> None:
    assert Exit(0, int(returncode), frozenset(sent)).from_outside is lost


LOSES = (
    ENVIRON
    + """
import stat, time
there = sorted(name for name in os.listdir(t) if not name.startswith("orchestrator-"))  # as a server begins with
print(r, e.get("ORCHESTRATOR_DOMAIN"), there, oct(stat.S_IMODE(os.stat(t).st_mode)), flush=True)
if r < 2:
    os.makedirs(t + "/a/b", exist_ok=True)
    open(t + "/a/b/held", "w").close()
    while not all(os.path.exists(f"{os.path.dirname(t)}/host-{j}/a/b/held") for j in range(4)): time.sleep(0.01)
    if r == 0 and i == 1: os.kill(os.getpid(), 9)
    if r == 1 and i == 2: os.abort()
    time.sleep(60)
"""
)


@pytest.mark.jobs
def test_a_killed_host_loses_its_tier_and_no_other_does(tmp_path: Path) -> None:
    flags = ["--processes", "4", "--domains", "2", "--lose_tier_on_kill", "--max_restarts", "2", "--backoff_s", "0"]
    place = tmp_path / "shm"
    place.mkdir()
    done = launch([*flags, "--env", f"ORCHESTRATOR_TIER_DIR={place}"], LOSES)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    kept, new = "['a'] 0o700", "[] 0o700"
    first = [f"[host-{i}] 0 domain-{i // 2} {new}" for i in range(4)]
    second = [f"[host-{i}] 1 domain-{i // 2} {new if i == 1 else kept}" for i in range(4)]
    third = [f"[host-{i}] 2 domain-{i // 2} {kept}" for i in range(4)]  # one that crashes is no lost machine
    assert lines == sorted(first + second + third)
    assert done.stderr.count("has lost its memory tier") == 1 and "host-1 has lost its memory tier" in done.stderr
    assert list(place.iterdir()) == []


@pytest.mark.jobs
def test_survivors_are_the_hosts_of_a_smaller_restart_and_tiers_can_stay(tmp_path: Path) -> None:
    script = (
        ENVIRON
        + "print(r, sorted(os.listdir(t)), flush=True)\nopen(f'{t}/was-{i}', 'w').close()\nimport time\n"
        + "if r == 0:\n"
        + "    while not all(os.path.exists(f'{t}/../host-{j}/was-{j}') for j in range(3)): time.sleep(.01)\n"
        + "    if i == 0: os.kill(os.getpid(), 9)\n    time.sleep(60)\n"
    )
    flags = ["--processes", "3", "--processes_after_restart", "2", "--max_restarts", "1", "--backoff_s", "0"]
    done = launch([*flags, "--lose_tier_on_kill", "--tier_dir", str(tmp_path / "kept")], script)
    assert done.returncode == 0, done.stderr
    again = [line for line in sorted(done.stdout.splitlines()) if "] 1 " in line]
    assert again == ["[host-0] 1 ['was-1']", "[host-1] 1 ['was-2']"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["host-1", "host-2"]


@pytest.mark.jobs
def test_no_tier_and_no_secret_is_left_where_others_look(tmp_path: Path) -> None:
    """Also where the launcher is killed. The secret is one for the job, and only in the environment."""
    script = ENVIRON + (
        "import pathlib, time\n"
        f"p = pathlib.Path({str(tmp_path)!r})\n"
        "print('up', flush=True); open(f'{t}/held', 'w').close(); os.symlink('/etc', f'{t}/link')\n"
        "(p / f'{i}.part').write_text(e['ORCHESTRATOR_TIER_SECRET']); os.rename(p / f'{i}.part', p / f'{i}.secret')\n"
        "time.sleep(60)"
    )
    place, logs = tmp_path / "shm", tmp_path / "logs"
    place.mkdir()
    flags = ["--processes", "2", "--tiers", "--log_dir", str(logs), "--env", f"ORCHESTRATOR_TIER_DIR={place}"]
    with launched(flags, script) as process:
        assert eventually(lambda: len(list(tmp_path.glob("*.secret"))) == 2)
        secrets = {path.read_text() for path in tmp_path.glob("*.secret")}
        assert len(secrets) == 1 and len(bytes.fromhex(secret := secrets.pop())) >= 16
        [mine] = place.iterdir()
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 4 and not any(secret in word for one in family for word in one.cmdline())
        os.kill(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        assert eventually(lambda: not list(place.iterdir())), "the warden has not removed it"
    assert Path("/etc/passwd").exists()
    kept = [path.read_text() for path in logs.rglob("*") if path.is_file()]
    assert kept and not any(secret in text for text in (out, errors, *kept))


@pytest.mark.jobs
def test_what_a_launcher_and_its_warden_could_not_remove_the_next_one_does(tmp_path: Path) -> None:
    name = f"orchestrator-launch-{os.getuid()}-"
    for left in ("dead", "lives", "kept"):
        (tmp_path / f"{name}{left}" / "host-0" / "a").mkdir(parents=True)
        (tmp_path / f"{name}{left}" / "host-0" / "a" / "held").touch()
    (tmp_path / f"{name}dead" / tiers.OWNED).touch()
    (tmp_path / f"{name}link").symlink_to(tmp_path / f"{name}kept")
    with open(tmp_path / f"{name}lives" / tiers.OWNED, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = launch(["--processes", "1", "--tiers", "--env", f"ORCHESTRATOR_TIER_DIR={tmp_path}"], "")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}lives", f"{name}kept", f"{name}link"}
    assert (tmp_path / f"{name}kept" / "host-0" / "a" / "held").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--domains", "3"], "--domains=3: expected 1 to --processes (2)"),
        (["--domains", "0"], "--domains=0: expected 1 to --processes (2)"),
        (["--tier_dir", "/dev/null/x"], "--tier_dir=/dev/null/x: Not a directory"),
        (["--tier_dir", "gs://bucket/x"], "--tier_dir='gs://bucket/x': expected a path"),
        (["--tiers", "--env", "ORCHESTRATOR_TIER_DIR=here"], "ORCHESTRATOR_TIER_DIR='here': expected an absolute path"),
        (["--tiers", "--env", "ORCHESTRATOR_TIER_DIR=/not/here"], "No such file or directory"),
    ],
)
def test_a_tier_that_cannot_be_is_one_clear_line(flags: list[str], message: str) -> None:
    done = launch(["--processes", "2", *flags], "")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.jobs
def test_the_log_directory_says_when_hosts_were_started_and_ended(tmp_path: Path) -> None:
    flags = ["--processes", "2", "--max_restarts", "1", "--lose_tier_on_kill", "--backoff_s", "0"]
    flags += ["--env", f"ORCHESTRATOR_TIER_DIR={tmp_path}", "--log_dir", str(tmp_path / "logs")]
    script = ENVIRON + "import time\nif r == 0 and i == 0: time.sleep(60)\nif r == 0: os.kill(os.getpid(), 9)"
    assert launch(flags, script).returncode == 0
    found = [json.loads(line) for line in (tmp_path / "logs" / "launch.jsonl").read_text().splitlines()]
    times = [one.pop("time") for one in found]
    assert times == sorted(times)
    ends = ["exit", "exit", "ended"]
    assert [one["event"] for one in found] == ["started", "server", "server", *ends, "started", "server", *ends]
    assert [one["restart"] for one in found] == [0] * 6 + [1] * 5
    assert found[3] == {"event": "exit", "restart": 0, "host": 1, "code": 137, "lost": True}
    assert found[4] == {"event": "exit", "restart": 0, "host": 0, "code": 143, "lost": False}
    assert found[7]["machine"] == 1, "a new one in the place of the lost one"


def servers(logs: Path) -> dict[int, list[int]]:
    """Ids of the tier servers of each machine, the newest last."""
    found: dict[int, list[int]] = {}
    for line in (logs / "launch.jsonl").read_text().splitlines() if (logs / "launch.jsonl").exists() else ():
        one = json.loads(line)
        if one["event"] == "server":
            found.setdefault(one["machine"], []).append(one["pid"])
    return found


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.jobs
def test_a_server_outlives_its_hosts_process_and_not_its_host(tmp_path: Path) -> None:
    """And what dies is started again at the same address; no end of the launcher leaves one."""
    script = ENVIRON + (
        "import pathlib, time, json\n"
        f"p = pathlib.Path({str(tmp_path)!r})\n"
        "(p / 'part').mkdir(exist_ok=True); (p / 'part' / f'{r}-{i}').write_text(json.dumps(dict(e)))\n"
        "os.rename(p / 'part' / f'{r}-{i}', p / f'{r}-{i}.told')\n"
        "while not (p / f'go-{r}').exists(): time.sleep(0.02)\n"
        "if i == 1: os.kill(os.getpid(), 9)\n"
        "time.sleep(60)"
    )
    logs = tmp_path / "logs"
    flags = ["--processes", "3", "--max_restarts", "2", "--lose_tier_on_kill", "--backoff_s", "0"]
    flags += ["--processes_after_restart", "2", "--log_dir", str(logs), "--end_grace_s", "0.2"]
    flags += ["--env", f"ORCHESTRATOR_TIER_DIR={tmp_path}"]

    def told(restart: int, hosts: int) -> list[dict[str, str]]:
        assert eventually(lambda: len(list(tmp_path.glob(f"{restart}-*.told"))) == hosts)
        return [json.loads((tmp_path / f"{restart}-{index}.told").read_text()) for index in range(hosts)]

    with launched(flags, script) as process:
        first = told(0, 3)
        addresses = [one["ORCHESTRATOR_TIER_SERVER"] for one in first]
        assert [one["ORCHESTRATOR_DOMAIN"] for one in first] == [f"node=host-{index}" for index in range(3)]
        assert len(set(addresses)) == 3 and {one["ORCHESTRATOR_TIER_PEERS"] for one in first} == {",".join(addresses)}
        secret = bytes.fromhex(first[0]["ORCHESTRATOR_TIER_SECRET"])
        Peer(addresses[0], secret, "0" * 16).announce(7)
        assert list(tmp_path.glob("orchestrator-launch-*/host-0/orchestrator-*/*/epoch-0007"))
        with pytest.raises(StorageError):
            Peer(addresses[0], bytes(32), "0" * 16).announce(8)
        before = servers(logs)
        assert addresses[0] in (logs / "tier-0.log").read_text()
        os.kill(before[2][0], signal.SIGKILL)
        Peer(addresses[2], secret, "0" * 16).announce(7)  # as soon as it has been started again

        (tmp_path / "go-0").touch()
        second = told(1, 2)
        assert [one["ORCHESTRATOR_TIER_SERVER"] for one in second] == [addresses[0], addresses[2]]
        assert second[0]["ORCHESTRATOR_TIER_PEERS"] == f"{addresses[0]},{addresses[2]}", "the lost one has no server"
        assert servers(logs) == before and runs(before[0][0]) and not runs(before[1][0])

        family = psutil.Process(process.pid).children(recursive=True)
        serving = [one for one in family if "orchestrator.run.tier_server" in one.cmdline()]
        assert len(serving) == 2 and not any(secret.hex() in " ".join(one.cmdline()) for one in family)
        serving[0].suspend()  # reads no end of its input
        os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert "the tier server of machine 2 has died; started again" in errors and "tier_server.py" not in errors
        assert eventually(lambda: not any(runs(one.pid) for one in serving))


def prefetched(logs: Path) -> list[dict[str, Any]]:
    lines = (logs / "launch.jsonl").read_text().splitlines()
    return sorted((one for one in map(json.loads, lines) if one["event"] == "prefetch"), key=lambda one: one["host"])


@pytest.mark.jobs
def test_a_restart_brings_what_it_will_restore_into_the_tiers(tmp_path: Path) -> None:
    root, logs = tmp_path / "run", tmp_path / "logs"
    fill(root, 1)
    flags = ["--processes", "2", "--max_restarts", "1", "--tier_dir", str(tmp_path / "tiers"), "--backoff_s", "0"]
    done = launch([*flags, "--run_root", str(root), "--log_dir", str(logs)], waits_for_prefetch(logs, 2))
    assert done.returncode == 0, done.stderr
    found = prefetched(logs)
    assert [(one["restart"], one["host"]) for one in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    first, again = [found[0]["found"], found[2]["found"]], [found[1]["found"], found[3]["found"]]
    attempt = [path for path in (root / "steps" / "00000001").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in attempt if path.name != "manifest.json")
    assert sum(one["store_bytes"] for one in first) == size, "every byte leaves the store once"
    assert [one["store_bytes"] + one["peers_bytes"] for one in again] == [0, 0]
    assert "host-1 prefetched step 1 (committed)" in done.stderr


@pytest.mark.jobs
def test_a_job_starts_whatever_becomes_of_the_prefetch(tmp_path: Path) -> None:
    root, logs = tmp_path / "run", tmp_path / "logs"
    fill(root, 1)
    (root / "journal" / f"{0:020d}.json").write_text("{")
    flags = ["--processes", "1", "--tier_dir", str(tmp_path / "tiers"), "--run_root", str(root)]
    done = launch([*flags, "--log_dir", str(logs)], waits_for_prefetch(logs, 1).replace("r == 0", "7"))
    assert done.returncode == 7 and "could not prefetch" in done.stderr
    assert [one["code"] for one in prefetched(logs)] != [0]


def waits_for_prefetch(logs: Path, hosts: int) -> str:
    return ENVIRON + (
        "import pathlib, time\n"
        f"log, give_up = pathlib.Path({str(logs / 'launch.jsonl')!r}), time.monotonic() + {DEADLINE_S / 2}\n"
        f"enough = {hosts} * (r + 1)\n"
        "while log.read_text().count('\"prefetch\"') < enough and time.monotonic() < give_up: time.sleep(0.05)\n"
        "raise SystemExit(r == 0)"
    )
