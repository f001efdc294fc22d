"""Kubernetes without KEDA: the replicas of two Deployments, set through the scale subresource.

Where a ScaledObject or an HPA has the Deployment, the number is theirs and `scale` is refused. The
router answers KEDA then (`kvrelay_router.keda`), and this provider only describes.

What the service account must be allowed: get of deployments, get and update of deployments/scale,
list of pods, horizontalpodautoscalers and scaledobjects.keda.sh, in one namespace.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from kvrelay_infra.providers.base import Pool, PoolStatus, checked
from kvrelay_protocol.errors import (
    ProviderDenied,
    ProviderError,
    ProviderMissing,
    ProviderQuota,
    ProviderUnreachable,
    SecondWriter,
)

_TIMEOUT_S = (3.0, 10.0)
"""To connect, and between two pieces of an answer."""
_CONFLICTS = 5
"""Writes by others between our read and our write, before we believe in a second writer."""
_RETRIES = urllib3.Retry(total=3, backoff_factor=0.1, status=0, redirect=0)
_FORBIDDEN = (401, 403)
_MISSING, _CONFLICT = 404, 409
_REASON_CHARS = 200


class KubernetesProvider:
    """Two Deployments of one namespace. Owns the API client and closes it."""

    def __init__(
        self,
        api: client.ApiClient,
        *,
        namespace: str,
        deployments: Mapping[Pool, str],
    ) -> None:
        self._api = api
        self._apps = client.AppsV1Api(api)
        self._core = client.CoreV1Api(api)
        self._autoscaling = client.AutoscalingV2Api(api)
        self._custom = client.CustomObjectsApi(api)
        self._namespace = namespace
        self._deployments = dict(deployments)

    @classmethod
    def connect(cls, *, namespace: str, deployments: Mapping[Pool, str]) -> Self:
        """With the pod's service account, or with the current context of a kubeconfig.

        Raises:
            ProviderDenied: there is neither.
        """
        settings = client.Configuration()
        try:
            try:
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
            except ConfigException:
                config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except (ConfigException, OSError) as error:
            raise ProviderDenied(
                f"kubernetes: neither a service account nor a kubeconfig: {error}"
            ) from error
        settings.retries = _RETRIES
        return cls(client.ApiClient(settings), namespace=namespace, deployments=deployments)

    async def scale(self, pool: Pool, replicas: int) -> None:
        """See `Provider.scale`; others' writes in between are read again, not overwritten."""
        await asyncio.to_thread(self._scale, self._deployments[pool], checked(replicas))

    async def describe(self) -> Mapping[Pool, PoolStatus]:
        """See `Provider.describe`; `running` counts ready pods, `reason` is that of the others."""
        statuses = await asyncio.gather(
            *(asyncio.to_thread(self._status, name) for name in self._deployments.values())
        )
        return dict(zip(self._deployments, statuses, strict=True))

    async def close(self) -> None:
        """See `Provider.close`."""
        await asyncio.to_thread(self._api.close)

    def _scale(self, name: str, replicas: int) -> None:
        self._refuse_second_writer(name, replicas)
        for _ in range(_CONFLICTS):
            current = self._call(f"deployment {name}", self._apps.read_namespaced_deployment_scale,
                                 name, self._namespace)  # fmt: skip
            if (current.spec.replicas or 0) == replicas:
                return
            current.spec.replicas = replicas
            # It carries the resourceVersion that was read: a write in between is a conflict.
            try:
                self._call(f"deployment {name}", self._apps.replace_namespaced_deployment_scale,
                           name, self._namespace, current)  # fmt: skip
            except _Conflict:
                continue
            return
        raise SecondWriter(
            f"{self._where(name)}: not scaled to {replicas}, because something else wrote it "
            f"{_CONFLICTS} times meanwhile; only one may"
        )

    def _refuse_second_writer(self, name: str, replicas: int) -> None:
        for kind, owner, target in self._scalers():
            if target == name:
                raise SecondWriter(
                    f"{self._where(name)}: not scaled to {replicas}, because {kind} {owner} sets its "
                    f"replicas; delete that, or let KEDA ask the router and use no provider"
                )

    def _scalers(self) -> list[tuple[str, str, str]]:
        """(kind, name, Deployment) of everything in the namespace that sets replicas of one."""
        objects = self._call("scaledobjects", self._custom.list_namespaced_custom_object,
                             "keda.sh", "v1alpha1", self._namespace, "scaledobjects",
                             absent={"items": []})  # fmt: skip
        found = [
            ("ScaledObject", item["metadata"]["name"], item["spec"]["scaleTargetRef"]["name"])
            for item in objects["items"]
            if item["spec"]["scaleTargetRef"].get("kind", "Deployment") == "Deployment"
        ]
        hpas = self._call(
            "horizontalpodautoscalers",
            self._autoscaling.list_namespaced_horizontal_pod_autoscaler,
            self._namespace,
        )
        return found + [
            ("HorizontalPodAutoscaler", item.metadata.name, item.spec.scale_target_ref.name)
            for item in hpas.items
            if item.spec.scale_target_ref.kind == "Deployment"
        ]

    def _status(self, name: str) -> PoolStatus:
        deployment = self._call(f"deployment {name}", self._apps.read_namespaced_deployment,
                                name, self._namespace)  # fmt: skip
        # The API server fills in 1 where a manifest says nothing.
        wanted = 1 if deployment.spec.replicas is None else deployment.spec.replicas
        ready = deployment.status.ready_replicas or 0
        pending = max(wanted - ready, 0)
        reason = self._reason(deployment) if pending else ""
        return PoolStatus(desired=wanted, running=ready, pending=pending, reason=reason)

    def _reason(self, deployment: Any) -> str:
        """What keeps pods of a Deployment from being ready, each reason once."""
        labels = deployment.spec.selector.match_labels or {}
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        pods = self._call("pods", self._core.list_namespaced_pod, self._namespace,
                          label_selector=selector)  # fmt: skip
        found = Counter(
            reason
            for reason in (
                *map(_why_not_created, deployment.status.conditions or ()),
                *(_why_not_ready(pod) for pod in pods.items),
            )
            if reason
        )
        return "; ".join(
            f"{count} x {reason}" if count > 1 else reason for reason, count in found.items()
        )

    def _call(
        self, what: str, method: Callable[..., Any], *arguments: Any, absent: Any = None,
        **keywords: Any,
    ) -> Any:  # fmt: skip
        """The answer, or a `ProviderError`; `absent` is the answer where there is no such resource."""
        try:
            return method(*arguments, _request_timeout=_TIMEOUT_S, **keywords)
        except ApiException as error:
            if error.status == _MISSING and absent is not None:
                return absent
            if error.status == _CONFLICT:
                raise _Conflict from error
            raise self._explained(what, error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ProviderUnreachable(
                f"kubernetes at {self._api.configuration.host} does not answer: {_brief(error)}"
            ) from error

    def _explained(self, what: str, error: ApiException) -> ProviderError:
        where, said = self._where(what), _message(error)
        if error.status in _FORBIDDEN and "exceeded quota" in said:
            return ProviderQuota(f"{where}: {said}; raise the namespace's ResourceQuota")
        if error.status in _FORBIDDEN:
            return ProviderDenied(f"{where}: {said}; check the service account's role")
        if error.status == _MISSING:
            return ProviderMissing(f"{where} does not exist; is the chart installed there?")
        return ProviderUnreachable(f"{where}: the API server answered {error.status}: {said}")

    def _where(self, what: str) -> str:
        return f"kubernetes: {what} in namespace {self._namespace}"


class _Conflict(Exception):
    """Somebody wrote between our read and our write; never leaves this module."""


def _why_not_created(condition: Any) -> str:
    """Of a Deployment's condition: quota and admission refuse the pod before there is one."""
    failed = condition.type == "ReplicaFailure" and condition.status == "True"
    return _line(condition.reason, condition.message) if failed else ""


def _why_not_ready(pod: Any) -> str:
    """The first thing that keeps a pod waiting; empty for one that runs."""
    for condition in pod.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return _line(condition.reason, condition.message)
    containers = (pod.status.init_container_statuses or []) + (pod.status.container_statuses or [])
    for container in containers:
        waiting = container.state.waiting if container.state else None
        if waiting and waiting.reason:
            return _line(waiting.reason, waiting.message)
    return ""


def _line(reason: str | None, message: str | None) -> str:
    text = " ".join(f"{reason or ''}: {message or ''}".split()).strip(": ")
    return text if len(text) <= _REASON_CHARS else f"{text[:_REASON_CHARS]}…"


def _message(error: ApiException) -> str:
    """The `message` of the Status object in the body; else the HTTP reason."""
    try:
        return str(json.loads(error.body or "")["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _brief(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {cause}".split("\n", 1)[0]
