"""GKE manifests: ours are valid offline and say what a pod needs; broken ones are rejected by name."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import contract
from launch import health as probe
from launch.command import LaunchError
from launch.contract import JobContract
from launch.engines import gke, manifest_check, manifests
from launch.engines.manifests import Manifest, PodJob, Pool
from tests.support.places import METACHARACTERS, NASTY, reports
from tests.support.processes import free_port

REPOSITORY = Path(__file__).parents[2]
TPU, TPU_HOSTS = manifests.tpu_pool("tpu-v5-lite-podslice", "4x4", 4)
GPU = manifests.gpu_pool("nvidia-h100-80gb", 8)


def job(pool: Pool, **change: Any) -> PodJob:
    return PodJob(
        **{"name": "run7", "image": "img:1", "program": ["python", "t.py"], "pool": pool, "hosts": 4, **change}
    )


def pod_of(documents: list[Manifest]) -> Manifest:
    spec = documents[-1]["spec"]
    job = spec["replicatedJobs"][0]["template"] if documents[-1]["kind"] == "JobSet" else documents[-1]
    pod: Manifest = job["spec"]["template"]["spec"]
    return pod


def expanded(text: str, environ: dict[str, str]) -> str:
    """A word of a command, or a variable's value, as the kubelet expands it (third_party/forked/golang/expansion): `$$`
    is a dollar, `$(NAME)` the value of a variable that there is."""

    def one(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environ.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^()]*)\)", one, text)


@pytest.mark.parametrize("write", [manifests.jobset, manifests.indexed_job])
def test_the_program_and_its_variables_reach_the_pod_word_for_word(write: Callable[[PodJob], list[Manifest]]) -> None:
    words = ["python", *METACHARACTERS]
    documents = write(job(Pool("cpu", 2), program=words, environ={"HOME": "x", "NAME": NASTY}))
    assert manifest_check.problems(documents) == []
    container = pod_of(list(yaml.safe_load_all(gke.to_yaml(documents))))["containers"][0]
    environ = {"HOME": "/root"}
    assert [expanded(word, environ) for word in container["command"]] == words
    assert [expanded(one["value"], environ) for one in container["env"] if one["name"] == "NAME"] == [NASTY]


def environ_of(documents: list[Manifest], **fields: str) -> dict[str, str]:
    """A pod's variables as a kubelet would fill them in; `fields`: what is read from the pod itself."""
    found = {}
    for one in pod_of(documents)["containers"][0]["env"]:
        path = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        found[one["name"]] = one.get("value") or next((v for name, v in fields.items() if name in path), "pod")
    return found


@pytest.mark.parametrize(
    "documents",
    [
        manifests.jobset(job(TPU)),
        manifests.jobset(job(TPU, slices=2, spot=True, scratch_gib=375)),
        manifests.jobset(
            job(GPU, slices=3, service_account="ksa", google_service_account="a@p.iam.gserviceaccount.com")
        ),
        manifests.jobset(job(Pool("cpu", 2))),
        manifests.indexed_job(job(TPU)),
        manifests.indexed_job(job(GPU, environ={"A": "b: {c}"})),
        manifests.indexed_job(job(Pool("cpu", 2), hosts=1)),
        manifests.jobset(job(TPU, slices=2, tier_gib=64)),
        manifests.jobset(job(GPU, tier_gib=64, tier_volume="pod")),
        manifests.indexed_job(job(GPU, tier_gib=64)),
    ],
    ids=["tpu", "tpu-slices", "gpu-slices", "cpu", "tpu-job", "gpu-job", "cpu-job", "tier", "pod-tier", "job-tier"],
)
def test_what_we_write_has_nothing_wrong(documents: list[Manifest], tmp_path: Path) -> None:
    assert manifest_check.problems(documents) == []
    gke.write_base(documents, tmp_path / "base")
    found = gke.read(tmp_path / "base")
    assert sorted(found, key=str) == sorted(documents, key=str), "YAML brings back the very data"
    kustomization = yaml.safe_load((tmp_path / "base" / "kustomization.yaml").read_text())
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in (tmp_path / "base").iterdir()}


def test_a_pod_gets_its_place_in_full() -> None:
    documents = manifests.jobset(job(GPU, slices=3, environ={contract.RUN_ROOT: "gs://b/r"}))
    pod = environ_of(documents, **{"job-index": "2", "restart-attempt": "5"}) | {contract.COMPLETION_INDEX: "1"}
    assert contract.from_environment(pod) == JobContract(
        coordinator_address="run7-workers-0-0.run7:8476",
        process_count=12,
        process_index=9,
        local_devices=None,
        restart_count=5,
        host_name="pod",
        grace_period_s=120.0,
        run_root="gs://b/r",
    )
    alone = environ_of(manifests.indexed_job(job(Pool("cpu", 2)))) | {contract.COMPLETION_INDEX: "3"}
    told = contract.from_environment(alone)
    assert isinstance(told, JobContract)
    assert (told.coordinator_address, told.process_index, told.local_devices) == ("run7-0.run7:8476", 3, 2)


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_pods_with_these_variables_are_one_job_for_jax(kind: str) -> None:
    simulated = job(Pool("cpu", 2), hosts=1 if kind == "jobset" else 2, slices=2 if kind == "jobset" else 1)
    documents = manifests.jobset(simulated) if kind == "jobset" else manifests.indexed_job(simulated)
    address = {contract.COORDINATOR_ADDRESS: f"127.0.0.1:{free_port()}"}  # what DNS would lead to
    pods = []
    for index in range(2):
        slice_, place = (index, 0) if kind == "jobset" else (0, index)
        told = environ_of(documents, **{"job-index": str(slice_), "restart-attempt": "1"})
        del told["TMPDIR"]
        pods.append({**told, **address, contract.COMPLETION_INDEX: str(place)})
    found = [(one["index"], one["count"], one["devices"], one["restarts"]) for one in reports(*pods)]
    restarts = "1" if kind == "jobset" else "0"
    assert found == [(0, 2, 4, restarts), (1, 2, 4, restarts)]


@pytest.mark.parametrize(
    ("memory", "limit"), [("16Gi", "80Gi"), ("1536Mi", "67072Mi"), ("2Ti", "2112Gi"), ("1024Mi", "65Gi")]
)
def test_the_memory_of_a_tier_is_counted_in_the_containers(memory: str, limit: str) -> None:
    for volume in ("node", "pod"):
        pod = pod_of(manifests.jobset(job(GPU, memory=memory, tier_gib=64, tier_volume=volume)))
        resources = pod["containers"][0]["resources"]
        assert (resources["limits"]["memory"], resources["requests"]["memory"]) == (limit, limit)
    assert pod_of(manifests.jobset(job(GPU, memory=memory)))["containers"][0]["resources"]["limits"]["memory"] == memory
    with pytest.raises(LaunchError, match=r"--memory=1\.5G: with --tier_gib expected whole Mi, Gi or Ti"):
        manifests.jobset(job(GPU, memory="1.5G", tier_gib=64))


def test_a_pods_tier_is_its_nodes_or_its_own_and_no_manifest_has_a_secret() -> None:
    documents = manifests.jobset(job(GPU, slices=2, tier_gib=64))
    pod = pod_of(documents)
    by_name = {one["name"]: one for one in pod["containers"][0]["env"]}
    told = {
        name: one["valueFrom"]["fieldRef"]["fieldPath"]
        for name, one in by_name.items()
        if "valueFrom" in one and "fieldRef" in one["valueFrom"]
    }
    values = {name: {"spec.nodeName": "n17"}.get(path, "1") for name, path in told.items()}
    assert expanded(by_name[contract.DOMAIN]["value"], values) == "slice=1,node=n17"
    order = [one["name"] for one in pod["containers"][0]["env"]]
    assert max(order.index("SLICE_INDEX"), order.index("NODE_NAME")) < order.index(contract.DOMAIN), (
        "as Kubernetes asks"
    )
    secret = {"name": "run7-tier", "key": "secret", "optional": True}
    assert by_name[contract.TIER_SECRET]["valueFrom"] == {"secretKeyRef": secret}
    assert {"name": "tier", "mountPath": by_name[contract.TIER_DIR]["value"]} in pod["containers"][0]["volumeMounts"]
    path = {"path": "/dev/shm/orchestrator-default-run7", "type": "DirectoryOrCreate"}
    assert pod["volumes"][1] == {"name": "tier", "hostPath": path}
    assert [one["command"] for one in pod["initContainers"]] == [["chown", "10001:10001", "/tier"]]
    own = pod_of(manifests.jobset(job(GPU, tier_gib=64, tier_volume="pod")))
    assert own["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"} and "initContainers" not in own
    alone = environ_of(manifests.indexed_job(job(GPU, tier_gib=64)))
    assert alone[contract.DOMAIN] == "node=$(NODE_NAME)", "an Indexed Job is one slice"
    without = pod_of(manifests.jobset(job(GPU)))
    assert len(without["volumes"]) == 1 and contract.TIER_DIR not in environ_of(manifests.jobset(job(GPU)))


def test_on_tpu_pools_the_addresses_are_left_to_gke() -> None:
    pod = environ_of(manifests.jobset(job(TPU, slices=2)))
    assert contract.PROCESS_COUNT not in pod and contract.COORDINATOR_ADDRESS not in pod
    assert pod_of(manifests.jobset(job(TPU)))["containers"][0]["resources"]["limits"]["google.com/tpu"] == "4"
    assert TPU_HOSTS == 4


def test_a_preemption_is_free_and_what_a_restart_cannot_fix_is_final() -> None:
    jobset = manifests.jobset(job(GPU))[-1]["spec"]
    rules = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule.get("onExitCodes", {}).get("values") for rule in rules] == [[2, 4, 5, 6], None, [75]]
    final, free = jobset["failurePolicy"]["rules"]
    assert (final["action"], free["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert final["onJobFailureMessagePatterns"] == ["failed with exit code (2|4|5|6) "]
    (service, run) = manifests.indexed_job(job(GPU, max_restarts=2))
    assert [rule["action"] for rule in run["spec"]["podFailurePolicy"]["rules"]] == ["FailJob", "Ignore", "Ignore"]
    assert run["spec"]["backoffLimit"] == 8, "each of four pods counts by itself"
    assert service["spec"]["clusterIP"] == "None"


TIER = manifests.jobset(job(GPU, tier_gib=64, tier_volume="pod"))
JOBSET, INDEXED = manifests.jobset(job(GPU, slices=2)), manifests.indexed_job(job(GPU))


def jobset_spec(documents: list[Manifest]) -> Manifest:
    spec: Manifest = documents[-1]["spec"]
    return spec


def template(documents: list[Manifest]) -> Manifest:
    spec: Manifest = jobset_spec(documents)["replicatedJobs"][0]["template"]["spec"]
    return spec


def variable(documents: list[Manifest], name: str, value: str) -> None:
    next(one for one in pod_of(documents)["containers"][0]["env"] if one["name"] == name)["value"] = value


def rename(mapping: Manifest, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


BROKEN: dict[str, tuple[list[Manifest], Callable[[list[Manifest]], object], str]] = {
    "misspelt field of the JobSet": (
        JOBSET,
        lambda d: rename(jobset_spec(d), "failurePolicy", "failurePolicies"),
        "JobSet/run7: spec: Additional properties are not allowed ('failurePolicies' was unexpected)",
    ),
    "wrong version": (
        JOBSET,
        lambda d: d[-1].update(apiVersion="jobset.x-k8s.io/v1"),
        "JobSet/run7: apiVersion: 'jobset.x-k8s.io/v1alpha2' was expected",
    ),
    "unknown action": (
        JOBSET,
        lambda d: jobset_spec(d)["failurePolicy"]["rules"][1].update(action="RestartPods"),
        "JobSet/run7: spec.failurePolicy.rules[1].action: 'RestartPods' is not one of",
    ),
    "unknown reason": (
        JOBSET,
        lambda d: jobset_spec(d)["failurePolicy"]["rules"][1].update(onJobFailureReasons=["Preempted"]),
        "JobSet/run7: spec.failurePolicy.rules[1].onJobFailureReasons: 'Preempted' is not among",
    ),
    "rules of one name": (
        JOBSET,
        lambda d: jobset_spec(d)["failurePolicy"]["rules"][1].update(name="hopeless"),
        "JobSet/run7: spec.failurePolicy.rules[1].name: 'hopeless' is another rule's name too",
    ),
    "rule for a job that is not there": (
        JOBSET,
        lambda d: jobset_spec(d)["failurePolicy"]["rules"][0].update(targetReplicatedJobs=["leader"]),
        "JobSet/run7: spec.failurePolicy.rules[0]: there is no replicatedJob 'leader'",
    ),
    "pod names too long": (
        JOBSET,
        lambda d: d[-1]["metadata"].update(name="r" * 50),
        "-abcde, the name of a pod, has more than 63 letters",
    ),
    "negative replicas": (
        JOBSET,
        lambda d: jobset_spec(d)["replicatedJobs"][0].update(replicas=-1),
        "JobSet/run7: spec.replicatedJobs[0].replicas: -1 is less than the minimum of 0",
    ),
    "wrong type inside a Job of the JobSet": (
        JOBSET,
        lambda d: template(d).update(completions="four"),
        "JobSet/run7: spec.replicatedJobs[0].template.spec.completions: 'four' is not",
    ),
    "misspelt field of a container": (
        JOBSET,
        lambda d: rename(pod_of(d)["containers"][0], "resources", "resource"),
        "template.spec.template.spec.containers[0]: Additional properties are not allowed ('resource' was unexpected)",
    ),
    "containers that restart under a failure policy": (
        JOBSET,
        lambda d: pod_of(d).update(restartPolicy="OnFailure"),
        "spec.template.spec.restartPolicy: 'OnFailure': a podFailurePolicy needs 'Never'",
    ),
    "failure policy for another container": (
        INDEXED,
        lambda d: pod_of(d)["containers"][0].update(name="main"),
        "Job/run7: spec.podFailurePolicy.rules[0].onExitCodes.containerName: no container 'job'",
    ),
    "no time for a last save": (
        JOBSET,
        lambda d: pod_of(d).update(terminationGracePeriodSeconds=30),
        "spec.terminationGracePeriodSeconds: 30: a last save and leaving may take 150 s",
    ),
    "coordinator that no pod is": (
        JOBSET,
        lambda d: variable(d, contract.COORDINATOR_ADDRESS, "run7-0.run7:8476"),
        "ORCHESTRATOR_COORDINATOR_ADDRESS=run7-0.run7:8476: the first pod is run7-workers-0-0.run7",
    ),
    "more processes than pods": (
        JOBSET,
        lambda d: variable(d, contract.PROCESS_COUNT, "9"),
        "ORCHESTRATOR_PROCESS_COUNT=9, but there are 8 pods",
    ),
    "pods that wait for each other": (
        JOBSET,
        lambda d: template(d).update(parallelism=2),
        "template.spec.parallelism: 2: all 4 pods must run at once",
    ),
    "pool without its devices": (
        JOBSET,
        lambda d: pod_of(d)["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu"),
        "containers[0].resources.limits: no nvidia.com/gpu, though the node pool has them",
    ),
    "service that is not headless": (
        INDEXED,
        lambda d: d[0]["spec"].pop("clusterIP"),
        "Job/run7: Service/run7: spec.clusterIP: expected None (headless)",
    ),
    "service of another job": (
        INDEXED,
        lambda d: d[0]["spec"].update(selector={"batch.kubernetes.io/job-name": "run8"}),
        "Job/run7: Service/run7: spec.selector: does not select the pods of run7",
    ),
    "service left out": (
        INDEXED,
        lambda d: d.pop(0),
        "Job/run7: spec.template.spec.subdomain: 'run7': there is no Service of this name",
    ),
    "tier without a limit": (
        TIER,
        lambda d: pod_of(d)["volumes"][1]["emptyDir"].pop("sizeLimit"),
        "volumes[1].emptyDir.sizeLimit: a volume in memory needs one",
    ),
    "tier larger than its container": (
        TIER,
        lambda d: pod_of(d)["containers"][0]["resources"]["limits"].update(memory="60G"),
        "volumes[1].emptyDir.sizeLimit: 64Gi in memory, and the container's limit is 60G",
    ),
    "no kind": (INDEXED, lambda d: d[0].pop("kind"), "?/run7: apiVersion, kind: both are required"),
    "unknown kind": (INDEXED, lambda d: d[0].update(kind="Servise"), "Servise/run7: kind: Couldn't find schema"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_is_rejected_by_name(name: str) -> None:
    good, damage, message = BROKEN[name]
    assert manifest_check.problems(good) == []
    bad = copy.deepcopy(good)
    damage(bad)
    problems = manifest_check.problems(bad)
    assert any(message in problem for problem in problems), problems


def test_the_guide_counts_them_rightly() -> None:
    assert f"The suite rejects {len(BROKEN)} broken manifests" in (REPOSITORY / "docs" / "gke.md").read_text()


def launch_gke(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "gke", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_the_check_reads_files_and_ends_with_1_if_something_is_wrong(tmp_path: Path) -> None:
    pool = ["--gpu_type", "nvidia-l4", "--hosts", "2"]
    written = launch_gke("--name=a", "--image=i", *pool, "--kind=job", f"--output={tmp_path}", "--", "python", "t.py")
    assert written.returncode == 0, written.stderr
    assert launch_gke("--check", str(tmp_path)).stdout == "2 manifests, nothing wrong\n"
    text = (tmp_path / "job.yaml").read_text()
    (tmp_path / "job.yaml").write_text(text.replace("completions: 2", "completions: 3"))
    found = launch_gke("--check", str(tmp_path))
    assert found.returncode == 1 and "ORCHESTRATOR_PROCESS_COUNT=2, but there are 3 pods" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=a"], "no command to run"),
        (["--image=i", "--", "x"], "--name is required"),
        (["--name=a", "--image=i", "--", "x"], "choose from --tpu_type, --gpu_type, --devices_per_process"),
        (["--name=a", "--image=i", "--tpu_type=t", "--", "x"], "--tpu_type needs --tpu_topology"),
        (
            ["--name=a", "--image=i", "--tpu_type=t", "--tpu_topology=4*4", "--", "x"],
            "--tpu_topology=4*4: expected chips",
        ),
        (["--name=a", "--image=i", "--gpu_type=t", "--", "x"], "--hosts is required"),
        (["--name=A_b", "--image=i", "--gpu_type=t", "--hosts=1", "--", "x"], "--name=A_b: expected at most 40"),
        (
            ["--name=a", "--image=i", "--gpu_type=t", "--hosts=1", "--env=1=2", "--", "x"],
            "--env=1=2: expected NAME=VALUE",
        ),
        (["--check=/nowhere"], "--check=/nowhere: No such file or directory"),
        (["--check=README.md"], "--check=README.md: "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    done = launch_gke(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_health_is_judged_by_heartbeat_and_pulse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beat, pulse = tmp_path / "beat", tmp_path / "beat.pulse"

    def health(*flags: str) -> int:
        monkeypatch.setenv(contract.HEARTBEAT_FILE, str(beat))
        monkeypatch.setattr(sys, "argv", ["health", *flags])
        return probe.main()

    def aged(path: Path, seconds: float, **said: object) -> None:
        path.write_text(json.dumps(said))
        os.utime(path, (0, time.time() - seconds))

    assert (health(), health("--started")) == (0, 1), "starting"
    beat.touch()
    assert (health(), health("--started"), health("--max_age_s=0")) == (0, 0, 1)
    for idle_s, pulse_age_s, said, code in (
        (899, None, {}, 0),
        (901, None, {}, 1),
        (901, 901, {"steps": 9, "barrier": ""}, 1),
        (901, 2, {"steps": 9, "barrier": ""}, 0),  # it may wait for a frozen one, which its own probe ends first
        (1351, 2, {"steps": 9, "barrier": "b"}, 1),
        (3500, 2, {"steps": 0, "barrier": ""}, 0),  # it compiles
        (3601, 2, {"steps": 0, "barrier": ""}, 1),
        (901, 2, {"steps": "no number", "barrier": 7}, 0),
    ):
        aged(beat, idle_s)
        pulse.unlink(missing_ok=True)
        if pulse_age_s is not None:
            aged(pulse, pulse_age_s, **said)
        assert health() == code, (idle_s, pulse_age_s, said)
    assert "last pulse 2 s ago" in capsys.readouterr().out
    pulse.write_text("half a li")
    aged(beat, 901)
    assert health() == 1, "no pulse that can be read is none"
    beat = beat / "below a file"
    assert (health(), health("--started")) == (0, 1), "not known to be hung"
