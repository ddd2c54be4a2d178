"""The optimizer's service in the cluster: its parts find, and are let to, each other."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

import trimserve
from tests.k8s.kustomizations import K8S, ROOT, written
from tests.k8s.resolved import Document, containers, found, pods, resolved
from tests.k8s.test_manifests import labels_meet, option, ports, quantity

WORKLOADS = {
    "Deployment": "optimizer-service",
    "StatefulSet": "optimizer-worker",
}


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return resolved(K8S / "service")


def pod_of(documents: list[Document], name: str) -> Document:
    (pod,) = [pod for workload, pod in pods(documents) if workload["metadata"]["name"] == name]
    return pod


def policy_of(documents: list[Document], name: str) -> dict[str, Any]:
    policy: dict[str, Any] = found(documents, "NetworkPolicy", name)["spec"]
    labels = pod_of(documents, name)["metadata"]["labels"]
    assert labels_meet(policy["podSelector"]["matchLabels"], labels)
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    return policy


def lets_in(policy: dict[str, Any], labels: dict[str, str], port: str) -> bool:
    """Whether a pod with these labels in the same namespace reaches the port."""
    return any(
        port in {one["port"] for one in rule["ports"]}
        and any(
            "namespaceSelector" not in one
            and labels_meet(one["podSelector"]["matchLabels"], labels)
            for one in rule["from"]
        )
        for rule in policy["ingress"]
    )


def lets_out(policy: dict[str, Any], labels: dict[str, str], port: str) -> bool:
    return any(
        port in {one["port"] for one in rule["ports"]}
        and any(
            labels_meet(one.get("podSelector", {}).get("matchLabels", {"-": "-"}), labels)
            for one in rule["to"]
        )
        for rule in policy.get("egress", ())
    )


def test_services_select_pods_and_name_their_ports(documents: list[Document]) -> None:
    for service in (one for one in documents if one["kind"] == "Service"):
        pod = pod_of(documents, service["metadata"]["name"])
        assert labels_meet(service["spec"]["selector"], pod["metadata"]["labels"])
        there = ports(pod["spec"]["containers"][0])
        for port in service["spec"]["ports"]:
            assert there[port["targetPort"]] == port["port"]


def test_stateful_sets_have_the_headless_service_that_they_name(documents: list[Document]) -> None:
    for one in (d for d in documents if d["kind"] == "StatefulSet"):
        service = found(documents, "Service", one["spec"]["serviceName"])["spec"]
        assert service["clusterIP"] == "None"
        assert service["selector"] == one["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("name", WORKLOADS.values())
def test_database_is_reached_by_what_needs_it_and_nothing_else(
    name: str, documents: list[Document]
) -> None:
    labels = pod_of(documents, name)["metadata"]["labels"]
    its = policy_of(documents, "postgres")
    assert lets_in(its, labels, "postgres")
    assert "egress" not in its
    to = pod_of(documents, "postgres")["metadata"]["labels"]
    assert lets_out(policy_of(documents, name), to, "postgres")
    others = found(resolved(K8S / "overlays/cpu"), "Deployment", "serve")["spec"]["template"]
    assert not lets_in(its, others["metadata"]["labels"], "postgres")


def test_clients_of_the_server_are_those_of_the_service(documents: list[Document]) -> None:
    for port in ("http", "grpc"):
        assert lets_in(
            policy_of(documents, "optimizer-service"), {"trimserve.dev/client": "true"}, port
        )
    assert not lets_in(
        policy_of(documents, "optimizer-worker"), {"trimserve.dev/client": "true"}, "metrics"
    )


def test_workers_reach_nothing_but_the_database_and_names(documents: list[Document]) -> None:
    rules = policy_of(documents, "optimizer-worker")["egress"]
    assert not [rule for rule in rules for to in rule["to"] if "ipBlock" in to]
    reached = {port["port"] for rule in rules for port in rule["ports"]}
    assert reached == {"postgres", 53}


def test_metrics_are_scraped_where_they_are_served(documents: list[Document]) -> None:
    for name, port in (("optimizer-service", "http"), ("optimizer-worker", "metrics")):
        prometheus = [
            rule
            for rule in policy_of(documents, name)["ingress"]
            for one in rule["from"]
            if one.get("podSelector", {}).get("matchLabels")
            == {"app.kubernetes.io/name": "prometheus"}
        ]
        (rule,) = prometheus
        assert [one["port"] for one in rule["ports"]] == [port]


def test_monitors_find_the_services_and_the_ports_that_are_let_in(tmp_path: Path) -> None:
    documents = resolved(written("service-monitoring", tmp_path))
    monitors = [one for one in documents if one["kind"] == "ServiceMonitor"]
    assert {one["metadata"]["name"] for one in monitors} == set(WORKLOADS.values())
    for monitor in monitors:
        service = found(documents, "Service", monitor["metadata"]["name"])
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert labels_meet(wanted, service["metadata"]["labels"])
        (endpoint,) = monitor["spec"]["endpoints"]
        (port,) = [one for one in service["spec"]["ports"] if one["name"] == endpoint["port"]]
        ingress = policy_of(documents, monitor["metadata"]["name"])["ingress"]
        assert [{"port": port["targetPort"], "protocol": "TCP"}] in [
            one["ports"] for one in ingress
        ]


def test_front_end_and_workers_share_files_and_agree_on_where_they_are(
    documents: list[Document],
) -> None:
    front_end, worker = (
        pod_of(documents, name)["spec"]["containers"][0] for name in WORKLOADS.values()
    )
    for name in ("--blobs", "--repository"):
        assert option(front_end, name) == option(worker, name)
    mounts = [
        {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        for container in (front_end, worker)
    ]
    for volume in ("shared", "models"):
        assert mounts[0][volume] == mounts[1][volume]
    assert option(worker, "--blobs").startswith(f"{mounts[0]['shared']}/")
    assert option(worker, "--artifacts").startswith(f"{mounts[0]['shared']}/")
    assert option(worker, "--repository").partition("=")[2] == mounts[0]["models"]
    assert option(worker, "--work").startswith(f"{mounts[1]['work']}/")
    for claim in ("optimizer", "models"):
        found_claim = found(documents, "PersistentVolumeClaim", claim)["spec"]
        assert found_claim["accessModes"] == ["ReadWriteMany"]


def test_front_end_asks_for_keys_and_starts_no_worker(documents: list[Document]) -> None:
    (container,) = pod_of(documents, "optimizer-service")["spec"]["containers"]
    assert "--keys" in container["args"]  # it listens on all addresses
    assert option(container, "--workers") == "0"
    assert ports(container) == {
        "http": int(option(container, "--port")),
        "grpc": int(option(container, "--grpc-port")),
    }


def test_probes_ask_what_the_service_has(documents: list[Document]) -> None:
    (container,) = pod_of(documents, "optimizer-service")["spec"]["containers"]
    source = (ROOT / "optimizer/service/rest/health.py").read_text()
    asked = {
        container[f"{one}Probe"]["httpGet"]["path"] for one in ("startup", "readiness", "liveness")
    }
    assert asked == {"/livez", "/readyz"}
    assert all(f'.get("{path}"' in source for path in asked)


def test_tables_are_made_before_the_service_reads_them(documents: list[Document]) -> None:
    spec = pod_of(documents, "optimizer-service")["spec"]
    (migrate,) = spec["initContainers"]
    (container,) = spec["containers"]
    assert migrate["args"] == ["service", "migrate"]
    assert migrate["image"] == container["image"]
    assert migrate["env"] == container["env"]


def test_environment_is_read_by_the_commands_options(documents: list[Document]) -> None:
    root: Any = typer.main.get_command(trimserve.app)
    for name, command in (("optimizer-service", "run"), ("optimizer-worker", "worker")):
        (container,) = pod_of(documents, name)["spec"]["containers"]
        read = {
            one.envvar for one in root.commands["service"].commands[command].params if one.envvar
        }
        given = {one["name"] for one in container["env"] if one["name"].startswith("TRIMSERVE_")}
        assert given
        assert given <= read


def test_jobs_are_ended_before_their_worker_is(documents: list[Document]) -> None:
    """By --memory-limit-gb, which counts a job with all its processes."""
    (container,) = pod_of(documents, "optimizer-worker")["spec"]["containers"]
    limit = quantity(container["resources"]["limits"]["memory"])
    assert float(option(container, "--memory-limit-gb")) * 1e9 < 0.9 * float(limit)


def test_workers_measure_on_as_many_cores_as_the_server_has(documents: list[Document]) -> None:
    (worker,) = pod_of(documents, "optimizer-worker")["spec"]["containers"]
    (server,) = found(resolved(K8S / "overlays/cpu"), "Deployment", "serve")["spec"]["template"][
        "spec"
    ]["containers"]
    assert worker["resources"]["limits"]["cpu"] == server["resources"]["limits"]["cpu"]


def test_budgets_leave_a_pod_at_a_time(documents: list[Document]) -> None:
    budgets = [one for one in documents if one["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        pod = pod_of(documents, budget["metadata"]["name"])
        assert labels_meet(budget["spec"]["selector"]["matchLabels"], pod["metadata"]["labels"])
        assert budget["spec"]["maxUnavailable"] == 1
    assert {one["metadata"]["name"] for one in budgets} == set(WORKLOADS.values())


def test_secrets_are_named_in_the_documentation_with_their_keys(documents: list[Document]) -> None:
    wanted = {
        (source["name"], source["key"])
        for _, pod in pods(documents)
        for container in containers(pod)
        for one in container.get("env", ())
        if (source := one.get("valueFrom", {}).get("secretKeyRef"))
    }
    text = (ROOT / "docs/kubernetes.md").read_text()
    (made,) = re.findall(r"create secret generic optimizer-database ((?:.|\\\n)+?)\n[`k]", text)
    assert wanted == {("optimizer-database", key) for key in re.findall(r"literal=(\w+)=", made)}
    (url,) = re.findall(r"url=\"?(postgresql://[^\"\s]+)", made)
    port = found(documents, "Service", "postgres")["spec"]["ports"][0]["port"]
    assert re.fullmatch(rf"postgresql://trimserve:\S+@postgres:{port}/trimserve", url)
    (database,) = pod_of(documents, "postgres")["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in database["env"]}
    assert values["POSTGRES_USER"] == values["POSTGRES_DB"] == "trimserve"


def test_database_writes_only_to_volumes(documents: list[Document]) -> None:
    (database,) = pod_of(documents, "postgres")["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in database["env"]}
    mounts = {Path(one["mountPath"]) for one in database["volumeMounts"]}
    assert Path(values["PGDATA"]).parent in mounts
    assert {Path("/var/run/postgresql"), Path("/tmp")} <= mounts
