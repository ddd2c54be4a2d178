"""Reports that correct the model of the overheads, made from simulated servers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.capacity import predict
from optimizer.evidence import (
    Evidence,
    EvidenceInvalid,
    check_subject,
    corrected,
    read_evidence,
)
from optimizer.simulation import Replica, Spread
from serve.artifact import Batching, Manifest, Profile, ServiceTime
from serve.engines import EngineSpec, Signature
from serve.machine import Machine
from serve.tensor import TensorSpec
from tests.optimizer.replicas import affine, slo, times

MACHINE = Machine("a processor", ("avx2",), 2, "Linux", {"onnxruntime": "1"})


def report(**changes: Any) -> dict[str, Any]:
    return {
        "verdict": "violated",
        "reasons": [{"message": "p99 was 31 ms"}],
        "requests": {"n": 6_000, "n_ok": 6_000, "achieved_per_s": 199.9, "goodput_per_s": 190.0},
        "latency": [
            {"quantile": 0.5, "latency_s": 0.005},
            {"quantile": 0.99, "latency_s": 0.031},
        ],
        "slo": slo().to_dict(),
        "run": {"model": "digits", "version": ""},
        **changes,
    }


def written(folder: Path, document: object) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(document))
    return path


def observed(server: Replica, rate_per_s: float, seed: int = 7) -> Evidence:
    """What a load test of the simulated server would report."""
    blank = Evidence("report.json", "digits", "", rate_per_s, 5_000, 0.99, 1.0, 1.0, 0.02)
    seen = predict(server, blank.load, n_requests=blank.n_requests, seed=seed)
    return replace(blank, p50_s=seen.p50_s, latency_s=seen.slo_latency_s)


@pytest.mark.full  # takes a while
@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize(
    ("slower", "wider"),
    [
        pytest.param(2.0, 1.0, id="the front end costs twice as much"),
        pytest.param(1.0, 3.0, id="cores and the network keep it waiting for longer"),
        pytest.param(1.5, 2.0, id="both"),
    ],
)
def test_corrected_model_predicts_a_slower_server(
    share: float, slower: float, wider: float
) -> None:
    modelled = Replica(times(affine(0.002, 0.0005), spread=1.3), 1, 8)
    costs = modelled.front_end
    way = Spread(tuple(slower * seconds for seconds in costs.way.seconds)).stretched(wider)
    wake = Spread(tuple(wider * seconds for seconds in costs.wake.seconds))
    real = replace(
        costs,
        receive_s=slower * costs.receive_s,
        answer_s=slower * costs.answer_s,
        wakeup_s=slower * costs.wakeup_s,
        batch_s=slower * costs.batch_s,
        way=way,
        wake=wake,
    )
    server = replace(modelled, front_end=real)
    evidence = observed(server, share * server.highest_throughput(1))

    found = corrected(modelled, evidence)

    runs = [
        predict(replace(modelled, front_end=found), evidence.load, n_requests=5_000, seed=seed)
        for seed in range(5)
    ]
    # Near saturation the 99th percentile differs by tens of percent from run to run.
    assert np.mean([one.p50_s for one in runs]) == pytest.approx(evidence.p50_s, rel=0.1)
    assert np.mean([one.slo_latency_s for one in runs]) == pytest.approx(
        evidence.latency_s, rel=0.1 if share < 0.5 else 0.3
    )
    assert found.stretch == costs.stretch


def test_corrected_model_is_the_old_one_when_the_evidence_agrees() -> None:
    modelled = Replica(times(affine(0.002, 0.0005), spread=1.3), 1, 8)

    assert corrected(modelled, observed(modelled, 150, seed=0)) == modelled.front_end


@pytest.mark.full  # dozens of simulations
def test_correction_refuses_what_no_front_end_explains() -> None:
    modelled = Replica(times(affine(0.002, 0.0005)), 1, 8)
    evidence = replace(observed(modelled, 100), p50_s=0.5, latency_s=0.6)

    with pytest.raises(EvidenceInvalid, match=r"got 500 ms at 0.5 and 600 ms at 0.99"):
        corrected(modelled, evidence)


def test_evidence_is_what_the_report_says(tmp_path: Path) -> None:
    evidence = read_evidence(written(tmp_path, report()))

    assert (evidence.p50_s, evidence.latency_s, evidence.quantile) == (0.005, 0.031, 0.99)
    assert (evidence.rate_per_s, evidence.n_requests, evidence.threshold_s) == (200, 6_000, 0.02)
    assert (evidence.model, evidence.version) == ("digits", "")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        pytest.param([1, 2], "want the JSON report of trimserve loadtest", id="no report"),
        pytest.param(report(verdict="inconclusive"), "verdict: got inconclusive", id="undecided"),
        pytest.param(
            report(requests={"n": 9, "n_ok": 9, "achieved_per_s": 90.0, "goodput_per_s": 9.0}),
            "requests.achieved_per_s: got 90, want the SLO's rate of 200",
            id="too slow a generator",
        ),
        pytest.param(report(latency=[]), "latency: got None s at 0.5", id="no latencies"),
        pytest.param(
            report(
                latency=[
                    {"quantile": 0.5, "latency_s": 0.1},
                    {"quantile": 0.99, "latency_s": None},
                ]
            ),
            "None s at 0.99",
            id="a quantile without an answer",
        ),
        pytest.param(report(run={}), "run.model", id="no model"),
    ],
)
def test_report_is_refused_when_it_says_nothing(
    document: object, said: str, tmp_path: Path
) -> None:
    with pytest.raises(EvidenceInvalid) as caught:
        read_evidence(written(tmp_path, document))

    assert said in str(caught.value)


def test_report_is_refused_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EvidenceInvalid, match="No such file"):
        read_evidence(tmp_path / "report.json")


def manifest(machine: Machine | None = MACHINE) -> Manifest:
    tensor = TensorSpec("image", "FP32", (-1, 4))
    profile = None if machine is None else Profile((ServiceTime(1, 0.1, 0.2, 9),), machine)
    return Manifest(
        "digits",
        "3",
        Signature((tensor,), (tensor,)),
        EngineSpec("onnxruntime", "model.onnx"),
        Batching(8),
        profile=profile,
    )


@pytest.mark.parametrize(
    ("changes", "of", "said"),
    [
        pytest.param({"model": "letters"}, MACHINE, "run.model: got 'letters'", id="model"),
        pytest.param({"version": "2"}, MACHINE, "run.version: got '2', want '3'", id="version"),
        pytest.param({}, replace(MACHINE, cores=8), "cores: 2 here, 8 there", id="machine"),
        pytest.param({}, None, "no profile", id="no machine"),
    ],
)
def test_evidence_is_refused_when_it_is_of_another(
    changes: dict[str, Any], of: Machine | None, said: str
) -> None:
    evidence = replace(Evidence("r.json", "digits", "3", 1, 1, 0.99, 0.1, 0.1, 0.1), **changes)

    with pytest.raises(EvidenceInvalid) as caught:
        check_subject(evidence, manifest(of), MACHINE)

    assert said in str(caught.value)


def test_evidence_applies_when_model_version_and_machine_are_the_same() -> None:
    for version in ("", "3"):
        evidence = Evidence("r.json", "digits", version, 1, 1, 0.99, 0.1, 0.1, 0.1)
        check_subject(evidence, manifest(), MACHINE)
