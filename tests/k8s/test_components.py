"""Components fit the server that they are added to, and what the server really exports."""

import re
from pathlib import Path

import pytest
import yaml

from loadtest.rules import MIN_REQUESTS, indicators
from loadtest.slo import read_slo
from serve import oip_pb2 as pb
from tests.k8s.kustomizations import COMPONENTS, K8S, ROOT, written
from tests.k8s.resolved import Document, found, resolved
from tests.k8s.test_manifests import ports, server
from tests.serve import onnx_models
from tests.serve.running_server import ask, connect, fetch, running
from tests.serve.under_load import INFER, LINEAR

METRIC = re.compile(r"\b(?:trimserve|nv)_[a-z_]+")


def model_name() -> str:
    return str(found(resolved(K8S / "config"), "ConfigMap", "model")["data"]["MODEL_NAME"])


def with_component(name: str, folder: Path) -> list[Document]:
    return resolved(written(name, folder))


def queries() -> dict[str, str]:
    """Where a query stands -> its PromQL."""
    (scaled,) = yaml.safe_load_all((K8S / "components/keda/scaled-object.yaml").read_text())
    (analysis,) = yaml.safe_load_all((K8S / "components/canary/analysis.yaml").read_text())
    (adapter,) = yaml.safe_load((K8S / "components/prometheus-adapter/rules.yaml").read_text())
    of_analysis = {
        f"analysis of {one['name']}": one["provider"]["prometheus"]["query"]
        for one in analysis["spec"]["metrics"]
    }
    (trigger,) = scaled["spec"]["triggers"]
    return {
        "keda": trigger["metadata"]["query"],
        "prometheus-adapter": adapter["seriesQuery"],
        **of_analysis,
    }


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_says_its_purpose_and_its_needs_on_its_first_line(name: str) -> None:
    first, *_ = (K8S / "components" / name / "kustomization.yaml").read_text().splitlines()
    assert re.match(r"# \w.{20,}\.$", first)
    if name not in ("models-pvc",):  # which needs what every cluster has
        assert "Needs " in first


def test_metrics_in_queries_and_rules_are_in_a_scrape_of_the_server(tmp_path: Path) -> None:
    model = onnx_models.linear(tmp_path / "linear.onnx")
    with running(tmp_path / "log", "--model", str(model)) as one:
        rest = connect(one.http_port)
        assert ask(rest, "POST", INFER, LINEAR).status == 200
        rest.close()
        scraped = fetch(one.metrics_port, "GET", "/metrics").body.decode()
    samples = set(re.findall(r"^(\w+)(?:\{| )", scraped, re.MULTILINE))
    rules = (K8S / "components/slo/prometheus-rule.yaml").read_text()
    for where, query in {**queries(), "rules": rules}.items():
        wanted = set(METRIC.findall(query))
        assert wanted, where
        assert wanted <= samples, where


def test_autoscalers_agree_and_leave_the_number_of_pods_to_themselves(tmp_path: Path) -> None:
    documents = with_component("keda", tmp_path)
    assert "replicas" not in found(documents, "Deployment", "serve")["spec"]
    scaled = found(documents, "ScaledObject", "serve")["spec"]
    (trigger,) = scaled["triggers"]
    by_adapter = with_component("prometheus-adapter", tmp_path)
    assert "replicas" not in found(by_adapter, "Deployment", "serve")["spec"]
    hpa = found(by_adapter, "HorizontalPodAutoscaler", "serve")["spec"]
    (metric,) = hpa["metrics"]
    (rule,) = yaml.safe_load((K8S / "components/prometheus-adapter/rules.yaml").read_text())
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    # Without a measured capacity there is no target, and nothing that could pass for one.
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "unset"}
    assert trigger["metadata"]["threshold"] == "unset"
    assert (hpa["minReplicas"], hpa["maxReplicas"], hpa["behavior"]) == (
        scaled["minReplicaCount"],
        scaled["maxReplicaCount"],
        scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
    )
    least, most = scaled["minReplicaCount"], scaled["maxReplicaCount"]
    assert 2 <= least <= scaled["fallback"]["replicas"] <= most
    for one in (hpa, scaled):
        named = one["scaleTargetRef"]
        assert found(documents, named["kind"], named["name"])["apiVersion"] == named["apiVersion"]


def test_autoscalers_query_gives_one_number_of_the_served_model() -> None:
    query = queries()["keda"]
    assert query.startswith("sum(")  # several are an error to KEDA
    assert query.endswith(")")
    assert f'{{model="{model_name()}"}}' in query


@pytest.mark.parametrize("kind", ["HTTPRoute", "GRPCRoute"])
@pytest.mark.parametrize("name", ["gateway", "canary"])
def test_routes_reach_the_server_and_are_let_in(kind: str, name: str, tmp_path: Path) -> None:
    documents = with_component(name, tmp_path)
    _, container = server(documents)
    spec = found(documents, kind, "serve")["spec"]
    (rule,) = spec["rules"]
    policy = found(documents, "NetworkPolicy", "serve-gateway")["spec"]
    labels = found(documents, "Deployment", "serve")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (entry,) = policy["ingress"]
    (source,) = entry["from"]
    (parent,) = spec["parentRefs"]
    assert source["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": parent["namespace"]
    }
    for backend in rule["backendRefs"]:
        service = found(documents, "Service", backend["name"])["spec"]
        assert service["selector"].items() <= labels.items()
        (port,) = [one for one in service["ports"] if one["port"] == backend["port"]]
        assert port["targetPort"] in {one["port"] for one in entry["ports"]}
        assert port["targetPort"] in ports(container)
        assert port["name"] == {"HTTPRoute": "http", "GRPCRoute": "grpc"}[kind]
    assert sum(one["weight"] for one in rule["backendRefs"]) == 100


def test_routes_name_what_the_server_has_and_nothing_that_controls_it(tmp_path: Path) -> None:
    documents = with_component("gateway", tmp_path)
    (grpc_rule,) = found(documents, "GRPCRoute", "serve")["spec"]["rules"]
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    asked = [one["method"] for one in grpc_rule["matches"]]
    assert {one["service"] for one in asked} == {service.full_name}
    named = {one["method"] for one in asked}
    assert named <= set(service.methods_by_name)
    assert not [one for one in named if one.startswith(("Repository", "Trace", "LogSettings"))]
    (http_rule,) = found(documents, "HTTPRoute", "serve")["spec"]["rules"]
    paths = [one["path"] for one in http_rule["matches"]]
    assert all(path["value"].startswith("/v2") for path in paths)
    below = [path["value"] for path in paths if path["type"] == "PathPrefix"]
    assert not any("/v2/repository/index".startswith(f"{path}/") for path in below)


def test_canary_takes_the_deployments_pods_and_steers_both_routes(tmp_path: Path) -> None:
    documents = with_component("canary", tmp_path)
    spec = found(documents, "Rollout", "serve")["spec"]
    deployment = found(documents, "Deployment", "serve")["spec"]
    assert spec["selector"] == deployment["selector"]
    assert spec["workloadRef"]["name"] == "serve"
    assert spec["progressDeadlineSeconds"] == deployment["progressDeadlineSeconds"]
    canary = spec["strategy"]["canary"]
    services = {canary["stableService"], canary["canaryService"]}
    (plugin,) = canary["trafficRouting"]["plugins"].values()
    for kind, told in (("HTTPRoute", "httpRoute"), ("GRPCRoute", "grpcRoute")):
        route = found(documents, kind, plugin[told])
        assert route["metadata"]["namespace"] == plugin["namespace"]
        (rule,) = route["spec"]["rules"]
        assert {one["name"] for one in rule["backendRefs"]} == services
    weights = [one["setWeight"] for one in canary["steps"] if "setWeight" in one]
    assert weights == sorted(weights)
    template = found(documents, "AnalysisTemplate", "slo")["spec"]
    judged = [one["analysis"] for one in canary["steps"] if "analysis" in one]
    assert len(judged) == len(weights)  # no share of requests goes unjudged
    for one in judged:
        assert one["templates"] == [{"templateName": "slo"}]
        assert {arg["name"] for arg in one["args"]} == {arg["name"] for arg in template["args"]}


@pytest.mark.parametrize("is_rendered", [False, True], ids=["as it is there", "as rendered"])
def test_canary_is_judged_by_the_expressions_and_limits_of_the_slo(
    is_rendered: bool, tmp_path: Path
) -> None:
    (there,) = yaml.safe_load_all((K8S / "components/canary/analysis.yaml").read_text())
    documents = with_component("canary", tmp_path) if is_rendered else [there]
    metrics = found(documents, "AnalysisTemplate", "slo")["spec"]
    own = f'model="{model_name()}",pod=~"serve-{{{{args.pods}}}}-.*"'
    whole = f'model="{model_name()}"'
    for one, metric in zip(
        indicators(read_slo(K8S / "config/slo.yaml"), model_name()),
        metrics["metrics"],
        strict=True,
    ):
        counted = one.total.replace("rate(", "increase(").replace("{window}", "5m")
        wanted = f"{one.over(300)} and on() {counted} > {MIN_REQUESTS}"
        query = metric["provider"]["prometheus"]["query"]
        assert query == wanted.replace(whole, own)
        limit = f"{one.budget:.6g}"
        assert metric["successCondition"] == f"len(result) > 0 && result[0] <= {limit}"
        assert metric["failureCondition"] == f"len(result) > 0 && result[0] > {limit}"


def test_store_in_the_cluster_is_reached_by_its_address(tmp_path: Path) -> None:
    documents = with_component("models-s3", tmp_path)
    _, container = server(documents)
    given = {one["name"]: one for one in container["env"]}
    matched = re.fullmatch(r"http://\w+\.(\w+)\.svc:(\d+)", given["AWS_ENDPOINT_URL"]["value"])
    assert matched
    (rule,) = found(documents, "NetworkPolicy", "serve-model-store")["spec"]["egress"]
    (to,) = rule["to"]
    assert to["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": matched[1]}
    assert rule["ports"] == [{"port": int(matched[2]), "protocol": "TCP"}]
    read = (ROOT / "serve/storage/remote.py").read_text()
    keys = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert keys <= set(given)
    assert all(key in read for key in keys)


@pytest.mark.parametrize("name", ["models-oci", "models-pvc"])
def test_models_on_a_volume_are_where_the_server_looks(name: str, tmp_path: Path) -> None:
    pod, container = server(with_component(name, tmp_path))
    given = {one["name"]: one.get("value") for one in container["env"]}
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "models"]
    assert mount == {"name": "models", "mountPath": given["REPOSITORY"], "readOnly": True}
    (volume,) = [one for one in pod["volumes"] if one["name"] == "models"]
    if name == "models-oci":
        assert re.fullmatch(r"[\w/.-]+@sha256:[0-9a-f]{64}", volume["image"]["reference"])


@pytest.mark.parametrize(
    ("name", "kind"), [("gpu", "nvidia.com/gpu"), ("mig", "nvidia.com/mig-1g.10gb")]
)
def test_accelerators_are_asked_for_once_with_an_image_that_uses_them(
    name: str, kind: str, tmp_path: Path
) -> None:
    pod, container = server(with_component(name, tmp_path))
    asked = {k: v for k, v in container["resources"]["limits"].items() if "nvidia" in k}
    assert asked == {kind: "1"}
    assert container["image"].startswith("trimserve-serve-gpu:")
    assert pod["tolerations"]


def kserve(folder: Path) -> tuple[Document, Document]:
    documents = with_component("kserve", folder)
    return (
        found(documents, "ServingRuntime", "trimserve")["spec"],
        found(documents, "InferenceService", "trimserve")["spec"]["predictor"],
    )


def test_kserves_model_is_of_a_format_and_protocol_of_the_runtime(tmp_path: Path) -> None:
    runtime, predictor = kserve(tmp_path)
    model = predictor["model"]
    formats = [{k: one[k] for k in ("name", "version")} for one in runtime["supportedModelFormats"]]
    assert model["modelFormat"] in formats
    assert model["protocolVersion"] in runtime["protocolVersions"]
    config = found(resolved(K8S / "config"), "ConfigMap", "model")["data"]
    assert model["storageUri"] == config["REPOSITORY"]


def test_kserves_container_is_the_servers(tmp_path: Path) -> None:
    runtime, predictor = kserve(tmp_path)
    (container,) = runtime["containers"]
    _, own = server(resolved(K8S / "base"))
    assert container["name"] == "kserve-container"  # the name by which KServe knows it
    for name in ("image", "imagePullPolicy", "resources"):
        assert container[name] == own[name]
    told = dict(one.removeprefix("--").partition("=")[::2] for one in container["args"][1:])
    theirs = dict(one.removeprefix("--").partition("=")[::2] for one in own["args"][1:])
    assert set(told) <= set(theirs)
    probes = [container[f"{one}Probe"]["httpGet"] for one in ("startup", "readiness", "liveness")]
    assert {one["port"] for one in probes} == {int(told["http-port"])}
    (port,) = container["ports"]
    assert port["containerPort"] == int(told["http-port"])
    drains_s = float(told["drain-delay-s"]) + float(told["drain-timeout-s"])
    assert predictor["terminationGracePeriodSeconds"] > drains_s
