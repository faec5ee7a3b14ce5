"""`orchestrator launch gke`: writes a job's manifests for GKE. `manifests` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from launch import command, plainfile
from launch.command import LaunchError
from launch.engines import manifests
from launch.engines.manifests import Manifest, PodJob, Pool

HELP = """\
usage: orchestrator launch gke --name NAME --image IMAGE [pool] [flags] -- PROGRAM [ARGUMENT...]
       orchestrator launch gke --check PATH

Prints the manifests of a job for `kubectl apply -f -`, or writes them as a kustomize base (--output). --check finds
what is wrong with manifests, yours or ours, without a cluster: a file, or a directory of .yaml files.

pools:
  --tpu_type tpu-v5-lite-podslice --tpu_topology 4x4     hosts follow from the topology
  --gpu_type nvidia-h100-80gb --gpus_per_host 8 --hosts 4
  --devices_per_process 2 --hosts 4                      simulated CPU devices

examples:
  orchestrator launch gke --name=run7 --image=IMAGE --tpu_type=tpu-v5-lite-podslice --tpu_topology=4x4 -- python job.py
  orchestrator launch gke --check deploy/
"""

FLAGS = flags.FlagValues()
flags.DEFINE_string("name", None, "of the job, and of all that belongs to it", flag_values=FLAGS)
flags.DEFINE_string("image", None, "container image (docker/Dockerfile)", flag_values=FLAGS)
flags.DEFINE_enum("kind", "jobset", ["jobset", "job"], "JobSet, or Indexed Job and Service", flag_values=FLAGS)
flags.DEFINE_string("namespace", "default", "Kubernetes namespace", flag_values=FLAGS)
flags.DEFINE_string("tpu_type", None, "node pool: cloud.google.com/gke-tpu-accelerator", flag_values=FLAGS)
flags.DEFINE_string("tpu_topology", None, "chips of one slice: 4x4, 2x2x4", flag_values=FLAGS)
flags.DEFINE_integer("chips_per_host", 4, "TPU chips of each machine", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("gpu_type", None, "node pool: cloud.google.com/gke-accelerator", flag_values=FLAGS)
flags.DEFINE_integer("gpus_per_host", 8, "GPUs of each machine", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("devices_per_process", None, "simulate CPU devices", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("hosts", None, "pods of one slice, where no topology says it", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "groups of pods, each in a node pool of its own", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("service_account", None, "Kubernetes service account of the pods", flag_values=FLAGS)
flags.DEFINE_string("google_service_account", None, "workload identity: the account it stands for", flag_values=FLAGS)
flags.DEFINE_bool("spot", False, "on spot machines", flag_values=FLAGS)
flags.DEFINE_string("cpu", "4", "CPU of each pod, requested and limit", flag_values=FLAGS)
flags.DEFINE_string("memory", "16Gi", "memory of each pod, requested and limit", flag_values=FLAGS)
flags.DEFINE_integer("scratch_gib", None, "GiB of local SSD at /scratch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("tier_gib", None, "GiB for a memory tier, beside --memory", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("tier_volume", "node", ["node", "pod"], "whose memory: a node's outlasts pods", flag_values=FLAGS)
flags.DEFINE_float("grace_s", 120.0, "seconds for a last save after SIGTERM", lower_bound=1.0, flag_values=FLAGS)
flags.DEFINE_integer("hang_after_s", manifests.HANG_AFTER_S, "a host so long silent is killed", flag_values=FLAGS)
flags.DEFINE_integer("max_restarts", 3, "restarts after failures; preemptions are free", flag_values=FLAGS)
command.define_environment_flags(FLAGS)
flags.DEFINE_string("output", None, "write a kustomize base into this directory", flag_values=FLAGS)
flags.DEFINE_string("check", None, "check manifests, instead of writing some", flag_values=FLAGS)


_MOST_BYTES = 16 << 20
_NODES_MAX = 1_000_000


def to_yaml(documents: Sequence[Manifest]) -> str:
    text: str = yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=120)
    return text


def write_base(documents: Sequence[Manifest], directory: Path) -> list[Path]:
    """One file for each document, and a kustomization that lists them. Raises: LaunchError."""
    files = {f"{document['kind'].lower()}.yaml": document for document in documents}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(files),
    }
    files["kustomization.yaml"] = kustomization
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, document in files.items():
            (directory / name).write_text(to_yaml([document]))
    except OSError as error:
        raise LaunchError(f"--output={directory}: {error.strerror}") from error
    return [directory / name for name in files]


def _nodes(value: Any, known: dict[int, int]) -> int:
    """How many values there are in `value` with its aliases written out. Raises: ValueError for more than are checked:
    a few aliases of aliases make billions, and one of itself has no end."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _NODES_MAX  # as long as we are inside of it
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_nodes(one, known) for one in inside)
    if known[id(value)] >= _NODES_MAX:
        raise ValueError(f"{_NODES_MAX} values or more, with its aliases written out")
    return known[id(value)]


def read(path: Path) -> list[Manifest]:
    """The documents of a file, or of a directory's .yaml files. Raises: LaunchError."""
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    try:
        found = [document for file in files for document in yaml.safe_load_all(plainfile.read_text(file, _MOST_BYTES))]
        _nodes(found, {})
    except OSError as error:
        raise LaunchError(f"--check={path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise LaunchError(f"--check={path}: not manifests in YAML: {why}") from error
    if not found or not all(isinstance(document, dict) for document in found):
        raise LaunchError(f"--check={path}: expected one manifest or more")
    return [document for document in found if document.get("kind") != "Kustomization"]


def _check(path: Path) -> int:
    documents = read(path)
    try:
        from launch.engines import manifest_check

        problems = manifest_check.problems(documents)
    except ImportError as error:
        raise LaunchError("--check needs kubernetes-validate: pip install 'kubernetes-validate>=1.37,<1.38'") from error
    for problem in problems:
        command.complain(problem)
    if not problems:
        print(f"{len(documents)} manifests, nothing wrong")
    return 1 if problems else 0


def _pool(values: dict[str, Any]) -> tuple[Pool, int]:
    """(the pool, hosts of one slice)."""
    kinds = [name for name in ("tpu_type", "gpu_type", "devices_per_process") if values[name] is not None]
    if len(kinds) != 1:
        raise LaunchError("choose from --tpu_type, --gpu_type, --devices_per_process: what the pods run on")
    if values["tpu_type"]:
        if values["hosts"] is not None or values["tpu_topology"] is None:
            raise LaunchError("--tpu_type needs --tpu_topology, which says how many --hosts there are")
        return manifests.tpu_pool(values["tpu_type"], values["tpu_topology"], values["chips_per_host"])
    if values["hosts"] is None:
        raise LaunchError("--hosts is required: pods of one slice")
    if values["gpu_type"]:
        return manifests.gpu_pool(values["gpu_type"], values["gpus_per_host"]), values["hosts"]
    return Pool("cpu", values["devices_per_process"]), values["hosts"]


def _body(values: dict[str, Any], program: list[str]) -> int:
    if values["check"] is not None:
        return _check(Path(values["check"]))
    command.needs_program(program, "gke --name run --image IMAGE")
    for name in ("name", "image"):
        if not values[name]:
            raise LaunchError(f"--{name} is required")
    pool, hosts = _pool(values)
    environ = command.environment_of(values)
    same = [
        "name",
        "image",
        "slices",
        "namespace",
        "service_account",
        "google_service_account",
        "spot",
        "cpu",
        "memory",
    ]
    same += ["scratch_gib", "tier_gib", "tier_volume", "grace_s", "hang_after_s", "max_restarts"]
    job = PodJob(program=program, pool=pool, hosts=hosts, environ=environ, **{name: values[name] for name in same})
    documents = manifests.jobset(job) if values["kind"] == "jobset" else manifests.indexed_job(job)
    if values["output"] is None:
        print(to_yaml(documents), end="")
        return 0
    for path in write_base(documents, Path(values["output"])):
        print(path)
    return 0


def main(arguments: Sequence[str]) -> int:
    return command.run("gke", HELP, FLAGS, arguments, _body)
