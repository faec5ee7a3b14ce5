"""A real Prometheus that scrapes the rehearsal's jobs and evaluates docs/ops/alerts.yml, as they are.

Each job is scraped in both ways: its own endpoints (job NAME), and its metrics files (job NAME-file), served as
node_exporter does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.processes import free_port

RULES = Path(__file__).parents[3] / "docs" / "ops" / "alerts.yml"
BOARD = RULES.with_name("dashboard.json")
SCRAPE_S = 5
_READY_S = 30.0


class Files:
    """Serves `base/NAME/I.prom` as `/NAME/I`."""

    def __init__(self, base: Path) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, _, index = self.path.strip("/").partition("/")
                try:
                    body = (base / name / f"{int(index)}.prom").read_bytes()
                except (OSError, ValueError):
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Prometheus:
    """`firing`: (job, alert) -> when it was first seen to fire, on the monotonic clock."""

    def __init__(self, folder: Path, jobs: dict[str, Sequence[int]], files: Files) -> None:
        """jobs: name -> its processes' metrics ports."""
        program = shutil.which("prometheus")
        assert program is not None, "prometheus is not installed"
        folder.mkdir(parents=True)
        shutil.copy(RULES, folder / "alerts.yml")
        scrapes: list[dict[str, Any]] = []
        for name, ports in jobs.items():
            scrapes.append(_scrape(name, [f"127.0.0.1:{port}" for port in ports]))
            for index in range(len(ports)):
                one = _scrape(f"{name}-file-{index}", [f"127.0.0.1:{files.port}"])
                relabel = [
                    {"target_label": "job", "replacement": f"{name}-file"},
                    {"target_label": "instance", "replacement": str(index)},
                ]
                scrapes.append({**one, "metrics_path": f"/{name}/{index}", "relabel_configs": relabel})
        settings = {
            "global": {
                "scrape_interval": f"{SCRAPE_S}s",
                "scrape_timeout": f"{SCRAPE_S - 1}s",
                "evaluation_interval": f"{SCRAPE_S}s",
            },
            "rule_files": ["alerts.yml"],
            "scrape_configs": scrapes,
        }
        (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        self.firing: dict[tuple[str, str], float] = {}
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        give_up = time.monotonic() + _READY_S
        while not self._ready():
            if time.monotonic() > give_up or self._process.poll() is not None:
                raise OSError(f"prometheus does not start: {(folder / 'log').read_text()[-1000:]}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return json.load(reply)["data"]

    def look(self) -> None:
        for alert in self.ask("/api/v1/alerts")["alerts"]:
            if alert["state"] == "firing":
                self.firing.setdefault((alert["labels"]["job"], alert["labels"]["alertname"]), time.monotonic())

    def silent_panels(self) -> list[str]:
        """Queries of the dashboard that return nothing, over all jobs together."""
        found = []
        for panel in json.loads(BOARD.read_text())["panels"]:
            for target in panel["targets"]:
                query = urllib.parse.urlencode({"query": target["expr"].replace("$job", ".*")})
                if not self.ask(f"/api/v1/query?{query}")["result"]:
                    found.append(f"{panel['title']}: {target['expr']}")
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


def _scrape(name: str, targets: list[str]) -> dict[str, Any]:
    return {"job_name": name, "static_configs": [{"targets": targets}]}
