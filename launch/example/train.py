"""`orchestrator launch train`: trains a small transformer and keeps its checkpoints. Made to be copied from.

The same line on every host: alone (`orchestrator launch train --root=/tmp/run`), on simulated hosts (`orchestrator
launch local --processes 4 --devices_per_process 2 -- orchestrator launch train --root=/tmp/run`), or under any launcher
that `oc.initialize()` knows. `orchestrator example train > train.py` prints it, to be changed. Starting
it again with the same root goes on where it was.

Exit codes: 0 trained to the end, 2 wrong usage, 75 stopped by SIGTERM (the state is saved; start it again), and
those of the checkpoint errors (5 fenced, 6 nothing to restore, ...).
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

import orchestrator as oc
from launch.example.data import Loader, read_text
from launch.example.model import Sizes, Transformer
from launch.example.report import ProgressLine, Summary, state_digest
from orchestrator.errors import EXIT_PREEMPTED
from orchestrator.job.peer_failure import leave
from orchestrator.rules.arguments import path as local_path
from orchestrator.rules.contract import PROCESS_COUNT, RUN_ROOT

AXES = ("data", "model")
FLAGS = flags.FLAGS

flags.DEFINE_string("root", None, "where the checkpoints are: a directory or gs://bucket/path; else the launcher's")
flags.DEFINE_integer("steps", 100, "train up to this step", lower_bound=0)
flags.DEFINE_bool("save", True, "save checkpoints; --nosave trains without")
flags.DEFINE_bool("restore", True, "go on from the newest checkpoint; --norestore starts from nothing")
flags.DEFINE_bool("async", True, "write checkpoints while training goes on")
flags.DEFINE_bool("distributed", True, "join the job a launcher describes; --nodistributed: be a job of one")
flags.DEFINE_integer("save_every", 20, "steps from one checkpoint to the next", lower_bound=1)
flags.DEFINE_integer("hold_every", 0, "steps from one that is held in memory to the next; 0: none", lower_bound=0)
flags.DEFINE_integer("copies", 1, "of each host's part of a held step, on other hosts", lower_bound=0)
flags.DEFINE_enum("domain", "node", ["node", "rack", "slice"], "copies go to hosts in another one")
flags.DEFINE_integer("keep_last", 3, "checkpoints that stay", lower_bound=1)
flags.DEFINE_string("mesh", "data=-1,model=1", "devices along each axis; one -1 stands for the rest")
flags.DEFINE_integer("seed", 0, "of the first parameters and of the order of the data", lower_bound=0)
flags.DEFINE_string("summary", None, "write how the run went to this JSON file")
flags.DEFINE_string("data", None, "directory of text to train on; Python's standard library if unset")
flags.DEFINE_integer("batch_size", 16, "windows per step, over all devices", lower_bound=1)
flags.DEFINE_integer("length", 64, "bytes per window", lower_bound=1)
flags.DEFINE_integer("layers", 2, "blocks of the transformer", lower_bound=1)
flags.DEFINE_integer("width", 64, "size of the transformer's residual stream", lower_bound=1)
flags.DEFINE_integer("heads", 4, "attention heads", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-3, "AdamW's", lower_bound=0.0)
flags.DEFINE_integer("log_every", 10, "steps from one line of output to the next", lower_bound=1)
flags.DEFINE_bool("load_once", False, "read what several hosts need of a step on one of them, and exchange it")
flags.DEFINE_enum("attest", "off", ["off", "save", "full"], "fingerprint every array at saves, and compare at restores")
flags.DEFINE_bool("digests", False, "print a checksum of every batch and of every saved state (gathers the state)")
flags.DEFINE_float("step_delay_s", 0.0, "pause after each step, for demonstrations", lower_bound=0.0)


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,model=2` in the order of AXES; -1 stands for the rest. Raises UsageError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size == "-1" or (size.isdecimal() and int(size) > 0)):
            raise oc.UsageError(f"--mesh={text}: cannot use {part!r}; expected data=D,model=M, one of them may be -1")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise oc.UsageError(f"--mesh={text}: only one axis may be -1")
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(text: str, sizes: Sizes, batch_size: int) -> Mesh:
    """The mesh over all devices of the job. Raises UsageError if devices, batch or model do not divide evenly."""
    axes, count = parse_mesh(text), jax.device_count()
    fixed = abs(axes["data"] * axes["model"])
    for name, size in axes.items():
        if size == -1:
            axes[name] = max(1, count // fixed)
    if axes["data"] * axes["model"] != count:
        raise oc.UsageError(
            f"--mesh={text} needs {'a multiple of ' if '-1' in text else ''}{fixed} devices; this job has {count} "
            f"({jax.process_count()} processes)"
        )
    for what, size, axis in (
        ("batch_size", batch_size, "data"),
        ("heads", sizes.heads, "model"),
        ("width", sizes.width, "model"),
    ):
        if size % axes[axis]:
            raise oc.UsageError(f"--{what}={size}: expected a multiple of {axes[axis]}, the mesh's {axis} axis")
    # Auto: the compiler chooses how intermediate values are split.
    return jax.make_mesh(tuple(axes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Any, Callable[[], Any]]:
    """(what the state looks like and where it lives, a function that makes the first one)."""

    def init(key: jax.Array) -> Any:
        params = model.init(key, np.zeros((1, model.sizes.length), np.int32))["params"]
        return {"params": params, "optimizer": optimizer.init(params)}

    key = jax.random.key(FLAGS.seed)
    boxed = jax.eval_shape(init, key)  # each parameter in a box that names its mesh axes
    shardings = nn.get_sharding(boxed, mesh)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )
    return like, lambda: jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(key)


def make_step(model: Transformer, optimizer: optax.GradientTransformation, like: Any, mesh: Mesh) -> Callable[..., Any]:
    """`step(state, tokens) -> (state, loss)`, compiled; the old state's memory is reused."""

    def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], tokens)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}, loss

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


class Progress:
    """Losses on their way from the devices: fetched only now and then, so that the devices need not wait for Python."""

    def __init__(self, summary: Summary) -> None:
        self._summary, self._waiting = summary, dict[int, jax.Array]()

    def trained(self, step: int, loss: jax.Array, batch: NDArray[np.int32]) -> None:
        self._summary.final_step = step
        self._waiting[step] = loss
        if FLAGS.digests:
            self._summary.batches[step] = f"{zlib.crc32(batch.tobytes()):08x}"
        if step % FLAGS.log_every == 0:
            self.fetch()
            self.report(ProgressLine(step, self._summary.losses[step], self._summary.batches.get(step)))

    def fetch(self) -> None:
        self._summary.losses |= {step: float(loss) for step, loss in self._waiting.items()}
        self._waiting.clear()

    def report(self, what: object) -> None:
        if jax.process_index() == 0:
            print(what, flush=True)


def train(agent: oc.Agent, mesh: Mesh, model: Transformer, loader: Loader, summary: Summary) -> None:
    """From the newest checkpoint, or from nothing, to the last step or to SIGTERM; `summary` then says how it went."""
    optimizer = optax.adamw(FLAGS.learning_rate)
    like, first_state = make_state(model, optimizer, mesh)
    train_step = make_step(model, optimizer, like, mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    progress = Progress(summary)

    restored = agent.restore(like) if FLAGS.restore else None
    if restored:
        state, start = restored.state, restored.step + 1
        loader.restore(restored.process_states.values())
        summary.restored_step, summary.final_step = restored.step, restored.step
        summary.restored_digest = state_digest(state, mesh)
        summary.restored_from = sorted(restored.sources)
        where = " and ".join(summary.restored_from)
        progress.report(f"restored step {restored.step}  digest {summary.restored_digest}  from {where}")
    else:
        state, start = first_state(), 0
    summary.start_step = start

    for step in range(start, FLAGS.steps):
        batch = loader.next()
        # Every process has the whole batch at hand and places only the rows of its own devices.
        tokens = jax.make_array_from_callback(batch.shape, rows, batch.__getitem__)
        state, loss = train_step(state, tokens)
        progress.trained(step, loss, batch)
        if FLAGS.save and agent.save(
            step,
            state,
            metrics={"loss": loss},
            process_state=loader.state_bytes(),
            force=step == FLAGS.steps - 1,
        ):
            if FLAGS.digests:
                summary.saved_digests[step] = state_digest(state, mesh)
            progress.report(ProgressLine(step, digest=summary.saved_digests.get(step)))
        if agent.reached_preemption(step):
            summary.preempted = True
            progress.report(f"told to stop after step {step}")
            break
        time.sleep(FLAGS.step_delay_s)

    progress.fetch()
    agent.wait_until_finished()
    summary.state_digest = state_digest(state, mesh)
    summary.latest_step, summary.interrupted_saves = agent.latest_step(), agent.failures


def make_options(grace_s: float | None) -> oc.Options:
    """The agent's, in step with the time the launcher leaves for a last save."""
    # `async` is a word of the language
    asynchronous = bool(FLAGS["async"].value)
    # Under a launcher standard error is no terminal; what is saved is told all the same.
    options = oc.Options(async_save=asynchronous, attest=FLAGS.attest, load_once=FLAGS.load_once, progress=True)
    return options if grace_s is None else replace(options, preemption_grace_s=grace_s)


def run() -> int:
    """Train as the flags say and return the exit code. Raises OrchestratorError."""
    root = FLAGS.root or os.environ.get(RUN_ROOT)
    if not root:
        raise oc.UsageError("--root is required: where the checkpoints are")
    parse_mesh(FLAGS.mesh)  # a typing error need not wait for the other hosts
    sizes = Sizes(FLAGS.layers, FLAGS.width, FLAGS.heads, FLAGS.length)
    if sizes.width % sizes.heads:
        raise oc.UsageError(f"--width={sizes.width}: expected a multiple of --heads={sizes.heads}")
    if not FLAGS.distributed:
        os.environ[PROCESS_COUNT] = "1"
    job = oc.initialize()
    mesh = make_mesh(FLAGS.mesh, sizes, FLAGS.batch_size)
    if FLAGS.summary:
        local_path("--summary", FLAGS.summary)  # before the training, not after it
    text = read_text(Path(FLAGS.data) if FLAGS.data else None)
    loader = Loader(text, batch_size=FLAGS.batch_size, length=FLAGS.length, seed=FLAGS.seed)
    summary = Summary(jax.process_count(), jax.device_count(), dict(mesh.shape))
    with oc.Agent(
        root,
        save=oc.every(FLAGS.save_every),
        keep=oc.last(FLAGS.keep_last),
        tiers=[oc.memory(every=FLAGS.hold_every, copies=FLAGS.copies, domain=FLAGS.domain)] if FLAGS.hold_every else [],
        options=make_options(job.grace_period_s),
    ) as agent:
        train(agent, mesh, Transformer(sizes), loader, summary)
    if FLAGS.summary and jax.process_index() == 0:
        summary.write(Path(FLAGS.summary))
    if not summary.preempted:
        return 0
    if FLAGS.save and summary.latest_step != summary.final_step:
        raise oc.OrchestratorError(
            f"told to stop, but step {summary.final_step} was not saved; the newest checkpoint is {summary.latest_step}"
        )
    return EXIT_PREEMPTED


def main(argv: Sequence[str]) -> None:
    """Ends the process: nothing of a failing one may wait for hosts that do not come."""
    try:
        if len(argv) > 1:
            raise oc.UsageError(f"unexpected {argv[1]!r}; every setting is a flag, see --help")
        code = run()
    except oc.OrchestratorError as error:
        print(f"train: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception:
        logging.exception("train: failed")
        code = 1
    leave(code)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Arguments that are not flags. A flag that cannot be used is one line and exit code 2."""
    logging.set_verbosity(logging.WARNING)  # unless the flag says otherwise; absl would show each save in ten lines
    try:
        return list(FLAGS(argv))
    except flags.Error as error:
        print(f"train: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(oc.UsageError.exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
