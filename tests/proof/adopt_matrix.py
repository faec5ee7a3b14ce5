"""Directories as Orbax 0.4.8 to 0.12 really write them: each is adopted and leaf-identical, or rejected and unchanged.

    make test-adopt                               # ONLY=0.4.8,0.12.0
    python -m tests.proof.adopt_matrix [--only=VERSION,...] [--home=build/adopt] [--write=docs/from-orbax.md]

Each version is installed by uv into an environment of its own below --home, with a JAX of its time, and writes there
what `adopt_writer` lists. Then this program, with the Orbax that the package runs on, has `orchestrator adopt` take
each over, lists it before with --dry_run, and compares every leaf, JSON item and metric with what was saved; and the
same from a bucket of our emulator into a run there. Exit code 1 if a directory is neither, or was changed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.proof import adopt_writer
from tests.support.reporting import put
from tests.support.snapshots import snapshot

REPO = Path(__file__).parents[2]
_OLD = ("numpy<2", "scipy<1.13", "flax==0.8.0", "tensorstore==0.1.51")
VERSIONS: dict[str, tuple[str, ...]] = {
    "0.4.8": ("jax==0.4.23", "jaxlib==0.4.23", *_OLD),
    "0.5.0": ("jax==0.4.24", "jaxlib==0.4.24", *_OLD),
    "0.11.0": ("jax==0.4.38", "jaxlib==0.4.38", "numpy<2.2", "flax==0.10.2"),
    "0.12.0": ("jax==0.10.2", "flax"),
}
INSTALL_S, WRITE_S = 900.0, 900.0
ADOPTED, REJECTED, NONE = "identical", "rejected", "-"
NAME = "make test-adopt"


@dataclass(frozen=True)
class Verdict:
    """What became of one directory. why: of one that was rejected. wrong: what must not be; "" if nothing."""

    word: str
    why: str = ""
    wrong: str = ""


# One directory.


def judge(folder: Path, about: Mapping[str, Any], root: Path) -> Verdict:
    """Adopt what is in `folder` into a run at `root`, which is not there yet."""
    return _judge(str(folder), about, str(root), lambda: snapshot(folder), root.exists)


def judge_in_store(folder: Path, about: Mapping[str, Any]) -> Verdict:
    """The same of a directory in a bucket of the emulator, as Orbax would have written it there: a finished step has an
    object that says so. Into a run in the bucket."""
    from orchestrator.storage import open_storage
    from tests.support import gcs

    source, root = f"{gcs.new_root()}/{folder.name}", gcs.new_root()
    storage = open_storage(source)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        storage.create(path.relative_to(folder).as_posix(), path.read_bytes())
    for step in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        storage.create((step / "commit_success.txt").relative_to(folder).as_posix(), b"written last")

    def keys(url: str) -> list[str]:
        return [entry.key for entry in open_storage(url).list("")]

    return _judge(source, about, root, lambda: keys(source), lambda: bool(keys(root)))


def _judge(
    source: str, about: Mapping[str, Any], root: str, contents: Callable[[], object], written: Callable[[], bool]
) -> Verdict:
    before = contents()
    flags = [f"--from={source}", *about.get("flags", ())]
    dry, _ = adopt(root, *flags, "--dry_run")
    if written():
        return Verdict("", wrong="--dry_run has written something")
    code, said = adopt(root, *flags)
    if contents() != before:
        return Verdict("", wrong="the directory was changed")
    if (dry == 0) != (code == 0):
        return Verdict("", wrong=f"--dry_run ended with {dry}, adopting with {code}")
    why = said.strip().removeprefix("orchestrator adopt: ").replace(source, "DIR")
    if code not in (0, 1, 2, 4) or "Traceback" in said:
        return Verdict("", wrong=f"exit code {code}: {why}")
    if code:
        return Verdict(REJECTED, why, "something was written" if written() else "")
    return Verdict(ADOPTED, wrong=difference(root, about))


def adopt(root: str, *flags: str) -> tuple[int, str]:
    from orchestrator.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["orchestrator", "adopt", root, *flags])
    return code, said.getvalue()


def difference(root: str, about: Mapping[str, Any]) -> str:
    """What of the run is not what was saved; "" if all is."""
    import orchestrator as oc

    reader = oc.open_run(root)
    steps = {str(step) for step in reader.all_steps()}
    if steps != set(about["steps"]):
        return f"steps {sorted(steps)} of {sorted(about['steps'])}"
    for step, saved in about["steps"].items():
        restored = reader.restore(step=int(step))
        assert restored is not None
        known = restored.extra["orbax"]
        trees = restored.state  # of an item that is no tree, or of several
        if known["single"] and not (isinstance(trees, dict) and set(trees) == {"default"}):
            trees = {"default": trees}
        found = {name: adopt_writer.leaves(tree) for name, tree in trees.items() if name not in known["json"]}
        for what, got, wanted in (
            ("arrays", found, saved["trees"]),
            ("JSON", known["json"], saved["json"]),
            ("metrics", restored.metrics, saved["metrics"]),
        ):
            if got != wanted:
                return f"step {step}: {what}: {got} where {wanted} was saved"
    return ""


# All of them.


def table(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """Markdown, from version -> layout -> verdict."""
    layouts = list(dict.fromkeys(name for each in verdicts.values() for name in each))
    every = [verdict for each in verdicts.values() for verdict in each.values() if verdict.word != NONE]
    adopted = sum(verdict.word == ADOPTED and not verdict.wrong for verdict in every)
    rejected = sum(verdict.word == REJECTED and not verdict.wrong for verdict in every)
    lines = [
        f"{len(every)} directories: {adopted} adopted and leaf-identical, {rejected} rejected with the reason and "
        f"nothing changed, {len(every) - adopted - rejected} neither. Each also in a bucket of our emulator, adopted "
        "into a run there, with the same outcome.",
        "",
        "| layout | " + " | ".join(verdicts) + " |",
        "|---|" + "---|" * len(verdicts),
    ]
    reasons: dict[str, str] = {}
    for layout in layouts:
        cells = []
        for each in verdicts.values():
            verdict = each.get(layout, Verdict(NONE))
            cells.append(f"**wrong**: {verdict.wrong}" if verdict.wrong else verdict.word)
            if verdict.why:
                reasons.setdefault(layout, verdict.why)
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    lines += ["", f"`{NONE}`: this version has no such layout.", ""]
    lines += [f"- {layout}: {shortened(why)}" for layout, why in reasons.items()]
    return "\n".join(lines)


def shortened(why: str) -> str:
    return re.sub(r"\s+", " ", why).replace("|", "\\|")


def wrote(version: str, home: Path) -> Path:
    """The folder into which this version has written its directories, now or before."""
    where = home / version
    folder, python = where / "written", where / "venv" / "bin" / "python"
    writer = REPO / "tests" / "proof" / "adopt_writer.py"
    made_of = where / "writer.py"
    if folder.exists() and made_of.exists() and made_of.read_bytes() == writer.read_bytes():
        return folder
    if not python.exists():
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "uv"
        done([uv, "venv", "--quiet", "--clear", f"--python={sys.executable}", str(where / "venv")], INSTALL_S)
        install = [uv, "pip", "install", "--quiet", f"--python={python}"]
        done([*install, f"orbax-checkpoint=={version}", *VERSIONS[version]], INSTALL_S)
    shutil.rmtree(folder, ignore_errors=True)
    done([str(python), str(writer), str(folder)], WRITE_S)
    shutil.copy(writer, made_of)
    return folder


def done(command: list[str], timeout_s: float) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environ.pop(name, None)
    subprocess.run(command, check=True, timeout=timeout_s, env=environ)


def verdicts_of(folder: Path, version: str) -> dict[str, Verdict]:
    found = {}
    for record in sorted(folder.glob("*.json")):
        about = json.loads(record.read_text())
        if "not_written" in about:
            found[about["layout"]] = Verdict(NONE, "")
            continue
        root = folder.parent / "runs" / record.stem
        shutil.rmtree(root, ignore_errors=True)
        verdict = judge(record.with_suffix(""), about, root)
        stored = judge_in_store(record.with_suffix(""), about)
        if stored.wrong or stored.word != verdict.word:
            verdict = replace(verdict, wrong=verdict.wrong or f"in a bucket: {stored.wrong or stored.word}")
        found[about["layout"]] = verdict
        print(f"{version} {about['layout']}: {verdict.wrong or verdict.word} {verdict.why}".rstrip(), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {', '.join(VERSIONS)}; all if not given")
    parser.add_argument("--home", type=Path, default=REPO / "build" / "adopt")
    parser.add_argument("--write", type=Path, help="a page with the table's markers")
    flags = parser.parse_args()
    versions = flags.only.split(",") if flags.only else list(VERSIONS)
    if unknown := set(versions) - set(VERSIONS):
        parser.error(f"no {', '.join(sorted(unknown))}; choose from {', '.join(VERSIONS)}")
    home = flags.home.absolute()
    verdicts = {version: verdicts_of(wrote(version, home), version) for version in versions}
    made = table(verdicts)
    print(made)
    if flags.write:
        put(flags.write, NAME, made)
    return int(any(verdict.wrong for each in verdicts.values() for verdict in each.values()))


if __name__ == "__main__":
    sys.exit(main())
