"""What schemas of Kubernetes can't see: manifests fit each other, the images and the programs."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer

import serve
import trimserve
from loadtest.slo import read_slo
from serve.storage.digest import parse_digest
from tests.k8s.resolved import Document, containers, found, pods, resolved

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
SERVERS = ("overlays/dev", "overlays/cpu", "overlays/gpu")
LOAD_TESTS = ("jobs/loadtest", "jobs/loadtest-distributed")
ALL = ("base", *SERVERS, "service", *LOAD_TESTS, "jobs/optimize", "jobs/tools", "jobs/files")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
SCALE = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip
LIBRARIES_READ = {"OMP_NUM_THREADS"}  # OpenMP's, by numpy's and torch's kernels
OPTIONS_READ = {"TRIMSERVE_SERVICE_DATABASE", "TRIMSERVE_STORE"}
POSTGRES_READS = {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "POSTGRES_INITDB_ARGS",
                  "PGDATA"}  # fmt: skip

everywhere = pytest.mark.parametrize("name", ALL)
servers = pytest.mark.parametrize("name", SERVERS)


def quantity(text: str) -> Decimal:
    matched = QUANTITY.fullmatch(text)
    assert matched, f"got {text!r}, want a quantity"
    return Decimal(matched[1]) * SCALE[matched[2] or ""]


def server(documents: list[Document]) -> tuple[Document, Document]:
    """(pod's spec, its one container)."""
    pod = found(documents, "Deployment", "serve")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def option(container: Document, name: str) -> str:
    (value,) = [a.partition("=")[2] for a in container["args"] if a.startswith(f"{name}=")]
    return value


def ports(container: Document) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container.get("ports", ())}


def labels_meet(wanted: dict[str, str], labels: dict[str, str]) -> bool:
    return wanted.items() <= labels.items()


# --- references


@everywhere
def test_kustomization_says_its_purpose_on_its_first_line(name: str) -> None:
    assert re.match(r"# \w.{20,}\n", (K8S / name / "kustomization.yaml").read_text())


@everywhere
def test_references_resolve(name: str) -> None:
    documents = resolved(K8S / name)
    there = {(one["kind"], one["metadata"]["name"]) for one in documents}
    for workload, pod in pods(documents):
        spec = pod["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        volumes = {one["name"]: one for one in spec["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in there
        claimed = workload["spec"].get("volumeClaimTemplates", ())
        held = set(volumes) | {one["metadata"]["name"] for one in claimed}
        mounted = [{one["name"] for one in c["volumeMounts"]} for c in containers(pod)]
        assert set.union(*mounted) == held
        for container in containers(pod):
            for source in container.get("envFrom", ()):
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in there
                else:  # the cluster's own, so it may be missing
                    assert source["secretRef"]["optional"]


@pytest.mark.parametrize("name", ["base", *SERVERS])
def test_services_budget_and_spread_select_the_servers_pods(name: str) -> None:
    documents = resolved(K8S / name)
    deployment = found(documents, "Deployment", "serve")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    pod, container = server(documents)
    selectors = [one["spec"]["selector"] for one in documents if one["kind"] == "Service"]
    selectors.append(
        found(documents, "PodDisruptionBudget", "serve")["spec"]["selector"]["matchLabels"]
    )
    selectors.append(deployment["spec"]["selector"]["matchLabels"])
    selectors += [one["labelSelector"]["matchLabels"] for one in pod["topologySpreadConstraints"]]
    assert len(selectors) == 6
    assert all(labels_meet(one, labels) for one in selectors)
    for service in (one for one in documents if one["kind"] == "Service"):
        for port in service["spec"]["ports"]:
            assert ports(container)[port["targetPort"]] == port["port"]


@everywhere
def test_variables_in_arguments_are_set_and_those_set_are_used(name: str) -> None:
    documents = resolved(K8S / name)
    for _, pod in pods(documents):
        for container in containers(pod):
            own = {one["name"] for one in container.get("env", ())}
            given = set(own)
            for source in container.get("envFrom", ()):
                if "configMapRef" in source:
                    given |= set(
                        found(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
                    )
            used = set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", ()))))
            assert used <= given
            is_ours = container["image"].startswith("trimserve-")
            assert own <= used | (LIBRARIES_READ | OPTIONS_READ if is_ours else POSTGRES_READS)


# --- command lines


@everywhere
def test_arguments_are_options_that_the_command_has(name: str) -> None:
    root = typer.main.get_command(trimserve.app)
    for _, pod in pods(resolved(K8S / name)):
        for container in containers(pod):
            command: Any = root
            if not container["image"].startswith("trimserve-") or "command" in container:
                continue
            words = [one.replace("$(LOAD_MODEL)", "m") for one in container["args"]]
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            assert not hasattr(command, "commands"), container["args"]
            # Parses as the program would: unknown options and values out of range are errors.
            command.make_context("trimserve", _with_existing_files(words), resilient_parsing=False)


def _with_existing_files(words: list[str]) -> list[str]:
    return [word.replace("/etc/trimserve/slo.yaml", str(K8S / "config/slo.yaml")) for word in words]


@servers
def test_ports_are_the_commands_and_reachable(name: str) -> None:
    _, container = server(resolved(K8S / name))
    told = {kind: int(option(container, f"--{kind}-port")) for kind in ("http", "grpc", "metrics")}
    assert ports(container) == told
    assert option(container, "--host") == "0.0.0.0"


def test_model_that_is_loaded_is_the_one_that_is_tested() -> None:
    data = found(resolved(K8S / "config"), "ConfigMap", "model")["data"]
    model, _, digest = data["LOAD_MODEL"].partition("@")
    assert model == data["MODEL_NAME"]
    parse_digest(digest)  # raises for what is no digest
    _, container = server(resolved(K8S / "overlays/dev"))
    assert {"name": "LOAD_MODEL", "value": model} in container["env"]


# --- probes and the end of a pod


@servers
def test_probes_differ_in_meaning_and_hit_what_the_server_has(name: str) -> None:
    _, container = server(resolved(K8S / name))
    start, ready, live = (container[f"{one}Probe"] for one in ("startup", "readiness", "liveness"))
    paths = {start["httpGet"]["path"], live["httpGet"]["path"]}
    assert paths == {"/v2/health/ready", "/v2/health/live"}
    source = (ROOT / "serve" / "transport" / "admin.py").read_text()
    assert all(f'.get("{path}"' in source for path in paths)
    assert {start["httpGet"]["port"], live["httpGet"]["port"]} <= set(ports(container))
    assert ready["grpc"]["port"] == ports(container)["grpc"]


@servers
def test_a_pod_has_time_to_drain(name: str) -> None:
    documents = resolved(K8S / name)
    pod, container = server(documents)
    takes_s = (
        container["lifecycle"]["preStop"]["sleep"]["seconds"]
        + float(option(container, "--drain-delay-s"))
        + float(option(container, "--drain-timeout-s"))
    )
    assert pod["terminationGracePeriodSeconds"] > takes_s
    start = container["startupProbe"]
    deadline_s = found(documents, "Deployment", "serve")["spec"]["progressDeadlineSeconds"]
    assert deadline_s > start["periodSeconds"] * start["failureThreshold"]


def test_an_update_takes_no_pod_out_first_unless_it_needs_its_gpu() -> None:
    for name in SERVERS:
        spec = found(resolved(K8S / name), "Deployment", "serve")["spec"]
        updates = spec["strategy"]["rollingUpdate"]
        on_gpu = "nvidia.com/gpu" in server(resolved(K8S / name))[1]["resources"]["limits"]
        assert updates == {"maxUnavailable": int(on_gpu), "maxSurge": int(not on_gpu)}


# --- resources and security


@everywhere
def test_pods_are_guaranteed_whole_cores_and_threads_follow_the_limit(name: str) -> None:
    for _, pod in pods(resolved(K8S / name)):
        for container in containers(pod):
            requests, limits = (container["resources"][one] for one in ("requests", "limits"))
            for kind in ("cpu", "memory", "ephemeral-storage"):
                assert quantity(requests[kind]) == quantity(limits[kind])
            cores = quantity(limits["cpu"])
            assert cores == int(cores) >= 1
            for one in container.get("env", ()):
                if one["name"] == "OMP_NUM_THREADS":
                    source = one["valueFrom"]["resourceFieldRef"]
                    assert source["containerName"] == container["name"]
                    assert source["resource"] == "limits.cpu"
                    assert quantity(source["divisor"]) == 1
            on_disk = [v["emptyDir"] for v in pod["spec"]["volumes"] if "emptyDir" in v]
            held = sum(quantity(one["sizeLimit"]) for one in on_disk)
            assert held <= quantity(limits["ephemeral-storage"])


def test_a_study_measures_on_as_many_cores_as_the_server_has() -> None:
    """Engines' threads times instances, which the study takes from its cores, fit the server."""
    ((_, study),) = pods(resolved(K8S / "jobs/optimize"))
    measured = containers(study)[0]["resources"]["limits"]["cpu"]
    for name in ("overlays/cpu", "overlays/gpu"):
        assert server(resolved(K8S / name))[1]["resources"]["limits"]["cpu"] == measured


@everywhere
def test_pods_keep_to_the_restricted_standard(name: str) -> None:
    for _, pod in pods(resolved(K8S / name)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        is_postgres = spec["serviceAccountName"] == "postgres"
        assert spec["securityContext"]["runAsUser"] == (999 if is_postgres else 10001)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert "/tmp" in {one["mountPath"] for one in container["volumeMounts"]}


@everywhere
def test_images_have_a_version_and_a_target_that_runs_as_10001(name: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    for _, pod in pods(resolved(K8S / name)):
        for container in containers(pod):
            image, _, tag = container["image"].partition(":")
            if image == "postgres":
                assert re.fullmatch(r"\d+\.\d+-\w+", tag)  # a release, of which no other is made
                continue
            target = image.removeprefix("trimserve-")
            assert tag == serve.VERSION
            assert f"FROM runtime AS {target}\n" in dockerfile


# --- network


def test_everything_is_denied_but_what_is_named() -> None:
    deny = found(resolved(K8S / "base"), "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("sender", ["loadtest", "loadtest-worker"])
def test_load_test_may_reach_the_port_that_it_is_told_to(sender: str) -> None:
    _, container = server(resolved(K8S / "base"))
    job = resolved(K8S / "jobs/loadtest-distributed")
    (asker,) = found(job, "Job", "loadtest")["spec"]["template"]["spec"]["containers"]
    pod = found(job, "Job", sender)["spec"]["template"]
    target = option(asker, "--target")  # the plan has it, which workers get
    service, _, port = target.removeprefix("http://").partition(":")
    (told,) = [
        one
        for one in found(resolved(K8S / "base"), "Service", service)["spec"]["ports"]
        if one["port"] == int(port)
    ]
    leaves = found(job, "NetworkPolicy", sender)["spec"]
    assert labels_meet(leaves["podSelector"]["matchLabels"], pod["metadata"]["labels"])
    assert told["targetPort"] in {one["port"] for one in leaves["egress"][0]["ports"]}
    enters = found(resolved(K8S / "base"), "NetworkPolicy", "serve")["spec"]["ingress"][0]
    assert labels_meet(enters["from"][0]["podSelector"]["matchLabels"], pod["metadata"]["labels"])
    assert told["targetPort"] in {one["port"] for one in enters["ports"]} <= set(ports(container))


def test_tools_may_reach_what_a_search_for_the_capacity_asks() -> None:
    documents = resolved(K8S / "jobs/tools")
    labels = found(documents, "Job", "tools")["spec"]["template"]["metadata"]["labels"]
    leaves = found(documents, "NetworkPolicy", "tools")["spec"]
    assert labels_meet(leaves["podSelector"]["matchLabels"], labels)
    policies = [
        found(resolved(K8S / "base"), "NetworkPolicy", "serve"),
        found(documents, "NetworkPolicy", "serve-tools"),
    ]
    _, container = server(resolved(K8S / "base"))
    entered = set()
    for entrance in (one["spec"]["ingress"][0] for one in policies):
        assert labels_meet(entrance["from"][0]["podSelector"]["matchLabels"], labels)
        entered |= {one["port"] for one in entrance["ports"]}
    assert {one["port"] for one in leaves["egress"][0]["ports"]} == entered == set(ports(container))


def test_files_are_copied_to_the_volumes_that_server_and_study_read() -> None:
    (_, copier), *_ = pods(resolved(K8S / "jobs/files"))
    held = {
        one["persistentVolumeClaim"]["claimName"]
        for one in copier["spec"]["volumes"]
        if "persistentVolumeClaim" in one
    }
    wanted = {
        volume["persistentVolumeClaim"]["claimName"]
        for name in ("overlays/dev", "jobs/optimize")
        for _, pod in pods(resolved(K8S / name))
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert held == wanted == {"study", "models"}
    (container,) = containers(copier)
    assert (
        f"activeDeadlineSeconds: {container['command'][1]}"
        in (K8S / "jobs/tools/job.yaml").read_text()
    )


def test_workers_alone_reach_the_master_where_it_listens() -> None:
    documents = resolved(K8S / "jobs/loadtest-distributed")
    master, worker = (
        found(documents, "Job", name)["spec"]["template"]
        for name in ("loadtest", "loadtest-worker")
    )
    (listener,), (caller,) = containers(master), containers(worker)
    service, _, port = option(caller, "--master").partition(":")
    spec = found(documents, "Service", service)["spec"]
    assert labels_meet(spec["selector"], master["metadata"]["labels"])
    assert not labels_meet(spec["selector"], worker["metadata"]["labels"])
    (way,) = spec["ports"]
    assert way["port"] == int(port)
    address, _, bound = option(listener, "--bind").partition(":")
    assert (address, ports(listener)[way["targetPort"]]) == ("0.0.0.0", int(bound))
    policies = [one["spec"] for one in documents if one["kind"] == "NetworkPolicy"]
    enters = [
        rule
        for one in policies
        if labels_meet(one["podSelector"]["matchLabels"], master["metadata"]["labels"])
        for rule in one.get("ingress", ())
    ]
    named = {"matchLabels": {"app.kubernetes.io/name": "loadtest-worker"}}
    assert enters == [
        {
            "from": [{"podSelector": named}],
            "ports": [{"port": way["targetPort"], "protocol": "TCP"}],
        }
    ]
    assert labels_meet(named["matchLabels"], worker["metadata"]["labels"])
    leaves = found(documents, "NetworkPolicy", "loadtest-worker")["spec"]["egress"]
    (out,) = [
        one for one in leaves if {"port": way["targetPort"], "protocol": "TCP"} in one["ports"]
    ]
    (to,) = out["to"]
    assert labels_meet(to["podSelector"]["matchLabels"], master["metadata"]["labels"])


def test_as_many_workers_run_as_the_master_awaits_and_each_plays_once() -> None:
    documents = resolved(K8S / "jobs/loadtest-distributed")
    master, worker = (
        found(documents, "Job", name)["spec"] for name in ("loadtest", "loadtest-worker")
    )
    (listener,), (caller,) = containers(master["template"]), containers(worker["template"])
    n = int(option(listener, "--expect-workers"))
    assert (worker["completions"], worker["parallelism"]) == (n, n)
    assert worker["backoffLimit"] >= n  # none is out of tries when all come before the master
    assert "--once" in caller["args"]  # or they would outlive the test
    assert worker["activeDeadlineSeconds"] == master["activeDeadlineSeconds"]


def test_distributed_load_test_is_the_other_ones_but_for_its_workers() -> None:
    one, shared = (
        found(resolved(K8S / name), "Job", "loadtest")["spec"]["template"]["spec"]["containers"]
        for name in LOAD_TESTS
    )
    workers = {"--expect-workers", "--bind"}
    left = [a for a in shared[0]["args"] if a.partition("=")[0] not in workers]
    assert left == one[0]["args"]
    assert {**shared[0], "args": [], "ports": []} == {**one[0], "args": [], "ports": []}


@pytest.mark.parametrize("name", ["overlays/cpu", "overlays/gpu"])
def test_monitoring_finds_the_metrics_and_is_let_in(name: str) -> None:
    documents = resolved(K8S / name)
    spec = found(documents, "ServiceMonitor", "serve")["spec"]
    wanted = spec["selector"]["matchLabels"]
    services = [one for one in documents if one["kind"] == "Service"]
    (service,) = [one for one in services if labels_meet(wanted, one["metadata"]["labels"])]
    assert service["spec"]["clusterIP"] == "None"  # every pod is scraped, and once
    (endpoint,) = spec["endpoints"]
    (port,) = [one for one in service["spec"]["ports"] if one["name"] == endpoint["port"]]
    policy = found(documents, "NetworkPolicy", "serve-metrics")["spec"]
    assert [one["port"] for one in policy["ingress"][0]["ports"]] == [port["targetPort"]]
    labels = found(documents, "Deployment", "serve")["spec"]["template"]["metadata"]["labels"]
    assert labels_meet(policy["podSelector"]["matchLabels"], labels)


# --- one SLO file


def test_component_slo_is_what_the_command_writes_for_the_slo(tmp_path: Path) -> None:
    config = found(resolved(K8S / "config"), "ConfigMap", "model")["data"]
    slo, folder = str(K8S / "config/slo.yaml"), tmp_path / "slo"
    command = ["k8s", "render", slo, "--model", config["MODEL_NAME"], "--output", str(folder)]
    assert trimserve.main(command) == 0
    there, made = (
        {path.relative_to(one): path.read_text() for path in one.rglob("*") if path.is_file()}
        for one in (K8S / "components/slo", folder)
    )
    assert there == made


def test_jobs_read_the_servers_slo_and_have_time_for_its_window() -> None:
    slo = found(resolved(K8S / "base"), "ConfigMap", "slo")
    for name in (*LOAD_TESTS, "jobs/optimize"):
        assert found(resolved(K8S / name), "ConfigMap", "slo")["data"] == slo["data"]
    job = found(resolved(K8S / "jobs/loadtest"), "Job", "loadtest")
    assert job["spec"]["activeDeadlineSeconds"] > 2 * read_slo(K8S / "config/slo.yaml").window_s


@pytest.mark.parametrize("path", [*LOAD_TESTS, "jobs/optimize"])
def test_a_verdict_is_not_asked_for_again(path: str) -> None:
    name = "optimize" if path.endswith("optimize") else "loadtest"
    spec = found(resolved(K8S / path), "Job", name)["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    codes = [
        one["onExitCodes"] for one in spec["podFailurePolicy"]["rules"] if "onExitCodes" in one
    ]
    assert codes == [{"containerName": name, "operator": "In", "values": [1, 2, 3, 70]}]
