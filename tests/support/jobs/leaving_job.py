"""One process of a job without JAX: `peer_failure` over a board of files, and a barrier at exit such as JAX's.

argv: this process, how many there are, the board's directory, what this process does.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from orchestrator.errors import Fenced, NothingToRestore, SaveFailed
from orchestrator.job import peer_failure

BARRIER_S = 60.0  # longer than everything that should happen here
LONG_S = 600.0
SAVE_S = 5.0  # longer than the others wait for anything else


class FileBoard:
    """A port of files: a key is one file's name. As with JAX's, all are aborted with process 0, but for those that have
    passed the barrier with it."""

    def __init__(self, process: int, count: int, directory: Path) -> None:
        self.process, self.count, self._directory = process, count, directory
        self.connected = True
        self._process_id = os.getpid()
        self._passed = False
        self._service = (directory / "service").open("a")
        if process == 0:
            fcntl.flock(self._service, fcntl.LOCK_EX)
            self.post("serving/0", "")
        else:
            threading.Thread(target=self._watch_service, daemon=True).start()

    def _watch_service(self) -> None:
        while not self.poll("serving/"):
            time.sleep(0.02)
        fcntl.flock(self._service, fcntl.LOCK_SH)  # when process 0 has ended
        time.sleep(0.2)
        if not self._passed:
            os.write(1, b"aborted: the service is gone\n")
            os._exit(98)

    def post(self, key: str, value: str) -> None:
        part = self._directory / f"part-{self.process}-{threading.get_ident()}"
        part.write_text(value)
        part.rename(self._directory / key.replace("/", "|"))

    def poll(self, prefix: str) -> dict[str, str]:
        start = prefix.replace("/", "|")
        return {path.name.removeprefix(start): path.read_text() for path in self._directory.glob(f"{start}*")}

    def meet(self) -> None:
        """All are there before anything happens, as after `jax.distributed.initialize`."""
        self.post(f"there/{self.process}", "")
        while len(self.poll("there/")) < self.count:  # within the test's deadline
            time.sleep(0.02)

    def skip_exit_barrier(self) -> None:
        atexit.unregister(self.barrier)

    def barrier(self) -> None:
        if os.getpid() != self._process_id:
            return
        self.post(f"barrier/{self.process}", "")
        end = time.monotonic() + BARRIER_S
        while len(self.poll("barrier/")) < self.count:
            if time.monotonic() > end:
                print("the barrier at exit timed out", flush=True)
                os._exit(99)
            time.sleep(0.02)
        self._passed = True


class Agent:
    """`in_flight` for `save_s`; its block tells `peer_failure` what leaves it, as that of a real one does."""

    def __init__(self, save_s: float) -> None:
        self._until = time.monotonic() + save_s

    @property
    def in_flight(self) -> int | None:
        return 7 if time.monotonic() < self._until else None

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            peer_failure.block_left(value)


def act(how: str, agent: Agent) -> None:
    try:
        with agent:
            match how:
                case "hang" | "saves" | "saves-for-ever":
                    time.sleep(LONG_S)
                case "interactive":
                    sys.ps1 = ">>> "
                    time.sleep(2)
                    peer_failure.block_left(ValueError("user's bug"))
                case "stays":
                    time.sleep(2)
                case "ends-late":
                    time.sleep(4)
                case (
                    "raises"
                    | "has-threads"
                    | "handler-hangs"
                    | "swallows"
                    | "swallows-and-meets"
                    | "swallows-and-exits"
                ):
                    if how == "has-threads":
                        threading.Thread(target=time.sleep, args=(LONG_S,)).start()
                    if how == "handler-hangs":
                        atexit.register(time.sleep, LONG_S)
                    raise ValueError("user's bug")
                case "fenced":
                    raise Fenced("fenced by epoch 2")
                case "nothing":
                    raise NothingToRestore("no step is left")
                case "save-failed":
                    raise SaveFailed("step 3 was not saved", step=3, attempt="e0001-a01")
                case "interrupted":
                    raise KeyboardInterrupt
                case "exits-3":
                    sys.exit(3)
                case "exits-text":
                    sys.exit("no data")
                case "exits-0":
                    sys.exit(0)
                case "exits-75":
                    sys.exit(75)
                case "system-exit-3":
                    raise SystemExit(3)
    except ValueError as error:
        if not how.startswith("swallows"):
            raise
        if how == "swallows-and-meets":
            peer_failure.passed_barrier()
        if how == "swallows-and-exits":
            sys.exit(4)
        print("swallowed", error)
    match how:
        case "raises-after":
            raise ValueError("user's bug")
        case "exits-3-after":
            sys.exit(3)
        case "shows":
            try:
                raise ValueError("only shown")
            except ValueError:
                sys.excepthook(*sys.exc_info())
        case "forks":
            child = os.fork()
            if child == 0:
                sys.exit(3)
            os.waitpid(child, 0)


def main() -> None:
    process, count, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
    board = FileBoard(process, count, Path(sys.argv[3]))
    atexit.register(lambda: print("first handler"))
    if count > 1:
        atexit.register(board.barrier)
        peer_failure.join(board, f"host-{process}")
        board.meet()
    atexit.register(lambda: print("last handler"))
    agent = Agent({"saves": SAVE_S, "saves-for-ever": LONG_S}.get(how, 0.0))
    peer_failure.register(agent, {"stays": None, "saves": 30.0}.get(how, 3.0))
    if how == "saves":
        saver = threading.Timer(SAVE_S, print, ["saved"])
        saver.daemon = True
        saver.start()
    print("begins")
    act(how, agent)
    print("ends")


main()
