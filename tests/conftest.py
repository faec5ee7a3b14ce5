"""JAX as eight CPU devices, and behind them the machine's own; the fixtures that many tests share."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings

from launch.gcs_emulator.process import EmulatorProcess
from tests.support.gcs import emulator
from tests.support.platforms import COMPILING, OTHERS
from tests.support.scheduling import LONGEST, pytest_unconfigure, pytest_xdist_make_scheduler

__all__ = ["pytest_unconfigure", "pytest_xdist_make_scheduler"]  # pytest finds them here

jax.config.update("jax_platforms", ",".join(["cpu", *OTHERS]))  # CPUs first: what names no devices runs on them
jax.config.update("jax_num_cpu_devices", 8)
os.environ |= COMPILING
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of many hundred processes would compile all our modules again
sys.dont_write_bytecode = False
jax.config.update("jax_disable_most_optimizations", not OTHERS)  # JAX here has read its environment
# Under nohup, or in the background of a script, SIGHUP or SIGINT is ignored, and what a test starts would inherit that.
# A handler that does nothing keeps it so for this process only: programs are started with the default.
if threading.current_thread() is threading.main_thread():
    for _signum in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(_signum) == signal.SIG_IGN:
            signal.signal(_signum, lambda *_: None)
# A shared machine is no place for time limits on single examples; --hypothesis-profile=default has more examples.
settings.register_profile("quick", deadline=None, max_examples=60)
settings.load_profile("quick")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and thousands of tests are half a million objects that stay: Python's collector need not go through them
    while they are made, nor a quarter of a second after each file."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with jobs, and the many short ones fill the gaps at the end."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path, len(place)), item.get_closest_marker("jobs") is None))


@pytest.fixture(autouse=True, scope="module")
def _agents_that_were_dropped_end_with_their_file() -> Iterator[None]:
    """A program may drop an agent without `close`: it listens and tells events until Python collects it, which would
    come in the middle of another file's tests."""
    yield
    gc.collect()
    for thread in [each for each in threading.enumerate() if each.name == "dropped"]:
        thread.join(30)


@pytest.fixture(autouse=True, scope="session")
def _no_test_holds_anything_in_the_machines_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ORCHESTRATOR_TIER_DIR"] = str(tmp_path_factory.mktemp("tier"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where a run may be made; it does not exist yet."""
    return tmp_path / "run"


@pytest.fixture
def gcs() -> Iterator[EmulatorProcess]:
    """The session's emulator, without faults afterwards."""
    running = emulator()
    yield running
    running.set_faults()


@pytest.fixture(scope="session")
def mesh8() -> Iterator[jax.sharding.Mesh]:
    """Eight devices as data=4 x model=2."""
    yield jax.make_mesh((4, 2), ("data", "model"))
