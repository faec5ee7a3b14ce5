"""Kubernetes manifests of a job, as plain data: a JobSet, or an Indexed Job with a headless Service. Pure.

Every pod runs the same program and learns its place from variables (`launch.contract`), so that it needs no access to
the API server. On TPU pools GKE itself gives the workers their addresses, and JAX's own detection is left to it.

What is to happen when a pod ends stands once, in `_pod_failure_policy`: codes that a restart cannot fix fail the job;
a pod that was evicted, or left with 75 (preempted), costs nothing of the restart budget; anything else does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch import contract
from launch.command import LaunchError
from launch.supervise import FINAL_CODES

Manifest = dict[str, Any]

JOBS = "workers"  # the JobSet's one replicatedJob
SCRATCH = "/scratch"
TIER = "/tier"
TIER_KEY = "secret"  # of the Secret NAME-tier
USER_ID = 10001  # of docker/Dockerfile
# Not `python -m launch.health`: the image's working directory, or its PYTHONPATH, may hold a `launch` of the user's.
HEALTH = ("python", "-P", "-m", "orchestrator", "launch", "health")
HANG_AFTER_S = 900
NODE_POOL = "cloud.google.com/gke-nodepool"
_SPOT = "cloud.google.com/gke-spot"


@dataclass(frozen=True)
class Pool:
    """One machine of a node pool: its devices and what they are called. `labels` choose the pool."""

    kind: Literal["tpu", "gpu", "cpu"]
    devices_per_host: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def resource(self) -> str | None:
        return {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu", "cpu": None}[self.kind]


@dataclass(frozen=True)
class PodJob:
    """What to run. `slices` groups of `hosts` pods each; `grace_s` is for the last save, to which contract.LEAVING_S is
    added before Kubernetes kills. `scratch_gib`: of local SSD. `tier_gib`: for a memory tier, beside `memory`; it is
    the node's, and outlasts a pod, or the pod's own (`tier_volume`)."""

    name: str
    image: str
    program: Sequence[str]
    pool: Pool
    hosts: int
    slices: int = 1
    namespace: str = "default"
    service_account: str | None = None
    google_service_account: str | None = None
    spot: bool = False
    cpu: str = "4"
    memory: str = "16Gi"
    scratch_gib: int | None = None
    tier_gib: int | None = None
    tier_volume: Literal["node", "pod"] = "node"
    grace_s: float = 120.0
    hang_after_s: int = HANG_AFTER_S
    max_restarts: int = 3
    environ: Mapping[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises: LaunchError with one line, if no manifest can be made of this."""
        for name, value in (("name", self.name), ("namespace", self.namespace)):
            if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", value):
                raise LaunchError(f"--{name}={value}: expected at most 40 of a-z, 0-9 and -, beginning with a letter")
        if self.google_service_account and not self.service_account:
            raise LaunchError("--google_service_account needs --service_account, the Kubernetes one that stands for it")
        self.memory_limit  # noqa: B018  (it can be told)

    @property
    def memory_limit(self) -> str:
        """Of a pod: what is written to a file system in memory counts as its container's. Raises LaunchError."""
        if self.tier_gib is None:
            return self.memory
        found = re.fullmatch(r"([0-9]+)(Mi|Gi|Ti)", self.memory)
        if not found:
            raise LaunchError(f"--memory={self.memory}: with --tier_gib expected whole Mi, Gi or Ti, as 16Gi")
        mebibytes = int(found[1]) * {"Mi": 1, "Gi": 1 << 10, "Ti": 1 << 20}[found[2]] + (self.tier_gib << 10)
        return f"{mebibytes >> 10}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"

    @property
    def pods(self) -> int:
        return self.hosts * self.slices


def tpu_pool(accelerator: str, topology: str, chips_per_host: int) -> tuple[Pool, int]:
    """(the pool, hosts of one slice), of a topology such as `4x4`. Raises: LaunchError."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise LaunchError(f"--tpu_topology={topology}: expected chips along two or three axes, as 4x4 or 2x2x4")
    chips = math.prod(map(int, topology.split("x")))
    if chips % chips_per_host:
        raise LaunchError(f"--chips_per_host={chips_per_host}: {topology} has {chips} chips, which do not divide so")
    labels = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    return Pool("tpu", chips_per_host, labels), chips // chips_per_host


def gpu_pool(accelerator: str, gpus_per_host: int) -> Pool:
    return Pool("gpu", gpus_per_host, {"cloud.google.com/gke-accelerator": accelerator})


def jobset(job: PodJob) -> list[Manifest]:
    """The manifests of a JobSet, which restarts all pods together; for pods of one slice or of several."""
    job.validate()
    address = f"{job.name}-{JOBS}-0-0.{job.name}:{contract.COORDINATOR_PORT}"
    restarts = _field("metadata.annotations['jobset.sigs.k8s.io/restart-attempt']")
    env = [_variable(contract.RESTART_COUNT, restarts), *_place(job, address), *_tier_env(job, slices=True)]
    if job.slices > 1 and job.pool.kind != "tpu":
        env += [
            _variable(contract.JOB_COUNT, str(job.slices)),
            _variable(contract.JOB_INDEX, _field("metadata.annotations['jobset.sigs.k8s.io/job-index']")),
        ]
    final = "|".join(map(str, sorted(FINAL_CODES)))
    rules = [
        # The Job's reason is the same for all rules of its policy; only the message has the code.
        {
            "name": "hopeless",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"failed with exit code ({final}) "],
        },
        {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        },
    ]
    spec = {
        # Headless by itself; pods find the coordinator before they are ready.
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job.name},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {"maxRestarts": job.max_restarts, "restartStrategy": "BlockingRecreate", "rules": rules},
        "replicatedJobs": [
            {
                "name": JOBS,
                "replicas": job.slices,
                "template": {"spec": {**_indexed(job, "FailJob", backoff=0), "template": _pod(job, env)}},
            }
        ],
    }
    metadata = _metadata(job, job.name)
    # One slice, one node pool: the pods of two slices must not share one.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": NODE_POOL}
    return [
        *_account(job),
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec},
    ]


def indexed_job(job: PodJob) -> list[Manifest]:
    """The manifests of an Indexed Job and its headless Service: where there is no JobSet controller; one slice."""
    job.validate()
    if job.slices != 1:
        raise LaunchError(f"--slices={job.slices}: an Indexed Job is one slice; use --kind=jobset")
    env = [*_place(job, f"{job.name}-0.{job.name}:{contract.COORDINATOR_PORT}"), *_tier_env(job, slices=False)]
    pod = _pod(job, env)
    pod["spec"]["subdomain"] = job.name
    # What a JobSet's exclusive topology does: one pod on each machine, and no other job's.
    terms = [
        {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchExpressions": [{"key": "batch.kubernetes.io/job-name", "operator": "Exists"}]},
        }
    ]
    pod["spec"]["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    selector = {"batch.kubernetes.io/job-name": job.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, job.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [{"name": "coordinator", "port": contract.COORDINATOR_PORT}],
        },
    }
    # Every pod of a job that fails counts by itself.
    spec = {**_indexed(job, "Ignore", backoff=job.max_restarts * job.pods), "template": pod}
    run = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job, job.name), "spec": spec}
    return [*_account(job), service, run]


def _metadata(job: PodJob, name: str) -> Manifest:
    labels = {"app.kubernetes.io/name": job.name, "app.kubernetes.io/managed-by": "checkpoint-orchestrator"}
    return {"name": name, "namespace": job.namespace, "labels": labels}


def _account(job: PodJob) -> list[Manifest]:
    if job.service_account is None or job.google_service_account is None:
        return []
    metadata = _metadata(job, job.service_account)
    metadata["annotations"] = {"iam.gke.io/gcp-service-account": job.google_service_account}
    return [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}]


def _indexed(job: PodJob, preempted: str, backoff: int) -> Manifest:
    return {
        "completionMode": "Indexed",
        "parallelism": job.hosts,
        "completions": job.hosts,
        "backoffLimit": backoff,
        # A pod that is still saving is not replaced yet: two with one index would be two of one process.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": _pod_failure_policy(preempted),
    }


def _pod_failure_policy(preempted: str) -> Manifest:
    """`preempted`: what a preempted pod does to its Job. In a JobSet it fails it, and the JobSet starts all again."""

    def code(action: str, values: Sequence[int]) -> Manifest:
        return {"action": action, "onExitCodes": {"containerName": "job", "operator": "In", "values": list(values)}}

    evicted = {"action": preempted, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {"rules": [code("FailJob", sorted(FINAL_CODES)), evicted, code(preempted, [contract.EXIT_PREEMPTED])]}


def _field(path: str) -> Manifest:
    return {"fieldRef": {"fieldPath": path}}


def _variable(name: str, value: str | Manifest) -> Manifest:
    return {"name": name, "value": _literal(value)} if isinstance(value, str) else {"name": name, "valueFrom": value}


def _literal(text: str) -> str:
    """`text` as it reaches the process: in commands and variables Kubernetes puts the value of NAME for `$(NAME)`."""
    return text.replace("$", "$$")


def _place(job: PodJob, address: str) -> list[Manifest]:
    if job.pool.kind == "tpu":
        return []  # GKE gives the workers of a slice their addresses, and all slices theirs
    env = {contract.COORDINATOR_ADDRESS: address, contract.PROCESS_COUNT: str(job.pods)}
    if job.pool.kind == "cpu":
        env[contract.LOCAL_DEVICES] = str(job.pool.devices_per_host)
    return [_variable(name, value) for name, value in env.items()]


def _tier_env(job: PodJob, *, slices: bool) -> list[Manifest]:
    """Where a pod's tier is, and what it may be lost with: Kubernetes tells a pod its node; an exclusive topology gives
    each Job of a JobSet, a slice, a node pool of its own."""
    if job.tier_gib is None:
        return []
    env = [_variable(contract.TIER_DIR, TIER), _variable("NODE_NAME", _field("spec.nodeName"))]
    domain = "node=$(NODE_NAME)"
    if slices:
        env.append(_variable("SLICE_INDEX", _field("metadata.annotations['jobset.sigs.k8s.io/job-index']")))
        domain = f"slice=$(SLICE_INDEX),{domain}"
    # Without a Secret of this name, process 0 makes one.
    secret = {"secretKeyRef": {"name": f"{job.name}-tier", "key": TIER_KEY, "optional": True}}
    return [*env, {"name": contract.DOMAIN, "value": domain}, _variable(contract.TIER_SECRET, secret)]


def _tier_volume(job: PodJob) -> Manifest:
    if job.tier_volume == "pod":
        return {"name": "tier", "emptyDir": {"medium": "Memory", "sizeLimit": f"{job.tier_gib}Gi"}}
    path = f"/dev/shm/orchestrator-{job.namespace}-{job.name}"
    return {"name": "tier", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}


def _own_tier(job: PodJob) -> Manifest:
    """Kubernetes makes the node's directory for root alone."""
    return {
        "name": "tier",
        "image": job.image,
        "command": ["chown", f"{USER_ID}:{USER_ID}", TIER],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "100m", "memory": "64Mi"}},
        "volumeMounts": [{"name": "tier", "mountPath": TIER}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
            "runAsUser": 0,
        },
    }


def _pod(job: PodJob, env: Sequence[Manifest]) -> Manifest:
    resource = job.pool.resource
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}] if resource else []
    selector = dict(job.pool.labels)
    if job.spot:
        selector[_SPOT] = "true"
        tolerations.append({"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    if job.scratch_gib:
        selector["cloud.google.com/gke-ephemeral-storage-local-ssd"] = "true"
    spec: Manifest = {
        # The Job decides about a new pod; a container started again in the old one would meet another incarnation.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(job.grace_s + contract.LEAVING_S),
        "automountServiceAccountToken": False,
        "securityContext": {"fsGroup": USER_ID, "seccompProfile": {"type": "RuntimeDefault"}},
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(job, env)],
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": f"{job.scratch_gib}Gi"} if job.scratch_gib else {}}],
    }
    if job.tier_gib:
        spec["volumes"].append(_tier_volume(job))
        if job.tier_volume == "node":
            spec["initContainers"] = [_own_tier(job)]
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    return {"metadata": {"labels": _metadata(job, job.name)["labels"]}, "spec": spec}


def _container(job: PodJob, env: Sequence[Manifest]) -> Manifest:
    amounts = {"cpu": job.cpu, "memory": job.memory_limit}
    mounts = [{"name": "scratch", "mountPath": SCRATCH}]
    if job.tier_gib:
        mounts.append({"name": "tier", "mountPath": TIER})
    if job.pool.resource:
        amounts[job.pool.resource] = str(job.pool.devices_per_host)
    return {
        "name": "job",
        "image": job.image,
        "command": list(map(_literal, job.program)),
        "env": [
            _variable(contract.HOST_NAME, _field("metadata.name")),
            _variable(contract.HOST_ADDRESS, _field("status.podIP")),
            _variable(contract.GRACE_PERIOD_S, f"{job.grace_s:g}"),
            _variable(contract.HEARTBEAT_FILE, f"{SCRATCH}/heartbeat"),
            _variable("TMPDIR", SCRATCH),
            *env,
            *(_variable(name, value) for name, value in job.environ.items()),
        ],
        "ports": [{"name": "coordinator", "containerPort": contract.COORDINATOR_PORT}],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        # Alive: heartbeat and pulse are not too old. Before the first one it is starting, as long as that takes.
        "livenessProbe": _probe([*HEALTH, f"--max_age_s={job.hang_after_s}"], period_s=60),
        "readinessProbe": _probe([*HEALTH, "--started"], period_s=10),
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
        },
    }


def _probe(command: Sequence[str], period_s: int) -> Manifest:
    return {"exec": {"command": list(command)}, "periodSeconds": period_s, "timeoutSeconds": 10, "failureThreshold": 3}
