"""A Kubernetes API server in memory: kmock's, with what kubectl needs beyond it."""

import asyncio
import base64
import json
import threading
from typing import Any

import kmock
from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from kubernetes_manifests import schema_problems

KINDS = {
    "v1/pods": "Pod",
    "v1/secrets": "Secret",
    "v1/configmaps": "ConfigMap",
    "v1/serviceaccounts": "ServiceAccount",
    "policy/v1/poddisruptionbudgets": "PodDisruptionBudget",
    "networking.k8s.io/v1/networkpolicies": "NetworkPolicy",
    "ray.io/v1/rayjobs": "RayJob",
    "ray.io/v1/rayclusters": "RayCluster",
}
VERBS = {"create", "delete", "get", "list", "patch", "update", "watch"}
PROTOBUF = "application/vnd.kubernetes.protobuf"


class ApiServer:
    """The server, in a thread of its own, at ``url``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._api = _Api()
        self._server = kmock.Server(self._api)
        self._wait(self._api.__aenter__())
        self._wait(self._server.__aenter__())
        self.url = str(self._server.url)

    def objects(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What is there now, by kind and name."""
        there = [dict(each.raw) for each in self._api.objects.values() if not each.deleted]
        return {(each["kind"], each["metadata"]["name"]): each for each in there}

    def stop(self) -> None:
        """End the server."""
        self._wait(self._server.__aexit__(None, None, None))
        self._wait(self._api.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait(self, step: Any) -> None:
        asyncio.run_coroutine_threadsafe(step, self._loop).result(30)


class _RefusedError(kmock.KubernetesError):
    def __init__(self, found: list[str]) -> None:
        super().__init__(status=422, reason="Invalid", message="; ".join(found), details={})


class _Api(kmock.KubernetesEmulator):
    """Refuses what the schemas do, reads kubectl's protobuf, and says what kmock leaves out."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        for path, kind in KINDS.items():
            self.resources[path] = {"kind": kind, "singular": kind.lower(), "namespaced": True, "verbs": VERBS}
        core = {path.removeprefix("v1/"): kind for path, kind in KINDS.items() if path.startswith("v1/")}
        self["get /api/v1"] << {  # in kmock's own the version is wrong
            "kind": "APIResourceList",
            "groupVersion": "v1",
            "resources": [
                {"name": name, "singularName": kind.lower(), "kind": kind, "namespaced": True, "verbs": [*VERBS]}
                for name, kind in core.items()
            ],
        }
        # kubectl leaves the checking of fields to a server that says that it does it
        paths = {"api/v1" if path.startswith("v1/") else f"apis/{path.rpartition('/')[0]}" for path in KINDS}
        self["get /openapi/v3"] << {"paths": {path: {"serverRelativeURL": "/openapi/v3/all"} for path in paths}}
        self["get /openapi/v3/all"] << {"openapi": "3.0.0", "info": {}, "paths": dict(map(_checked, KINDS.items()))}

    async def __call__(self, raw_request: web.BaseRequest) -> web.StreamResponse:
        if raw_request.content_type == PROTOBUF:
            raw_request = raw_request.clone(headers={**raw_request.headers, "Content-Type": "application/json"})
            raw_request._read_bytes = json.dumps(_from_protobuf(await raw_request.read())).encode()
        if raw_request.path == "/api/v1/namespaces":  # which kmock can't hold
            return web.json_response(await raw_request.json(), status=201)
        return await super().__call__(raw_request)

    async def _handle(self, request: kmock.Request) -> web.StreamResponse:
        if request.action == kmock.action.CREATE and (found := schema_problems(request.data)):
            raise _RefusedError(found)
        return await super()._handle(request)

    async def _serve_list(self, request: kmock.Request) -> Any:
        return {"apiVersion": "v1", "kind": "List", **await super()._serve_list(request)}


def _checked(item: tuple[str, str]) -> tuple[str, dict[str, Any]]:
    """A path of the OpenAPI document, by which kubectl sees that the server checks the fields of a kind."""
    group, version = f"/{item[0]}".split("/")[-3:-1]
    kind = {"group": group.lstrip("/"), "version": version, "kind": item[1]}
    operation = {"parameters": [{"name": "fieldValidation", "in": "query"}], "responses": {}}
    return f"/{item[0]}", {"patch": {**operation, "x-kubernetes-group-version-kind": kind}}


def _from_protobuf(body: bytes) -> dict[str, Any]:
    """The Namespace or Secret that kubectl encoded: kind, name and data."""
    envelope = _fields(body.removeprefix(b"k8s\0"))
    version, kind = (_fields(envelope[1][0])[number][0].decode() for number in (1, 2))
    parts = _fields(envelope[2][0])
    metadata = _fields(parts[1][0])
    result = {"apiVersion": version, "kind": kind, "metadata": {"name": metadata[1][0].decode()}}
    if kind == "Secret":
        entries = [_fields(entry) for entry in parts.get(2, [])]
        result["data"] = {entry[1][0].decode(): base64.b64encode(entry[2][0]).decode() for entry in entries}
    return result


def _fields(message: bytes) -> dict[int, list[Any]]:
    """A protobuf message's fields by number."""
    fields: dict[int, list[Any]] = {}
    for field in UnknownFieldSet(Empty.FromString(message)):
        fields.setdefault(field.field_number, []).append(field.data)
    return fields
