"""The Ray cluster of the optimizer's service: who builds, who measures, and who reaches whom."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.version import Version

import trimserve
from optimizer.execution.cluster import MEASURE_RESOURCE, Cluster
from tests.images.test_locks import pins
from tests.k8s.kustomizations import K8S, ROOT, written
from tests.k8s.resolved import Document, containers, found, ray_pods, resolved
from tests.k8s.test_manifests import labels_meet, option, ports, quantity

GROUPS = ("head", "builders", "measurers")
groups = pytest.mark.parametrize("group", GROUPS)
# What is used of ray.io/v1, by the names of docs.ray.io (RayCluster Configuration).
SPEC = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"serviceType", "rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    return resolved(written("ray", tmp_path_factory.mktemp("ray")))


@pytest.fixture
def cluster(documents: list[Document]) -> Document:
    return found(documents, "RayCluster", "optimizer")


@pytest.fixture
def worker(documents: list[Document]) -> Document:
    spec: Document = found(documents, "StatefulSet", "optimizer-worker")["spec"]
    return spec


def group_of(cluster: Document, name: str) -> Document:
    spec: Document = cluster["spec"]
    if name == "head":
        return dict(spec["headGroupSpec"])
    (one,) = [one for one in spec["workerGroupSpecs"] if one["groupName"] == name]
    return dict(one)


def container_of(cluster: Document, group: str) -> Document:
    (container,) = containers(ray_pods(cluster)[group])
    return container


def started_with(worker: Document) -> dict[str, str]:
    """The options of the worker's own node."""
    (ray,) = worker["template"]["spec"]["initContainers"]
    told = [one.removeprefix("--").partition("=") for one in ray["args"][1:]]
    return {name: value for name, _, value in told}


def test_fields_are_those_of_the_custom_resource(cluster: Document) -> None:
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert set(spec) == SPEC
    assert set(spec["headGroupSpec"]) == HEAD
    for one in spec["workerGroupSpecs"]:
        assert set(one) == WORKERS
        assert one["minReplicas"] <= one["replicas"] <= one["maxReplicas"]
    assert [one["groupName"] for one in spec["workerGroupSpecs"]] == list(GROUPS[1:])


@groups
def test_parameters_are_options_of_ray_start(group: str, cluster: Document) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    given = group_of(cluster, group)["rayStartParams"]
    assert all(isinstance(value, str) for value in given.values())
    # KubeRay leaves out the value of what is a switch.
    words = [
        f"--{name}" + ("" if value == "true" else f"={value}") for name, value in given.items()
    ]
    told = shlex.split(" ".join(words))  # by the shell, as KubeRay starts it
    context = scripts.start.make_context("ray start", told, resilient_parsing=False)
    if group == "measurers":
        assert json.loads(context.params["resources"]) == {MEASURE_RESOURCE: 1}


def test_options_of_the_workers_node_are_those_of_ray_start(worker: Document) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    (ray,) = worker["template"]["spec"]["initContainers"]
    assert ray["args"][0] == "start"
    scripts.start.make_context("ray start", list(ray["args"][1:]), resilient_parsing=False)


def test_version_is_the_images(cluster: Document) -> None:
    assert Version(cluster["spec"]["rayVersion"]) == pins(ROOT / "locks/optimizer.txt")["ray"]


def test_nothing_is_built_but_by_builders(cluster: Document, worker: Document) -> None:
    cpus = {name: int(group_of(cluster, name)["rayStartParams"]["num-cpus"]) for name in GROUPS}
    assert cpus["head"] == cpus["measurers"] == int(started_with(worker)["num-cpus"]) == 0
    limits = container_of(cluster, "builders")["resources"]["limits"]
    assert cpus["builders"] == quantity(limits["cpu"])
    env = {
        one["name"]: one.get("value") for one in worker["template"]["spec"]["containers"][0]["env"]
    }
    assert cpus["builders"] % int(env["TRIMSERVE_RAY_BUILD_CPUS"]) == 0


def test_measurers_have_as_many_cores_as_the_server_and_are_as_many_as_lead_studies(
    cluster: Document, worker: Document
) -> None:
    (server,) = found(resolved(K8S / "overlays/cpu"), "Deployment", "serve")["spec"]["template"][
        "spec"
    ]["containers"]
    container = container_of(cluster, "measurers")
    assert container["resources"]["limits"]["cpu"] == server["resources"]["limits"]["cpu"]
    assert group_of(cluster, "measurers")["replicas"] == worker["replicas"]
    assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]


@groups
def test_pods_are_guaranteed_restricted_and_of_the_optimizers_image(
    group: str, cluster: Document, documents: list[Document]
) -> None:
    spec = ray_pods(cluster)[group]["spec"]
    container = container_of(cluster, group)
    assert_guaranteed(container)
    assert_restricted(container)
    assert spec["automountServiceAccountToken"] is False
    assert found(documents, "ServiceAccount", spec["serviceAccountName"])
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    held = sum(
        quantity(one["emptyDir"]["sizeLimit"])
        for one in volumes.values()
        if "emptyDir" in one and "medium" not in one["emptyDir"]
    )
    assert held <= quantity(container["resources"]["limits"]["ephemeral-storage"])
    (own,) = found(documents, "StatefulSet", "optimizer-worker")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["image"] == own["image"]


def assert_guaranteed(container: Document) -> None:
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    cores = quantity(resources["limits"]["cpu"])
    assert cores == int(cores) >= 1


def assert_restricted(container: Document) -> None:
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert {"/tmp", "/dev/shm"} <= {one["mountPath"] for one in container["volumeMounts"]}


def test_worker_is_a_node_before_it_starts_and_finds_its_sockets(worker: Document) -> None:
    spec = worker["template"]["spec"]
    (ray,), (own,) = spec["initContainers"], spec["containers"]
    assert ray["restartPolicy"] == "Always"  # a sidecar: started first, and beside it
    assert ray["image"] == own["image"]
    assert ray["startupProbe"]["tcpSocket"]["port"] in ports(ray)
    assert_guaranteed(ray)
    assert_restricted(ray)
    [mine], [theirs] = (
        [one["name"] for one in container["volumeMounts"] if one["mountPath"] == "/tmp"]
        for container in (ray, own)
    )
    assert mine == theirs
    assert spec["shareProcessNamespace"] is True


def test_worker_names_the_head_by_an_address_that_the_command_takes(
    cluster: Document, worker: Document
) -> None:
    (own,) = worker["template"]["spec"]["containers"]
    env = {one["name"]: one.get("value") for one in own["env"]}
    address = env["TRIMSERVE_RAY"]
    assert Cluster(address).problems() == []
    # KubeRay names the head's Service by the cluster.
    port = group_of(cluster, "head")["rayStartParams"]["port"]
    assert address == f"{cluster['metadata']['name']}-head-svc:{port}"
    assert started_with(worker)["address"] == address
    assert ports(container_of(cluster, "head"))["gcs"] == int(port)
    root: Any = typer.main.get_command(trimserve.app)
    read = {one.envvar for one in root.commands["service"].commands["worker"].params if one.envvar}
    assert {name for name in env if name.startswith("TRIMSERVE_")} <= read


def test_jobs_files_and_artifacts_lie_where_builders_and_measurers_see_them(
    cluster: Document, worker: Document
) -> None:
    (own,) = worker["template"]["spec"]["containers"]
    shared = {one["name"]: one["mountPath"] for one in own["volumeMounts"]}["shared"]
    for name in ("--work", "--artifacts"):
        assert option(own, name).startswith(f"{shared}/")
    assert "$(POD_NAME)" in option(own, "--work")  # one of each worker
    volumes = {one["name"]: one for one in worker["template"]["spec"]["volumes"]}
    assert "volumeClaimTemplates" not in worker  # nor is anything mounted that isn't there
    everything = [own, *worker["template"]["spec"]["initContainers"]]
    assert {one["name"] for c in everything for one in c["volumeMounts"]} == set(volumes)
    for group in GROUPS[1:]:
        pod = ray_pods(cluster)[group]["spec"]
        assert {one["name"]: one for one in pod["volumes"]}["shared"] == volumes["shared"]
        mounted = container_of(cluster, group)["volumeMounts"]
        assert {"name": "shared", "mountPath": shared} in mounted


def test_every_node_has_the_token(cluster: Document, worker: Document) -> None:
    spec = worker["template"]["spec"]
    nodes = [container_of(cluster, group) for group in GROUPS]
    for container in [*nodes, *spec["initContainers"], *spec["containers"]]:
        env = {one["name"]: one for one in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": "optimizer-ray", "key": "auth_token"}
    text = (ROOT / "docs/kubernetes.md").read_text()
    assert "create secret generic optimizer-ray --from-literal=auth_token=" in text


def test_nodes_reach_each_other_on_the_ports_that_they_are_told_and_nobody_else_does(
    cluster: Document, worker: Document, documents: list[Document]
) -> None:
    policy = found(documents, "NetworkPolicy", "optimizer-ray")["spec"]
    wanted = policy["podSelector"]["matchLabels"]
    (entry,) = policy["ingress"]
    assert entry["from"] == [{"podSelector": {"matchLabels": wanted}}]
    leaves = policy["egress"][0]
    assert (leaves["to"], leaves["ports"]) == (entry["from"], entry["ports"])
    opened = {n for one in entry["ports"] for n in range(one["port"], one["endPort"] + 1)}
    for group in GROUPS:
        assert labels_meet(wanted, ray_pods(cluster)[group]["metadata"]["labels"])
    assert labels_meet(wanted, worker["template"]["metadata"]["labels"])
    told = [group_of(cluster, group)["rayStartParams"] for group in GROUPS]
    for given in [*told, started_with(worker)]:
        fixed = {int(value) for name, value in given.items() if name.endswith("-port")}
        assert len(fixed) >= 6  # none is left to chance
        assert fixed <= opened
        low, high = int(given["min-worker-port"]), int(given["max-worker-port"])
        assert set(range(low, high + 1)) <= opened
    (server,) = [
        pod["spec"]["template"]["metadata"]["labels"]
        for pod in resolved(K8S / "overlays/cpu")
        if pod["kind"] == "Deployment"
    ]
    assert not labels_meet(wanted, server)


def test_builders_alone_of_the_nodes_reach_the_database(
    cluster: Document, documents: list[Document]
) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in ray_pods(cluster).items()}
    postgres = found(documents, "NetworkPolicy", "postgres")["spec"]
    (entry,) = postgres["ingress"]
    (source,) = entry["from"]
    let_in = [
        name for name in GROUPS if labels_meet(source["podSelector"]["matchLabels"], labels[name])
    ]
    builders = found(documents, "NetworkPolicy", "optimizer-ray-builders")["spec"]
    let_out = [
        name for name in GROUPS if labels_meet(builders["podSelector"]["matchLabels"], labels[name])
    ]
    assert let_in == let_out == ["builders"]
    (rule,) = builders["egress"]
    assert rule["ports"] == entry["ports"]


def test_folder_with_the_component_is_in_the_documentation() -> None:
    assert "components: [../components/ray]" in (ROOT / "docs/kubernetes.md").read_text()
    assert Path(K8S / "components/ray/kustomization.yaml").is_file()
