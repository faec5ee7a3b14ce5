"""Metrics, alerts, dashboard and traces: what Prometheus, promtool and OpenTelemetry's own SDK make of real saves."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import orchestrator as oc
from orchestrator.cli.main import main
from orchestrator.observe import events
from orchestrator.observe.prometheus import Metrics
from orchestrator.observe.spans import Traces
from orchestrator.rules.records import Cause
from tests.support.runs import LIKE, now, state

ROOT = Path(__file__).parents[2]
OPS = ROOT / "docs" / "ops"
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")


def values(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def collected(metrics: Metrics) -> dict[str, float]:
    return values(generate_latest(metrics.registry).decode())


@pytest.fixture
def scraped(root: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What Prometheus gets of a process that has saved two steps, failed one and restored."""
    caplog.set_level("INFO", logger="absl")
    with oc.Agent(root, options=oc.Options(async_save=False, metrics_port=0)) as agent:
        agent.save(0, state(0))
        agent.save(1, state(1))
        (root / "steps" / "00000002").write_text("in the way")
        agent.save(2, state(2))
        agent.restore(LIKE)
        (url,) = re.findall(r"metrics: (http://127\.0\.0\.1:\d+/metrics)", caplog.text)
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
    with pytest.raises(urllib.error.URLError):  # closed with the agent
        urllib.request.urlopen(url, timeout=10)
    return text


def test_an_endpoint_tells_saves_failures_and_restores(scraped: str) -> None:
    got = values(scraped)
    assert got["orchestrator_saves_started_total"] == 3 and got["orchestrator_saves_committed_total"] == 2
    assert got["orchestrator_saves_not_committed_total|refused"] == 1
    assert got["orchestrator_save_blocked_seconds_count"] == 3 and got["orchestrator_save_durable_seconds_count"] == 2
    assert got["orchestrator_last_committed_step"] == 1 and got["orchestrator_epoch"] == 1
    assert got["orchestrator_restore_seconds_count"] == 1 and got["orchestrator_read_bytes_total"] == 2048
    assert got["orchestrator_written_bytes_total"] >= 2 * 2048 and got["orchestrator_commit_interval_seconds"] > 0
    assert 0 <= got["orchestrator_seconds_since_commit"] < 60


def test_the_page_lists_exactly_the_metrics_that_there_are_with_their_types_and_labels(scraped: str) -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(orchestrator_\w+)` \| (\w+) \|([^|]*)\|", page, re.M)
    listed = {name.removesuffix("_total"): kind for name, kind, _ in rows}
    assert listed == {family.name: family.type for family in text_string_to_metric_families(scraped)}
    labels = {name: re.findall(r"`(\w+)`", text) for name, _, text in rows}
    registry = Metrics(0, "h").registry
    for name, expected in labels.items():
        metric: Any = registry._names_to_collectors[name]
        assert list(metric._labelnames) == expected, name


def test_each_kind_that_alerts_ask_about_is_0_from_the_start() -> None:
    """`increase` does not see a series that begins at 1."""
    made = Metrics(0, "h")
    text = generate_latest(made.registry).decode()
    for cause in Cause:
        assert f'orchestrator_saves_not_committed_total{{cause="{cause}"}} 0.0' in text
    assert 'orchestrator_retries_total{what="credentials"} 0.0' in text
    assert "orchestrator_credentials_rejected_total 0.0" in text
    made.on_event(events.CredentialsRejected("somebody", "401"))
    assert "orchestrator_credentials_rejected_total 1.0" in generate_latest(made.registry).decode()


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_metrics(scraped: str) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=scraped, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_alerts_and_they_fire_when_they_should() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=OPS, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_and_dashboard_use_only_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    names = set(re.findall(r"^\| `(orchestrator_\w+)` \| \w+ \|", page, re.M))
    names |= {f"{name}{end}" for name in names if name.endswith("_seconds") for end in ("_bucket", "_sum", "_count")}
    for file in ("alerts.yml", "alerts.test.yml", "dashboard.json"):
        used = set(re.findall(r"\borchestrator_\w+", (OPS / file).read_text()))
        assert used and used <= names, (file, used - names)
    alerts = set(re.findall(r"alert: (\w+)", (OPS / "alerts.yml").read_text()))
    assert alerts == set(re.findall(r"^\| `([A-Z]\w+)` \|", page, re.M))


def test_the_dashboard_is_whole() -> None:
    board = json.loads((OPS / "dashboard.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 14
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    assert not re.search("{{instance}}", json.dumps(board))  # people know hosts
    assert {one["name"] for one in board["annotations"]["list"]} >= {"Restarts", "Incidents"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_each_alert_has_cases_in_which_it_fires_and_in_which_it_does_not() -> None:
    cases = (OPS / "alerts.test.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", (OPS / "alerts.yml").read_text())
    for alert in alerts:
        kept_still = re.search(rf"alertname: {alert}\n +exp_alerts: \[\]", cases)
        fired = re.search(rf"alertname: {alert}\n +exp_alerts:\n", cases)
        assert kept_still and fired, alert


@needs_promtool
def test_prometheus_can_parse_every_query_of_the_dashboard(tmp_path: Path) -> None:
    board = json.loads((OPS / "dashboard.json").read_text())
    shown = [target for panel in board["panels"] for target in panel["targets"]]
    queries = [one["expr"].replace("$job", ".*") for one in (*shown, *board["annotations"]["list"])]
    rules = [{"record": f"panel:{index}", "expr": query} for index, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    command = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_phases_of_the_last_save_quarantine_and_an_orderly_end_are_exported() -> None:
    metrics = Metrics(0, "h")
    before = collected(metrics)
    assert math.isnan(before["orchestrator_quarantined_steps"]) and math.isnan(before["orchestrator_free_bytes"])
    for name, at_s in (("staging", 0.0), ("writing", 1.0), ("writing", 3.0), ("sealing", 4.0), ("waiting", 4.5)):
        metrics.on_event(events.SavePhase(5, "a", name, at_s, 0))
    metrics.on_event(events.SaveCommitted(5, "a", 10.0, 77, 2))
    metrics.on_event(events.SaveCommitted(6, "b", 10.0, 0))  # of whom it is not known
    got = collected(metrics)
    spent = {name: got[f"orchestrator_save_phase_seconds|{name}"] for name in ("staging", "writing", "sealing")}
    assert spent == {"staging": 1.0, "writing": 3.0, "sealing": 0.5}
    assert got["orchestrator_save_phase_seconds|waiting"] == 5.5 and got["orchestrator_quarantined_steps"] == 2
    assert before["orchestrator_run_ended"] == got["orchestrator_run_ended"] == 0
    metrics.on_event(events.Pulse("training", 6, 1.0, 42.0, steps=1, step_s=9.0))
    compiling = collected(metrics)
    metrics.on_event(events.Pulse("training", 7, 1.0, 3.0, steps=2, step_s=2.0))
    training = collected(metrics)
    names = ("orchestrator_main_thread_idle_seconds", "orchestrator_step_seconds")
    assert [[one[name] for name in names] for one in (compiling, training)] == [[42.0, 0.0], [3.0, 2.0]]
    metrics.on_event(events.Closed(0))
    assert collected(metrics)["orchestrator_run_ended"] == 1


def test_a_quarantine_by_another_process_is_seen_at_the_next_commit(root: Path, tmp_path: Path) -> None:
    with oc.Agent(root, options=now(metrics_file=str(tmp_path / "job.prom"))) as agent:
        agent.save(0, state(0))
        assert main(["orchestrator", "quarantine", str(root), "0", "--reason=spike", "--force"]) == 0
        agent.save(1, state(1))
    got = values((tmp_path / "job.prom").read_text())
    assert got["orchestrator_quarantined_steps"] == 1 and got["orchestrator_run_ended"] == 1
    assert got["orchestrator_step_bytes"] > 2048 and got["orchestrator_free_bytes"] > 0


def test_a_textfile_is_whole_and_final(root: Path, tmp_path: Path) -> None:
    with oc.Agent(root, options=now(metrics_file=str(tmp_path / "job.prom"))) as agent:
        agent.save(0, state(0))
    assert values((tmp_path / "job.prom").read_text())["orchestrator_saves_committed_total"] == 1
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["job.prom"]


def test_a_port_or_a_file_that_cannot_be_had_is_a_warning_and_no_harm(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = now(metrics_port=taken.getsockname()[1], metrics_file="/nowhere/job.prom")
        with oc.Agent(root, options=options) as agent:
            agent.save(0, state(0))
            assert agent.all_steps() == [0]
    said = [record.message for record in caplog.records if record.message.startswith("metrics: ")]
    assert len(said) == 2 and "cannot be listened on" in said[0] + said[1] and "/nowhere/job.prom" in said[0] + said[1]


def test_traces_without_a_tracer_provider_go_nowhere_and_hurt_nobody(root: Path) -> None:
    with oc.Agent(root, options=now(traces=True)) as agent:
        assert agent.save(0, state(0)) and agent.all_steps() == [0]


def test_the_listener_is_on_loopback_unless_asked() -> None:
    assert oc.Options().metrics_address == "127.0.0.1" and oc.Options().metrics_port is None
    with pytest.raises(oc.UsageError, match="metrics_port"):
        oc.Options(metrics_port=70000)


def test_counting_is_by_cause_and_intervals_are_medians_of_the_last_ones() -> None:
    at = [0.0]
    metrics = Metrics(0, "h", clock=lambda: at[0])
    for seconds in (100.0, 110.0, 120.0, 220.0):
        at[0] = seconds
        metrics.on_event(events.SaveCommitted(int(seconds), "a", 1.0, 1))
    at[0] = 250.0
    for cause in ("silent", "silent", "fenced"):
        metrics.on_event(events.SaveNotCommitted(1, "a", "r", cause))
    metrics.on_event(events.Retried("store", 1, "get", "a/b", "http 503", 0.1))
    for kind in (events.Retried("journal", 1), events.SteppedDown(1, "a", "r"), events.AttemptsDeleted(1, 7, 2)):
        metrics.on_event(kind)
    metrics.on_event(events.Retried("store", 1, "credentials", "me", "any text at all", 0.1))
    got = collected(metrics)
    assert got["orchestrator_retries_total|credentials"] == 1
    assert got["orchestrator_commit_interval_seconds"] == 10.0 and got["orchestrator_seconds_since_commit"] == 30.0
    assert got["orchestrator_saves_not_committed_total|silent"] == 2 and got["orchestrator_fenced_total"] == 1
    assert got["orchestrator_retries_total|store http 503"] == 1
    assert got["orchestrator_retries_total|journal"] == got["orchestrator_stepped_down_total"] == 1
    assert (got["orchestrator_deleted_bytes_total"], got["orchestrator_delete_failures_total"]) == (7, 2)


def test_held_steps_are_counted_apart_from_saves() -> None:
    metrics = Metrics(0, "host-0")
    assert collected(metrics)["orchestrator_last_held_step"] == -1
    held = (
        events.StepHeld(20, "a", 0.5, 7, copies=1, sent_bytes=3),
        events.StepHeld(40, "a", 0.5, 7, copies=1, sent_bytes=4),
        events.StepNotHeld(60, "a", "no room"),
    )
    for event in held:
        metrics.on_event(event)
    got = collected(metrics)
    assert (got["orchestrator_steps_held_total"], got["orchestrator_steps_not_held_total"]) == (2, 1)
    assert got["orchestrator_held_copies_bytes_total"] == 7
    assert got["orchestrator_last_held_step"] == 40 and got["orchestrator_saves_committed_total"] == 0


def test_spans_have_the_times_of_the_phases_and_the_reason_of_a_failure() -> None:
    sdk: Any = pytest.importorskip("opentelemetry.sdk.trace", reason="the `traces` extra is not installed")
    memory: Any = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporting: Any = pytest.importorskip("opentelemetry.sdk.trace.export")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
    at = [100.0]
    traces = Traces(3, "host-3", provider.get_tracer("test"), clock=lambda: at[0])
    traces.on_event(events.SavePhase(5, "a", "staging", 0.0, 0))
    traces.on_event(events.SavePhase(5, "a", "writing", 1.0, 0))
    traces.on_event(events.SavePhase(5, "a", "writing", 2.0, 10))
    traces.on_event(events.SavePhase(5, "a", "waiting", 4.0, 20))
    at[0] = 106.0
    traces.on_event(events.SaveNotCommitted(5, "a", "process 1 voted to abort", "refused"))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    seconds = {name: (span.start_time / 1e9, span.end_time / 1e9) for name, span in spans.items()}
    assert seconds == {
        "staging": (100.0, 101.0),
        "writing": (101.0, 104.0),
        "waiting": (104.0, 106.0),
        "orchestrator.save": (100.0, 106.0),
    }
    save = spans["orchestrator.save"]
    assert save.status.description == "process 1 voted to abort" and save.attributes["orchestrator.step"] == 5
    assert all(spans[name].parent.span_id == save.context.span_id for name in ("staging", "writing", "waiting"))


def test_saves_that_go_on_at_the_same_time_are_told_apart() -> None:
    """A step on its way from memory to the store, and the next one that queues behind it."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    exporting = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider, at = memory.InMemorySpanExporter(), sdk.TracerProvider(), [0.0]
    provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
    metrics, traces = Metrics(0, "host"), Traces(0, "host", provider.get_tracer("test"), clock=lambda: at[0])
    for now_s, event in [
        (0.0, events.SavePhase(5, "a", "staging", 0.0, 0)),
        (1.0, events.SavePhase(5, "a", "writing", 1.0, 100)),
        (2.0, events.SavePhase(6, "a", "staging", 0.0, 0)),
        (3.0, events.SavePhase(5, "a", "writing", 3.0, 200)),
        (4.0, events.SaveCommitted(5, "a", 4.0, 200)),
        (5.0, events.SavePhase(6, "a", "writing", 3.0, 50)),
        (7.0, events.SaveCommitted(6, "a", 5.0, 200)),
    ]:
        at[0] = now_s
        for reader in (metrics, traces):
            reader.on_event(event)
    assert collected(metrics)["orchestrator_written_bytes_total"] == 250
    saves = {
        span.attributes["orchestrator.step"]: (span.start_time / 1e9, span.end_time / 1e9)
        for span in exporter.get_finished_spans()
        if span.name == "orchestrator.save"
    }
    assert saves == {5: (0.0, 4.0), 6: (2.0, 7.0)}
