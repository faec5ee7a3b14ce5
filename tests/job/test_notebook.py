"""A real notebook kernel: cells that are run again and interrupted, what they show, and what is saved in the end.

Needs jupyter_client and ipykernel, which no other test needs: without them it is skipped.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(300)]
LIMIT_S = 60.0
IN_TIME_S = 15.0  # for a cell to return from Ctrl-C; what it waits for would take LONG_S
LONG_S = 45


class Kernel:
    def __init__(self, folder: Path) -> None:
        self._manager = manager.KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(folder), env={**os.environ, "JAX_PLATFORMS": "cpu"})
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=LIMIT_S)

    def cell(self, code: str, interrupt_at: str = "") -> str:
        """Everything that a cell shows: its streams, its value, the last line of its error. Ctrl-C comes once it has
        shown `interrupt_at`."""
        mine, shown, end = self._client.execute(code), "", time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            try:
                message = self._client.get_iopub_msg(timeout=0.2)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") == mine:
                content: dict[str, Any] = message["content"]
                if content.get("execution_state") == "idle":
                    return shown
                shown += content.get("text", "") + content.get("data", {}).get("text/plain", "")
                shown += f"{content['ename']}: {content['evalue']}" if message["msg_type"] == "error" else ""
                if interrupt_at and interrupt_at in shown:
                    time.sleep(0.3)
                    self._manager.interrupt_kernel()
                    interrupt_at, end = "", time.monotonic() + IN_TIME_S
        raise AssertionError(f"{code}\nis still running; it has shown: {shown}")

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    running = Kernel(tmp_path_factory.mktemp("notebook"))
    shown = running.cell(
        "import os, time, jax.numpy as jnp, orchestrator as oc\nfrom orchestrator import failpoints\n"
        "def hold(rule):\n"  # agents that are made later look it up
        "    os.environ['ORCHESTRATOR_FAILPOINTS'] = rule\n    failpoints.configure(os.environ, 0)\n"
        "state = {'w': jnp.ones((8, 4))}"
    )
    assert "Error" not in shown, shown
    yield running
    running.close()


def test_a_cell_shows_agents_and_what_is_saved_and_restored(kernel: Kernel) -> None:
    assert "process 0 of 1, not opened yet>" in kernel.cell("agent = oc.Agent('shows')\nagent")
    assert "saved step 0: " in kernel.cell("agent.save(0, state)\nagent.wait_until_finished()")
    shown = kernel.cell("agent.restore(state)")
    assert "restored step 0: 128 B in " in shown and "Restored(step=0, state=<1 leaves" in shown
    kernel.cell("agent.close()")
    assert "epoch 1, closed>" in kernel.cell("agent")
    assert "read-only>" in kernel.cell("oc.open_run('shows')")


def test_a_cell_shows_a_bar_of_a_long_restore_in_one_line(kernel: Kernel) -> None:
    kernel.cell("from orchestrator.job import read_step\nread_step.REPORT_S = 0.0")
    kernel.cell(
        "big = {f'w{n}': jnp.ones(1 << 20) for n in range(8)}\nwith oc.Agent('bar') as agent: agent.save(1, big)"
    )
    shown = kernel.cell("value = oc.open_run('bar').restore(big)")
    assert shown.startswith("\rrestoring step 1  [") and shown.endswith(" \r") and "\n" not in shown
    kernel.cell("read_step.REPORT_S = 1.0")


def test_a_cell_that_makes_the_agent_is_run_again_while_it_saves(kernel: Kernel) -> None:
    kernel.cell("agent = oc.Agent('again')\nhold('save.write=delay:1@step=1')\nagent.save(1, state)")
    shown = kernel.cell("agent = oc.Agent('again')\nagent.restore(state).step")
    assert "is saving step 1 there: waiting for it" in shown and "saved step 1: " in shown
    assert "takes over from another agent of this process" in shown and shown.endswith("1")
    assert kernel.cell("hold('')\nagent.save(2, state), agent.wait_until_finished(), agent.all_steps()").endswith(
        "[1, 2])"
    )


# What a cell is doing when Ctrl-C comes, where it is held up meanwhile, and which steps are saved in the end. `again`:
# the cell that is run next.
SAVE_AGAIN = "agent.save(3, state)\nagent.wait_until_finished()"
INTERRUPTED = {
    "staging": ("agent.save(2, state)", f"save.stage=delay:{LONG_S}@step=2", SAVE_AGAIN, "[1, 3]"),
    "restoring": ("agent.restore(state)", f"restore.read=delay:{LONG_S}", SAVE_AGAIN, "[1, 3]"),
    "waiting": (
        *("agent.save(2, state)\nagent.wait_until_finished()", "save.write=delay:3@step=2"),
        *(SAVE_AGAIN, "[1, 2, 3]"),
    ),
    "closing": (
        *("agent.save(2, state)\nagent.close()", "save.write=delay:3@step=2"),
        *(f"agent = oc.Agent(root)\n{SAVE_AGAIN}", "[1, 2, 3]"),
    ),
    "leaving a block": (
        *("with agent:\n  agent.save(2, state)\n  time.sleep(60)", "save.write=delay:3@step=2"),
        *(f"agent = oc.Agent(root)\n{SAVE_AGAIN}", "[1, 2, 3]"),
    ),
    "opening": ("agent = oc.Agent(root)\nagent.save(2, state)", f"epoch.before=delay:{LONG_S}", SAVE_AGAIN, "[1, 3]"),
    "taking over": (
        *("agent.save(2, state)\ntime.sleep(0.2)\nagent = oc.Agent(root)", "save.write=delay:3@step=2"),
        *(SAVE_AGAIN, "[1, 2, 3]"),
    ),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_after_ctrl_c_nothing_that_counts_is_lost_and_the_next_cell_saves(kernel: Kernel, case: str) -> None:
    act, rule, again, steps = INTERRUPTED[case]
    kernel.cell(f"hold('')\nroot = {case!r}\nagent = oc.Agent(root)\nagent.save(1, state)\nagent.wait_until_finished()")
    shown = kernel.cell(f"hold({rule!r})\nprint('now')\n{act}", interrupt_at="now")
    assert shown.endswith("KeyboardInterrupt: "), shown
    assert "is not saved" not in shown
    kernel.cell("hold('')")
    shown = kernel.cell(f"{again}\nagent.all_steps(), agent.restore(state).step, agent.failures")
    assert shown.endswith(f"({steps}, 3, 0)"), shown
    kernel.cell("agent.close()")


def test_an_agent_that_was_closed_by_ctrl_c_says_so(kernel: Kernel) -> None:
    kernel.cell("agent = oc.Agent('closed')\nhold('save.write=delay:1@step=1')\nagent.save(1, state)")
    kernel.cell("print('now')\nagent.close()", interrupt_at="now")
    assert "is closed; open another one" in kernel.cell("agent.save(2, state)")
