"""Programs as people write them, and all the ways in which they end. Each is forked from `program_server`.

`say` writes a line that the test waits for. Where a save must still be in flight, a failpoint makes it slow.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import orchestrator as oc
from orchestrator import compat
from orchestrator.job import rendezvous, sigaction
from tests.support.fakes import another_host

STEPS = 400  # of a loop that is to be stopped: half a minute
QUICK = oc.Options(save_timeout_s=30, rendezvous_timeout_s=30)
heard: list[int] = []  # by a handler of the program's own


def say(*words: object) -> None:
    print(*words, flush=True)


def state() -> dict[str, Any]:
    if jax.process_count() == 1:
        return {"w": jnp.ones(3)}
    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    return {"w": jax.make_array_from_callback((8, 4), rows, lambda at: np.zeros((8, 4), np.float32)[at])}


def joined(index: int, port: int, **settings: Any) -> None:
    """Be process `index` of two."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    for name, value in settings.items():
        jax.config.update(name, value)
    where = f"127.0.0.1:{port}"
    jax.distributed.initialize(where, 2, index, coordinator_bind_address=where)


def loop(*agents: oc.Agent, first: int = 1) -> int:
    """Train until SIGTERM; the step at which all were told to leave."""
    current = state()
    for step in range(first, first + STEPS):
        for agent in agents:
            agent.save(step, current)
        told = [agent.reached_preemption(step) for agent in agents]
        if step == first:
            say("ready")
        if any(told):
            assert all(told), told
            say("left at", step)
            return step
        time.sleep(0.05)
    raise AssertionError("nobody heard of SIGTERM")


def waiting(root: str) -> None:
    """What a program does beside training, until the test has sent its signals."""
    say("ready")
    end = time.monotonic() + 60
    while not os.path.exists(root + ".go") and time.monotonic() < end:
        time.sleep(0.02)
    say("survived")


# Ends.


def unclosed(root: str, how: str) -> None:
    agent = oc.Agent(root, options=QUICK)
    for step in (1, 2):
        agent.save(step, state())
    say("the program ends")
    ends(how)


def ends(how: str) -> None:
    if how == "raise":
        raise ValueError("a bug of the program's own")
    if how == "exit":
        sys.exit(3)


def unclosed_manager(root: str) -> None:
    manager = compat.CheckpointManager(root)
    for step in (1, 2):
        manager.save(step, args=ocp.args.StandardSave(state()))


def unclosed_two(root: str) -> None:
    agents = [oc.Agent(f"{root}-{name}", options=QUICK) for name in ("a", "b")]
    for agent in agents:
        agent.save(1, state())


def unclosed_fenced(root: str) -> None:
    agent = oc.Agent(root, options=QUICK)
    agent.save(1, state())
    agent.wait_until_finished()
    with oc.Agent(root, options=QUICK, rendezvous=another_host()) as other:
        other.save(2, state(), force=True)
    agent.save(3, state())


def unclosed_told(root: str) -> None:
    """As above, but the program has heard of it already."""
    agent = oc.Agent(root, options=QUICK)
    agent.save(1, state())
    agent.wait_until_finished()
    with oc.Agent(root, options=QUICK, rendezvous=another_host()) as other:
        other.save(2, state())
    agent.save(3, state())
    with contextlib.suppress(oc.Fenced):
        agent.wait_until_finished()


def unclosed_preempted(root: str) -> None:
    """The grace of a preemption is over before its save is."""
    loop(oc.Agent(root, save=oc.at([]), options=oc.Options(preemption_grace_s=0.3)))


def closed(root: str, how: str) -> None:
    with oc.Agent(root, options=QUICK) as agent:
        agent.save(1, state())
    if how == "wait":
        waiting(root)
    ends(how)


def unclosed_in_fork(root: str) -> None:
    """Forked children that end in every way have no part in the parent's save."""
    agent = oc.Agent(root, options=QUICK)
    agent.save(1, state())

    def child(how: str) -> None:
        with agent:  # leaving it must not wait for threads that are not here
            try:
                agent.save(2, state())
            except oc.UsageError as error:
                say("child:", error)
            ends(how)

    for how in ("raise", "exit", "return"):
        process = mp.get_context("fork").Process(target=child, args=(how,))
        process.start()
        process.join(30)
        say(how, "child:", process.exitcode)


def again_in_fork(root: str) -> None:
    """An agent of a forked child is another incarnation, as one of any other process, and waits for none."""
    agent = oc.Agent(root, options=QUICK)
    agent.save(1, state())
    agent.wait_until_finished()

    def child() -> None:
        with oc.Agent(root, options=QUICK) as other:
            other.save(2, state())
            say("child's epoch", other.epoch)

    process = mp.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    say("child:", process.exitcode)
    agent.save(3, state())


def workers(root: str) -> None:
    """Data workers beside an open agent are ended by SIGTERM, at any moment, as `multiprocessing` does it."""
    with oc.Agent(root, options=QUICK) as agent:
        with_workers(agent)


def with_workers(agent: oc.Agent) -> None:
    agent.save(1, state())
    fork = mp.get_context("fork")
    for _ in range(5):
        with fork.Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
        with fork.Pool(2):
            pass  # its workers are ended before they have begun
    for context in (fork, mp.get_context("spawn")):
        process = context.Process(target=time.sleep, args=(60,), daemon=True)
        process.start()
        process.terminate()
        process.join(20)
        say(context.get_start_method(), "worker:", process.exitcode)
    fork.Process(target=time.sleep, args=(60,), daemon=True).start()  # ended when the program ends
    agent.save(2, state())


def dropped(root: str) -> None:
    before = threading.active_count()
    agent = oc.Agent(root, options=oc.Options(metrics_file=f"{root}.prom", metrics_port=0))
    agent.save(1, state())
    agent.wait_until_finished()
    assert threading.active_count() > before and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    del agent
    gc.collect()
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.02)
    say("threads left:", [thread.name for thread in threading.enumerate()][1:])
    waiting(root)


# SIGTERM, and other signals.


def trains(root: str) -> None:
    with oc.Agent(root, save=oc.at([]), options=QUICK) as agent:
        loop(agent)


def trains_two(root: str) -> None:
    with oc.Agent(f"{root}-a", save=oc.at([])) as one, oc.Agent(f"{root}-b", save=oc.at([])) as other:
        loop(one, other)


def tunes_then_trains(root: str) -> None:
    """The second agent is opened when SIGTERM has come already."""
    with oc.Agent(f"{root}-a", save=oc.at([])) as agent:
        loop(agent)
    with oc.Agent(f"{root}-b", save=oc.at([])) as agent:
        assert loop(agent) == 1


def second_agent(root: str) -> None:
    with oc.Agent(f"{root}-a", save=oc.at([])) as agent:
        agent.save(1, state())
    with oc.Agent(f"{root}-b", save=oc.at([])) as agent:
        loop(agent)


def does_not_look(root: str) -> None:
    with oc.Agent(root, options=QUICK) as agent:
        agent.save(1, state())
        waiting(root)


def mistaken(root: str, how: str) -> None:
    """Mistakes that nothing catches."""
    if how == "argument":
        oc.Agent(root, save=3)  # type: ignore[arg-type]
    if how == "no run":
        oc.open_run(root)
    agent = oc.Agent(root, options=QUICK)
    agent.save(1, state())
    agent.wait_until_finished()
    if how == "leaf":
        agent.save(2, {"w": object()})
    if how == "like":
        agent.restore({"other": jnp.ones(3)})
    if how == "step":
        agent.restore(state(), step=9)
    agent.close()
    if how == "closed":
        agent.save(2, state())
    try:
        raise KeyError("a key of the program's own")
    except KeyError:
        agent.save(3, state())


def interrupted(root: str, act: str) -> None:
    """Ctrl-C at a prompt: `act` is left, and the agent is used again, or says that it is closed."""
    agent = oc.Agent(root, options=QUICK)
    agent.save(1, state())
    agent.wait_until_finished()
    if act == "open":
        os.environ["ORCHESTRATOR_FAILPOINTS"] = "epoch.before=delay:20@nth=1"  # the next agent looks it up
        agent = oc.Agent(root, options=QUICK)
    try:
        threading.Timer(0.5, say, ("ready",)).start()
        acts(agent, act)
        say("survived")
    except KeyboardInterrupt:
        say("left", act)
    if act == "close":
        agent.close()  # waits again
        try:
            agent.save(3, state())
        except oc.UsageError as error:
            say(error)
        agent = oc.Agent(root, options=QUICK)
    agent.save(3, state())
    agent.wait_until_finished()
    restored = agent.restore(state())
    say("restored", restored and restored.step, agent.failures)
    agent.close()
    say("threads", sorted({thread.name for thread in threading.enumerate()} & {"pulse", "events"}))


def acts(agent: oc.Agent, act: str) -> None:
    if act == "restore":
        agent.restore(state())
        return
    agent.save(2, state())
    agent.close() if act == "close" else agent.wait_until_finished()


def reads(root: str) -> None:
    oc.open_run(root).restore()
    waiting(root)


def reads_as_manager(root: str) -> None:
    options = compat.CheckpointManagerOptions(read_only=True)
    with compat.CheckpointManager(root, options=options) as manager:
        assert not manager.reached_preemption(5)
        waiting(root)


@contextlib.contextmanager
def own_handler() -> Iterator[None]:
    signal.signal(signal.SIGTERM, handler)
    yield
    say("given back" if signal.getsignal(signal.SIGTERM) is handler else "lost")


def handler(number: int, frame: Any) -> None:
    heard.append(number)
    say("the program's own handler ran")


def handled_before(root: str) -> None:
    with own_handler():
        trains(root)


def handled_after(root: str) -> None:
    with oc.Agent(root, options=QUICK) as agent, own_handler():
        agent.save(1, state())
        assert not agent.reached_preemption(1)
        say("ready")
        while not heard:
            time.sleep(0.01)
        say("not heard" if not agent.reached_preemption(2) else "heard")
    say("kept" if signal.getsignal(signal.SIGTERM) is handler else "lost")


def ignored(root: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with oc.Agent(root, options=QUICK) as agent:
        agent.save(1, state())
        waiting(root)
        say("heard:", agent.reached_preemption(2))


def off_the_main_thread(root: str) -> None:
    def work() -> None:
        with oc.Agent(root, options=QUICK) as agent:
            agent.save(1, state())
            agent.wait_until_finished()
            waiting(root)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# Two processes.


def two_end(root: str, index: int, port: int, how: str) -> None:
    joined(index, port)
    unclosed(root, how)


def two_wait(root: str, index: int, port: int, program: str) -> None:
    joined(index, port)
    if program == "closed":
        closed(root, "wait")
    elif program == "reads":
        oc.open_run(root).latest_step()
        waiting(root)
        os._exit(0)  # JAX, who has heard SIGTERM, may wait at the end for the others to agree on a step
    else:
        does_not_look(root)


def two_interrupted(root: str, index: int, port: int, act: str) -> None:
    """Ctrl-C comes to both, and nothing catches it."""
    joined(index, port)
    with oc.Agent(root, options=QUICK) as agent:
        agent.save(1, state())
        agent.wait_until_finished()
        threading.Timer(0.5, say, ("ready",)).start()
        acts(agent, act)
        say("survived")


def two_again(root: str, index: int, port: int) -> None:
    """Every process runs the cell again that makes its agent, while the first one saves."""
    joined(index, port)
    for step in (1, 2, 3):
        agent = oc.Agent(root, options=QUICK)
        restored = agent.restore(state())
        assert (restored.step if restored else 0) == step - 1
        agent.save(step, state())
    agent.close()
    say("epoch", agent.epoch)


def two_train(root: str, index: int, port: int) -> None:
    """Two agents with data workers; then a third, which is opened when the job has been preempted."""
    joined(index, port)
    with oc.Agent(f"{root}-a", save=oc.at([])) as one, oc.Agent(f"{root}-b", save=oc.at([])) as other:
        with_workers(one)
        loop(one, other)
    with oc.Agent(f"{root}-c", save=oc.at([])) as agent:
        assert loop(agent) == 1


def two_handled(root: str, index: int, port: int) -> None:
    signal.signal(signal.SIGTERM, handler)
    joined(index, port)
    trains(root)


def two_without_service(root: str, index: int, port: int) -> None:
    joined(index, port, jax_enable_preemption_service=False)
    with oc.Agent(root, save=oc.at([1]), options=QUICK) as agent:
        for step in range(1, 4):
            agent.save(step, state())
            assert not agent.reached_preemption(step)


def two_save_again(root: str, index: int, port: int) -> None:
    """Process 0 fails, and process 1 is still busy with that save when it hears of it; but all answer the same."""
    joined(index, port)
    with compat.CheckpointManager(root) as manager:
        manager.save(10, args=ocp.args.StandardSave(state()))
        manager.save(20, args=ocp.args.StandardSave(state()))
        asked = 1
        while not manager.should_save(20):  # as often on both, or they would wait for each other in vain
            asked += 1
        assert manager.save(20, args=ocp.args.StandardSave(state()))
        manager.wait_until_finished()
        assert not manager.should_save(20)
    both = rendezvous.connect(30).gather("how often it was asked", asked, 30)
    say("asked alike:", len(set(both)) == 1)


def jaxs_handler(root: str, index: int, port: int) -> None:
    """What `sigterm` takes for JAX's own handler, before and after."""
    joined(index, port)
    say("JAX's:", sigaction.is_jaxs(sigaction.action()))
    signal.signal(signal.SIGTERM, handler)
    say("JAX's:", sigaction.is_jaxs(sigaction.action()))
    assert rendezvous.connect(30).count == 2


PROGRAMS: dict[str, Callable[..., None]] = {
    name: value for name, value in globals().items() if callable(value) and getattr(value, "__module__", "") == __name__
}
