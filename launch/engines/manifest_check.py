"""Finds what is wrong with manifests, without a cluster: `problems` returns one line for each fault, named.

Core kinds are held against Kubernetes' published schemas (`kubernetes-validate`, of the extra `gke`; nothing unknown is
let through). Those have no JobSet, so its fields and rules are written down here from its published CRD and webhook
(jobset.x-k8s.io/v1alpha2), and each Job in it is checked as a Job. Last come the rules of this project's contract, that
no schema can know: who is the coordinator, how many processes there are, and how long a last save may take.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import contract
from launch.engines.manifests import Manifest

KUBERNETES_VERSION = "1.37"
NAME_LENGTH = 63
POD_SUFFIX = "-abcde"  # what the Job controller appends to a pod's name

_TEXTS = {"type": "array", "items": {"type": "string"}}
_ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
_ACTIONS += ["RestartJob", "RestartJobAndIgnoreMaxRestarts"]
_REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
_RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")


def _closed(required: Sequence[str] = (), **properties: Any) -> Manifest:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_RULE = _closed(
    ["name", "action"],
    name={"type": "string", "maxLength": 128},
    action={"enum": _ACTIONS},
    onJobFailureReasons=_TEXTS,
    onJobFailureMessagePatterns=_TEXTS,
    targetReplicatedJobs=_TEXTS,
)
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
JOBSET = _closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=_closed(
        ["replicatedJobs"],
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _closed(
                ["name", "template"],
                name={"type": "string"},
                groupName={"type": "string"},
                replicas=_COUNT,
                template=_closed(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
                dependsOn={
                    "type": "array",
                    "maxItems": 5,
                    "items": _closed(
                        ["name", "status"], name={"type": "string"}, status={"enum": ["Ready", "Complete"]}
                    ),
                },
            ),
        },
        network=_closed(
            enableDNSHostnames={"type": "boolean"},
            publishNotReadyAddresses={"type": "boolean"},
            subdomain={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"},
        ),
        successPolicy=_closed(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs=_TEXTS),
        failurePolicy=_closed(
            maxRestarts=_COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={"type": "array", "items": _RULE},
        ),
        startupPolicy=_closed(["startupPolicyOrder"], startupPolicyOrder={"enum": ["AnyOrder", "InOrder"]}),
        coordinator=_closed(["replicatedJob"], replicatedJob={"type": "string"}, jobIndex=_COUNT, podIndex=_COUNT),
        suspend={"type": "boolean"},
        managedBy={"type": "string", "maxLength": 63},
        ttlSecondsAfterFinished=_COUNT,
        volumeClaimPolicies={"type": "array", "maxItems": 50},
    ),
)


def problems(documents: Sequence[Manifest]) -> list[str]:
    """One line for each fault, `Kind/name: path: what is wrong`; [] if there is none.

    Raises: ImportError if `kubernetes-validate` is not installed.
    """
    found: list[str] = []
    for document in documents:
        metadata = document.get("metadata")
        name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
        where = f"{document.get('kind', '?')}/{name}"
        faults = list(_jobset(document) if document.get("kind") == "JobSet" else _core(document))
        if not faults:  # the rules below read what the schema promises
            faults = list(_contract(document, documents))
        found += [f"{where}: {fault}" for fault in faults]
    return found


def _core(document: Manifest, prefix: str = "") -> Iterator[str]:
    """Faults of a document of a core kind, by its published schema, and by the Job controller's own rules."""
    import kubernetes_validate
    from jsonschema import ValidationError

    if not all(isinstance(document.get(name), str) for name in ("apiVersion", "kind")):
        yield "apiVersion, kind: both are required, as text"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except ValidationError as error:
        yield f"{prefix}{_path(error.absolute_path)}: {error.message}"
        return
    except kubernetes_validate.SchemaNotFoundError as error:
        yield f"{prefix}kind: {error.message}"
        return
    if document["kind"] == "Job":
        yield from (f"{prefix}{fault}" for fault in _job(document["spec"]))


def _path(parts: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".") or "document"


def _job(spec: Manifest) -> Iterator[str]:
    pod = spec["template"]["spec"]
    if spec.get("completionMode") == "Indexed" and spec.get("completions") is None:
        yield "spec.completions: an Indexed Job needs it"
    if spec.get("podFailurePolicy") is None:
        return
    if pod.get("restartPolicy") != "Never":
        yield f"spec.template.spec.restartPolicy: {pod.get('restartPolicy')!r}: a podFailurePolicy needs 'Never'"
    containers = {container["name"] for container in pod["containers"]}
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        name = (rule.get("onExitCodes") or {}).get("containerName")
        if name is not None and name not in containers:
            yield f"spec.podFailurePolicy.rules[{index}].onExitCodes.containerName: no container {name!r}"


def _jobset(document: Manifest) -> Iterator[str]:
    from jsonschema import Draft202012Validator

    faults = [
        f"{_path(error.absolute_path)}: {error.message}" for error in Draft202012Validator(JOBSET).iter_errors(document)
    ]
    if faults:
        yield from faults
        return
    name, spec = document["metadata"]["name"], document["spec"]
    jobs = {job["name"]: job for job in spec["replicatedJobs"]}
    if len(jobs) != len(spec["replicatedJobs"]):
        yield "spec.replicatedJobs: two have the same name"
    for index, job in enumerate(spec["replicatedJobs"]):
        template = copy.deepcopy(job["template"])
        template["spec"].setdefault("completionMode", "Indexed")  # as the webhook does
        as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **template}
        yield from _core(as_job, f"spec.replicatedJobs[{index}].template.")
        longest = f"{name}-{job['name']}-{job.get('replicas', 1) - 1}-{job['template']['spec'].get('completions', 1)}"
        if len(longest) + len(POD_SUFFIX) > NAME_LENGTH:
            yield f"metadata.name: {longest}{POD_SUFFIX}, the name of a pod, has more than {NAME_LENGTH} letters"
    yield from _policies(spec, jobs)


def _policies(spec: Manifest, jobs: Mapping[str, Manifest]) -> Iterator[str]:
    rules = spec.get("failurePolicy", {}).get("rules", [])
    names = [rule["name"] for rule in rules]
    for index, rule in enumerate(rules):
        at = f"spec.failurePolicy.rules[{index}]"
        if not _RULE_NAME.fullmatch(rule["name"]):
            yield f"{at}.name: {rule['name']!r} does not match {_RULE_NAME.pattern}"
        if names.index(rule["name"]) != index:
            yield f"{at}.name: {rule['name']!r} is another rule's name too"
        for reason in rule.get("onJobFailureReasons", []):
            if reason not in _REASONS:
                yield f"{at}.onJobFailureReasons: {reason!r} is not among {', '.join(sorted(_REASONS))}"
    targets = [(f"spec.failurePolicy.rules[{i}]", rule.get("targetReplicatedJobs", [])) for i, rule in enumerate(rules)]
    targets.append(("spec.successPolicy", spec.get("successPolicy", {}).get("targetReplicatedJobs", [])))
    if coordinator := spec.get("coordinator"):
        targets.append(("spec.coordinator", [coordinator["replicatedJob"]]))
    for at, expected in targets:
        for target in expected:
            if target not in jobs:
                yield f"{at}: there is no replicatedJob {target!r}"


def _contract(document: Manifest, documents: Sequence[Manifest]) -> Iterator[str]:
    """The variables of the pods, against what the pods are."""
    if document["kind"] == "JobSet":
        name, spec = document["metadata"]["name"], document["spec"]
        network = spec.get("network", {})
        jobs = spec["replicatedJobs"]
        pods = sum(job.get("replicas", 1) * job["template"]["spec"].get("completions", 1) for job in jobs)
        first = f"{name}-{jobs[0]['name']}-0-0.{network.get('subdomain', name)}"
        for index, job in enumerate(jobs):
            at = f"spec.replicatedJobs[{index}].template.spec"
            yield from _pods(job["template"]["spec"], at, pods, first)
    elif document["kind"] == "Job" and document["spec"].get("completionMode") == "Indexed":
        subdomain = document["spec"]["template"]["spec"].get("subdomain")
        name = document["metadata"]["name"]
        yield from _pods(document["spec"], "spec", document["spec"]["completions"], f"{name}-0.{subdomain}")
        yield from _service(name, subdomain, documents)


def _service(job: str, subdomain: str | None, documents: Sequence[Manifest]) -> Iterator[str]:
    services = {one["metadata"]["name"]: one["spec"] for one in documents if one.get("kind") == "Service"}
    service = services.get(subdomain or "")
    if service is None:
        yield f"spec.template.spec.subdomain: {subdomain!r}: there is no Service of this name"
        return
    if service.get("clusterIP") != "None":
        yield f"Service/{subdomain}: spec.clusterIP: expected None (headless), or pods have no names of their own"
    if service.get("selector") != {"batch.kubernetes.io/job-name": job}:
        yield f"Service/{subdomain}: spec.selector: does not select the pods of {job}"


def _pods(spec: Manifest, at: str, pods: int, first: str) -> Iterator[str]:
    if spec.get("parallelism", 1) != spec.get("completions", 1):
        yield f"{at}.parallelism: {spec.get('parallelism')}: all {spec.get('completions')} pods must run at once"
    pod, at = spec["template"]["spec"], f"{at}.template.spec"
    env = {one["name"]: one.get("value") for one in pod["containers"][0].get("env", [])}
    if (count := env.get(contract.PROCESS_COUNT)) is not None and count != str(pods):
        yield f"{at}: {contract.PROCESS_COUNT}={count}, but there are {pods} pods"
    address = env.get(contract.COORDINATOR_ADDRESS)
    if address is not None and address.partition(":")[0] != first:
        yield f"{at}: {contract.COORDINATOR_ADDRESS}={address}: the first pod is {first}"
    grace_s = float(env.get(contract.GRACE_PERIOD_S) or 0) + contract.LEAVING_S
    if (given_s := pod.get("terminationGracePeriodSeconds", 30)) < grace_s:
        yield f"{at}.terminationGracePeriodSeconds: {given_s}: a last save and leaving may take {grace_s:g} s"
    yield from _volumes(pod, at)
    limits = (pod["containers"][0].get("resources") or {}).get("limits") or {}
    for label, resource in (("gke-tpu-accelerator", "google.com/tpu"), ("gke-accelerator", "nvidia.com/gpu")):
        if f"cloud.google.com/{label}" in (pod.get("nodeSelector") or {}) and resource not in limits:
            yield f"{at}.containers[0].resources.limits: no {resource}, though the node pool has them"


def _volumes(pod: Manifest, at: str) -> Iterator[str]:
    """What is written to a volume in memory counts as the container's memory."""
    limit = ((pod["containers"][0].get("resources") or {}).get("limits") or {}).get("memory")
    for index, volume in enumerate(pod.get("volumes") or []):
        if (volume.get("emptyDir") or {}).get("medium") == "Memory":
            size = volume["emptyDir"].get("sizeLimit")
            here = f"{at}.volumes[{index}].emptyDir.sizeLimit"
            if size is None:
                yield f"{here}: a volume in memory needs one, or it takes all of the container's memory"
            elif (most := _bytes(limit)) is not None and (_bytes(size) or 0) >= most:
                yield f"{here}: {size} in memory, and the container's limit is {limit}, which is to hold both"


def _bytes(quantity: object) -> int | None:
    """Of a whole number of bytes as Kubernetes writes it; None for anything else."""
    found = re.fullmatch(r"([0-9]+)(|[KMGT]i|[kMGT])", str(quantity))
    if not found:
        return None
    power = " kMGT".index(found[2][0].replace("K", "k")) if found[2] else 0
    return int(found[1]) * int((1024 if found[2].endswith("i") else 1000) ** power)
