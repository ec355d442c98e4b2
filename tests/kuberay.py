"""What KubeRay's objects may hold: the fields that ray-operator/apis/ray/v1 declares (1.7).

No package carries the definitions themselves; pods, in templates here, are Kubernetes' own.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PERCENT: Schema = {"type": "integer", "minimum": 1, "maximum": 100}
KUBERNETES: Schema = {"type": "object"}
"""Of Kubernetes' own types, checked elsewhere."""


def fields(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


AUTH = fields("mode secretName", mode=one_of("disabled", "token"), secretName=TEXT)
AUTOSCALER = fields(
    version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    resources=KUBERNETES,
    securityContext=KUBERNETES,
    volumeMounts={"type": "array"},
    env={"type": "array"},
)
HEAD = fields(
    "template rayStartParams",
    template=KUBERNETES,
    rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=FLAG,
)
WORKERS = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=KUBERNETES,
)
CLUSTER = fields(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    authOptions=AUTH,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = fields(
    "entrypoint",
    entrypoint=TEXT,
    clusterSelector=TEXTS,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    entrypointNumCpus={"type": "number", "minimum": 0},
    runtimeEnvYAML=TEXT,
)
SERVICE = fields(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    excludeHeadPodFromServeSvc=FLAG,
    upgradeStrategy=fields(
        "type",
        type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
        clusterUpgradeOptions=fields(
            "gatewayClassName stepSizePercent intervalSeconds",
            gatewayClassName=TEXT,
            maxSurgePercent=PERCENT,
            stepSizePercent=PERCENT,
            intervalSeconds=COUNT,
        ),
    ),
)
POD_MONITOR = fields(
    "selector podMetricsEndpoints",
    selector=KUBERNETES,
    podTargetLabels={"type": "array", "items": TEXT},
    podMetricsEndpoints={"type": "array", "items": fields("port", port=TEXT, interval=TEXT)},
)
"""Of Prometheus' operator, monitoring.coreos.com/v1."""

SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayService"): SERVICE,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
}
