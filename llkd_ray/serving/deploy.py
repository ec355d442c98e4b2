"""Put a classifier on Ray Serve and take it down again."""

import contextlib
import functools
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ray
import ray.exceptions
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from llkd_ray.cluster import BRIEF_SPIN
from llkd_ray.config import ServeSection
from llkd_ray.errors import ClusterError, EndpointError
from llkd_ray.serving.access import Observer, print_line, token_digest
from llkd_ray.serving.application import application
from llkd_ray.serving.ingress import require_haproxy
from llkd_ray.serving.metrics import RequestMetrics, observe_call
from llkd_ray.serving.protocol import Classifier, ModelCard, model_card
from llkd_ray.serving.student import StudentClassifier, student_calibration, student_labels
from llkd_ray.serving.teacher import TeacherClassifier, TeacherModel
from llkd_ray.student.runtime import onnx_file
from llkd_ray.teacher.engine import engine_environment

_log = logging.getLogger(__name__)
APP = "llkd"
HTTP = "endpoint"
"""The deployment that answers HTTP, whatever model is behind it: under another name Serve would
delete the old one before the new one answers."""
PROXIES = "EveryNode"
"""Where Serve's proxies run."""
_POLL_S = 0.2
# Who has put the application there that runs now. Serve tells only when it was first deployed.
_OWNER = b"llkd_ray:endpoint_owner"
_SHUTDOWN_S = 30.0
# Over so many seconds the requests of a replica are averaged; Serve hears of them every ten.
_LOOK_BACK_S = 15.0
# For so long there must have been too few replicas before another one is started.
_UPSCALE_DELAY_S = 10.0


class Endpoint:
    """What runs in a replica: the web application and its model, in one process."""

    def __init__(
        self,
        open_model: Callable[..., Classifier],
        card: ModelCard,
        digest: bytes | None,
        access_log: bool,
        *asked: DeploymentHandle[Any],
    ) -> None:
        """Load the model; the replica takes no request before that.

        Args:
            open_model: Loads it.
            card: What it is.
            digest: SHA-256 of the bearer token.
            access_log: Print a line for each request.
            asked: Handles of deployments that the model asks, for `open_model`.
        """
        self._classifier = open_model(*asked)
        self._card = card
        self._digest = digest
        self._observers: list[Observer] = [RequestMetrics(card.labels)]
        if access_log:
            self._observers.append(print_line)

    def __serve_build_asgi_app__(self) -> Any:
        """Let Serve ask for the web application, after the constructor."""
        return application(self._card, self._classifier, self._digest, self._observers)

    def check_health(self) -> None:
        """Let Serve replace the replica when this raises."""
        self._classifier.check_health()

    async def __del__(self) -> None:
        # Serve awaits this when it stops a replica; a half-built one has no classifier.
        if hasattr(self, "_classifier"):
            await self._classifier.close()


def http_options(config: ServeSection, port: int) -> dict[str, Any]:
    """Return how Serve's proxies listen."""
    return {"host": config.host, "port": port, "request_timeout_s": config.deadline_s}


def student_app(
    folder: Path, name: str, max_length: int, config: ServeSection
) -> serve.Application:
    """Describe the student's endpoint.

    Args:
        folder: Of the exported student, plain or for ONNX Runtime, at the same path on every node
            that serves.
        name: What the endpoint calls itself.
        max_length: Tokens of a text that the student reads.
        config: The endpoint.

    Raises:
        StudentError: There is no student in the folder, or not in the form of `serve.backend`.
        ConfigError: The token's environment variable is empty.
    """
    labels = student_labels(folder)
    card = model_card("student", name, labels, config, student_calibration(folder))
    open_model = open_student(folder, max_length, config)
    return endpoint_app(open_model, card, config, student_environment(config))


def teacher_app(model: TeacherModel, name: str, config: ServeSection) -> serve.Application:
    """Describe the teacher's endpoint.

    Args:
        model: Task, engine and calibration.
        name: What the endpoint calls itself.
        config: The endpoint.

    Raises:
        ConfigError: The token's environment variable is empty.
    """
    card = model_card("teacher", name, model.task.label_names, config, model.kind)
    environment = engine_environment(model.teacher.engine, config.threads)
    return endpoint_app(functools.partial(TeacherClassifier, model), card, config, environment)


def open_student(
    folder: Path, max_length: int, config: ServeSection
) -> Callable[[], StudentClassifier]:
    """Return what loads the student in a replica; see `student_app`."""
    file = onnx_file(folder, config.backend)
    _log.info("the student is computed by %s", f"ONNX Runtime, {file.name}" if file else "torch")
    return functools.partial(StudentClassifier, folder, max_length, config, observe=observe_call)


def student_environment(config: ServeSection) -> dict[str, str]:
    """Return the environment variables of a student's replica."""
    # The tokenizer's own threads: they would be as many as the machine has cores.
    return {**BRIEF_SPIN, "RAYON_NUM_THREADS": str(config.threads)}


def endpoint_app(
    open_model: Callable[..., Classifier],
    card: ModelCard,
    config: ServeSection,
    environment: dict[str, str],
    *asked: serve.Application,
) -> serve.Application:
    """Describe the deployment that answers HTTP.

    Args:
        open_model: Loads the model in a replica, given the handles of `asked`.
        card: What it is, and its limits.
        config: The endpoint.
        environment: Variables of a replica.
        asked: Deployments that the model asks.

    Raises:
        ConfigError: The token's environment variable is empty.
    """
    replicas: int | None = None
    autoscaling: AutoscalingConfig | None = None
    match config.num_replicas:
        case int(replicas):
            pass
        case fewest, most:
            autoscaling = AutoscalingConfig(
                min_replicas=fewest,
                max_replicas=most,
                target_ongoing_requests=config.target_ongoing_requests,
                look_back_period_s=_LOOK_BACK_S,
                upscale_delay_s=_UPSCALE_DELAY_S,
                downscale_delay_s=config.downscale_delay_s,
            )
    deployment: serve.Deployment = serve.deployment(
        name=HTTP,
        num_replicas=replicas,
        autoscaling_config=autoscaling,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        # Serve's default of 5 would never fill a batch with small requests.
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        # A model that does not load once does not load; the default tries twenty times.
        max_constructor_retry_count=1,
        logging_config={"enable_access_log": False},  # Ours says more, and in JSON.
        # A replica that goes answers what it holds, as long as any request may take.
        graceful_shutdown_timeout_s=config.deadline_s,
        graceful_shutdown_wait_loop_s=_POLL_S,
    )(serve.ingress()(Endpoint))
    return deployment.bind(
        open_model, card, token_digest(config.token_env), config.access_log, *asked
    )


@contextlib.contextmanager
def running(
    app: serve.Application, config: ServeSection, *, free_port: bool = False
) -> Iterator[str]:
    """Serve an application for the length of the block; Ray must be connected.

    Where Serve runs on the cluster already, its proxy keeps its address, which `serve.host` and
    `serve.port` must name, and only the application is taken down at the end. One that is there
    is replaced, replica by replica and without a failed request; whoever deployed it leaves the
    new one alone when its own block ends.

    Args:
        app: From `student_app` or `teacher_app`.
        config: The endpoint.
        free_port: Take a free port where Serve is started, as `serve.port = 0` does.

    Yields:
        The base URL, after the endpoint has answered a health check.

    Raises:
        ClusterError: The port is taken, or is not that of the Serve that runs already; there is
            no HAProxy.
        EndpointError: The endpoint did not start; the sentence holds Serve's reason.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if config.ingress == "haproxy":
        require_haproxy()
    joins = bool(serve.status().proxies)
    if joins:
        _compare_with_running(config)
    port = config.port if joins else _bindable(config.host, 0 if free_port else config.port)
    url = f"http://{_reachable(config.host)}:{port}"
    replaces = APP in serve.status().applications
    me = uuid.uuid4().bytes
    try:
        if not joins:
            serve.start(proxy_location=PROXIES, http_options=http_options(config, port))
        # Not waiting here, so that waiting is ours: with a limit, and with the reason of a failure.
        serve.run_many(
            [serve.RunTarget(app, name=APP, route_prefix="/")], wait_for_applications_running=False
        )
        _wait_until_running(url, config.start_timeout_s)
        _internal_kv_put(_OWNER, me)
    except BaseException:
        # Replicas that were to be replaced and are not serve on.
        if not replaces:
            _take_down(joins=joins)
        raise
    try:
        yield url
    finally:
        _take_down(joins=joins, owner=me)


def _compare_with_running(config: ServeSection) -> None:
    """Look at how the Serve that runs already listens, which no application changes.

    Raises:
        ClusterError: At another port than `serve.port`.
    """
    there: Any = _get_global_client().http_config  # type: ignore[union-attr]  # It runs.
    if config.port != there.port:
        raise ClusterError(
            f"Serve runs on this cluster already, at port {there.port}: set serve.port={there.port}"
        )
    if config.deadline_s != there.request_timeout_s:
        _log.warning(
            "Serve runs on this cluster already, with a deadline of %s instead of "
            "serve.deadline_s = %g: `serve shutdown` ends it, if it is to start with yours",
            *(there.request_timeout_s or "none", config.deadline_s),
        )


def _wait_until_running(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    reason = "it is still starting"
    while time.monotonic() < deadline:
        state = serve.status().applications[APP]
        match state.status:
            case "RUNNING":
                reason = "its replicas run, but nothing answers there"
                with contextlib.suppress(httpx.TransportError):
                    # No proxy of the environment stands between us and our own endpoint.
                    if httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False).is_success:
                        return
            case "DEPLOY_FAILED" | "UNHEALTHY":
                raise EndpointError(f"the endpoint did not start: {_reason(state)}")
            case _:
                reason = _reason(state) or reason
        time.sleep(_POLL_S)
    raise EndpointError(
        f"the endpoint at {url} did not start within serve.start_timeout_s = {timeout_s:g}: "
        f"{reason}"
    )


def _take_down(*, joins: bool, owner: bytes | None = None) -> None:
    """Delete the application, and Serve if it is ours; nothing if it has another owner by now.

    The application goes first: its replicas answer what they hold, while shutting Serve down would
    end the proxies, which hold the clients' connections, at once.
    """
    with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
        if APP in serve.status().applications:
            if owner is not None and owner != _internal_kv_get(_OWNER):
                return
            serve.delete(APP)
    if not joins:
        _shut_serve_down()


def _shut_serve_down() -> None:
    """Stop Serve's actors, and return when they are gone.

    `serve.shutdown` (2.60) waits in a call to the very actor that it ends, and Ray then tells the
    user that this call has failed and will be tried again. So the actor is asked without waiting
    in it, and without other tries.
    """
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):  # It is gone.
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        shutdown = controller.graceful_shutdown.options(max_task_retries=0)
        ray.get(shutdown.remote(wait=False))
        deadline = time.monotonic() + _SHUTDOWN_S
        while time.monotonic() < deadline:
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            time.sleep(_POLL_S)
    serve.shutdown()  # type: ignore[no-untyped-call]  # Forgets the connection; Ray types nothing.


def _reason(state: Any) -> str:
    """Return Serve's message about the deployment, without the traceback above its last line."""
    messages = [item.message for item in state.deployments.values()] or [state.message]
    lines = [line.strip() for line in "\n".join(messages).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _bindable(host: str, port: int) -> int:
    """Return the port, a free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"cannot listen on serve.host = {host!r}, serve.port = {port}: "
                f"{error.strerror}; serve.port=0 takes a free port"
            ) from None
        return int(probe.getsockname()[1])


def _reachable(host: str) -> str:
    """Return the address at which this machine reaches a proxy that listens on the host."""
    match host:
        case "0.0.0.0":  # noqa: S104 - compared with, not bound to
            return "127.0.0.1"
        case "::":
            return "[::1]"
        case _:
            return f"[{host}]" if ":" in host else host
