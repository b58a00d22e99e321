"""Every file that is shipped in `configs/` loads, and says what it is for."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.config import Config, load_config
from pipeline.pools import Node, size_pools
from pipeline.submit import Options, read_runtime_env

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
K8S = CONFIGS / "k8s"
# Where each is meant to run.
MACHINES = {
    "local.yaml": [Node(4)],
    "single-gpu.yaml": [Node(16, 1)],
    "cluster.yaml": [Node(4), Node(32, 8), Node(32, 8), Node(64)],
}
OTHER_FORMATS = {"serve.yaml", "runtime_env.yaml"}


def test_each_file_has_a_machine() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} - OTHER_FORMATS == MACHINES.keys()


def test_each_file_says_what_it_is_for() -> None:
    for path in [*CONFIGS.glob("*.yaml"), *K8S.glob("*.yaml"), CONFIGS / "Dockerfile"]:
        assert path.read_text().startswith("# "), path


def fits(config: Config, nodes: list[Node]) -> None:
    """One engine for every GPU, and nothing asked for that is not there."""
    pools = size_pools(nodes, config)
    assert pools.engines * pools.engine_gpus == sum(node.gpus for node in nodes)
    assert pools.engines * pools.engine_cpus + pools.decode_tasks <= sum(node.cpus for node in nodes)


@pytest.mark.parametrize("name", MACHINES)
def test_it_loads_and_its_pools_fit(name: str) -> None:
    fits(load_config(CONFIGS / name, env={}), MACHINES[name])


def test_the_runtime_environment_is_one_for_ray_and_holds_no_secret() -> None:
    from ray.runtime_env import RuntimeEnv

    found = read_runtime_env(Options(runtime_env=CONFIGS / "runtime_env.yaml"))
    assert RuntimeEnv(**found)["env_vars"]["HF_HOME"] == "/models/huggingface"


def check_serve(text: str) -> None:
    """Ray's own schema takes it, and our application its arguments."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built
    from ray.serve.schema import ServeDeploySchema

    from serve_app.deployment import AppArgs, build_app

    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert (module, name) == (build_app.__module__, build_app.__name__)
    assert application.name == load_config(env={}).serve.app
    assert all(model.num_cpus + model.num_gpus > 0 for model in AppArgs.model_validate(application.args).models)
    built(build_app, application.args)  # as `serve run` does: arguments are checked by the type that it names
    with pytest.raises(ValueError, match="modells"):
        built(build_app, {"modells": []})


def test_the_serve_file_is_one_for_ray() -> None:
    check_serve((CONFIGS / "serve.yaml").read_text())


# ---- Kubernetes: no cluster here, so what a custom resource says is held against lists

# The fields of KubeRay's types that a person sets, as of its 1.7 (its generated reference of the `ray.io/v1` types and
# the field lists of its sources), written down by hand; of Kubernetes' own types those that these files use.
CLUSTER = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    "gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy", "upgradeStrategy", "networkPolicy",
}  # fmt: skip
FIELDS: dict[str, set[str]] = {
    "RayJob": {
        "entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "activeDeadlineSeconds",
        "preRunningDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "deletionStrategy",
        "clusterSelector", "rayClusterSpec", "submitterPodTemplate", "submitterConfig", "metadata", "jobId",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "managedBy", "suspend",
    },
    "RayService": {
        "serveConfigV2", "rayClusterConfig", "upgradeStrategy", "excludeHeadPodFromServeSvc", "serveService",
        "serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "rayClusterDeletionDelaySeconds",
        "managedBy", "suspend",
    },
    "RayCluster": CLUSTER, "rayClusterSpec": CLUSTER, "rayClusterConfig": CLUSTER,
    "authOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "autoscalerOptions": {
        "version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy", "securityContext",
        "env", "envFrom", "volumeMounts",
    },
    "upgradeStrategy": {"type", "clusterUpgradeOptions"},
    "headGroupSpec": {
        "rayStartParams", "template", "serviceType", "headService", "enableIngress", "labels", "resources",
    },
    "workerGroupSpecs": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "rayStartParams",
        "template", "scaleStrategy", "suspend", "labels", "resources", "priority",
    },
    "rayStartParams": {"num-cpus", "num-gpus", "object-store-memory", "memory", "resources", "labels"},
    "template": {"metadata", "spec"},
    "spec": {
        "containers", "volumes", "serviceAccountName", "terminationGracePeriodSeconds", "securityContext",
        "nodeSelector", "tolerations",
    },
    "containers": {"name", "image", "resources", "volumeMounts", "env", "envFrom", "lifecycle", "securityContext"},
    "securityContext": {"runAsNonRoot", "runAsUser", "fsGroup"},
    "resources": {"requests", "limits"},
    "requests": {"cpu", "memory", "nvidia.com/gpu"}, "limits": {"cpu", "memory", "nvidia.com/gpu"},
    "volumeMounts": {"name", "mountPath", "readOnly"},
    "volumes": {"name", "emptyDir", "configMap", "secret", "persistentVolumeClaim"},
    "emptyDir": {"medium", "sizeLimit"}, "configMap": {"name"}, "secret": {"secretName"},
}  # fmt: skip
UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((K8S / name).read_text()))


def unknown(value: Any, kind: str) -> Iterator[str]:
    """Each field, as `kind.field`, that is in no list; descends into what has one."""
    for item in value if isinstance(value, list) else [value]:
        for name, inner in item.items():
            if name not in FIELDS[kind]:
                yield f"{kind}.{name}"
            elif name in FIELDS:
                yield from unknown(inner, name)


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def pods(cluster: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Each group's pod and its Ray's start parameters."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"], group["rayStartParams"]


def n_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


RESOURCES = {"rayjob.yaml": "RayJob", "rayservice.yaml": "RayService", "raycluster-autoscaling.yaml": "RayCluster"}


def test_each_resource_is_known() -> None:
    assert {path.name for path in K8S.glob("*.yaml")} == {*RESOURCES, "service.yaml"}


def test_the_http_service_finds_the_server() -> None:
    """On the head pod of the cluster that KubeRay makes of the RayService (its labels), at the port that it has."""
    (found,) = documents("service.yaml")
    service = documents("rayservice.yaml")[-1]
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert found["spec"]["ports"][0]["targetPort"] == args["port"]
    assert found["spec"]["selector"]["ray.io/originated-from-cr-name"] == service["metadata"]["name"]
    assert args["front_resources"] == {"node:__internal_head__": 0.001}
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts[str(Path(args["tokens_file"]).parent)] == "tokens"


@pytest.mark.parametrize(("name", "kind"), RESOURCES.items())
def test_a_resource_has_fields_that_its_kind_has(name: str, kind: str) -> None:
    """Against the lists above and not against the operator's schema, which is not in this repository."""
    resource = documents(name)[-1]
    assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", kind)
    assert list(unknown(resource["spec"], kind)) == []
    assert list(unknown({"backofLimit": 3, "rayClusterSpec": {"workerGroupSpecs": [{"name": 1}]}}, "RayJob")) == [
        "RayJob.backofLimit", "workerGroupSpecs.name",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RESOURCES)
def test_a_cluster_is_of_the_pinned_ray_with_room_for_its_objects(name: str) -> None:
    cluster = cluster_of(documents(name)[-1])
    pins = dict(line.split("==") for line in (CONFIGS / "constraints.txt").read_text().splitlines() if "==" in line)
    assert cluster["rayVersion"] == pins["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    images = set()
    for pod, ray in pods(cluster):
        (container,) = pod["containers"]
        images.add(container["image"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        shared = mounts["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert n_bytes(shared["sizeLimit"]) >= int(ray["object-store-memory"])
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        assert n_bytes(limits["memory"]) >= 2 * n_bytes(shared["sizeLimit"])  # what lies in it counts as the pod's
        assert ray["num-cpus"] in ("0", requests["cpu"])
        assert pod["securityContext"]["runAsNonRoot"]
        assert "env" not in container  # and so no secret
    assert len(images) == 1


def test_the_job_resumes_and_knows_its_nodes() -> None:
    settings, job = documents("rayjob.yaml")
    spec = job["spec"]
    assert spec["backoffLimit"] >= 1  # a try each, with a cluster of its own
    assert spec["shutdownAfterJobFinishes"]
    # KubeRay pastes it unquoted between other commands of a shell.
    assert re.fullmatch(r"[\w:/. -]+", spec["entrypoint"])
    wrapper, *command = shlex.split(spec["entrypoint"])
    assert wrapper == "murmur-job"
    config = Path(command[command.index("--config") + 1])
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert str(config.parent) in {mount["mountPath"] for mount in mounts}
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    nodes = [Node(0)]
    for group in groups:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]  # pools are sized once
        resources = group["template"]["spec"]["containers"][0]["resources"]
        node = Node(float(resources["requests"]["cpu"]), float(resources["limits"].get("nvidia.com/gpu", 0)))
        nodes += [node] * group["replicas"]
    fits(load_config(base=yaml.safe_load(settings["data"][config.name]), env={}), nodes)


def test_the_jobs_command_is_one_of_ours(tmp_path: Path) -> None:
    settings, job = documents("rayjob.yaml")
    (tmp_path / "run.yaml").write_text(settings["data"]["run.yaml"])
    command = job["spec"]["entrypoint"].replace("/etc/murmuration", str(tmp_path)).split()[1:]
    parsed = cli._parsed(command)
    assert parsed.output is not None
    assert parsed.output.startswith("s3://")


@pytest.mark.parametrize(
    ("ended", "says"), [(0, 0), (2, 0), (3, 0), (4, 0), (1, 1), (130, 130), (137, 137), (143, 143)]
)
def test_only_what_another_cluster_can_help_is_tried_again(ended: int, says: int, tmp_path: Path) -> None:
    """`murmur-job` with a `murmur` that ends so."""
    stub = tmp_path / "murmur"
    stub.write_text(f'#!/bin/sh\necho "murmur $*"\nexit {ended}\n')
    stub.chmod(0o755)
    done = subprocess.run(
        [K8S / "murmur-job", "retry", "a b"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == says
    assert done.stdout == f"murmur retry a b\nmurmur ended with exit code {ended}\n"


def test_the_service_is_one_for_ray() -> None:
    service = documents("rayservice.yaml")[-1]
    check_serve(service["spec"]["serveConfigV2"])
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    (gpu,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert sum(model["replicas"] * model["num_gpus"] for model in args["models"]) == gpu["replicas"]


# ---- the image: there is no docker here, so it is read and not built


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, with continued lines as one."""
    text = re.sub(r"\\\n\s*", "", (CONFIGS / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_of_pinned_things_and_runs_as_nobody_special() -> None:
    found = instructions()
    words = [word for word, _ in found]
    assert words[0] == "FROM"
    assert re.fullmatch(r"python:3\.11-slim-\w+", found[0][1])
    assert "ADD" not in words
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("-c configs/constraints.txt" in rest or "--no-deps" in rest for rest in installs)
    assert all("://" not in rest for _, rest in found)
    assert not [rest for word, rest in found if word in ("ENV", "ARG") and re.search("TOKEN|SECRET|PASSWORD", rest)]
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["1000"]  # a number: Kubernetes cannot tell whether a name is root
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert words[-1] == "CMD"


def test_what_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    sent = [line[1:] for line in (CONFIGS / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in sent, source
    assert (K8S / "murmur-job").stat().st_mode & 0o111  # COPY keeps it


def test_nothing_holds_an_address() -> None:
    for path in [*CONFIGS.rglob("*.yaml"), CONFIGS / "Dockerfile"]:
        assert not re.search(r"https?://", path.read_text()), path
