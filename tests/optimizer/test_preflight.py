"""The preflight: what a target can't do, asked of the target."""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest

from optimizer.architecture.options import ArchitectureSpec
from optimizer.errors import SpecInvalid
from optimizer.execution.setup import enabled_techniques
from optimizer.measuring import Batch
from optimizer.measuring.local import LocalMeasurer
from optimizer.preflight import refuse_contradictions, why_left_out
from optimizer.spec import Objective, Spec, Techniques, read_spec
from optimizer.timing import Contender
from optimizer.variant import Kind
from serve.engines import load_engine
from serve.machine import Machine
from tests.optimizer.tiny_study import write_study


@dataclass(frozen=True)
class Metered(LocalMeasurer):
    """A machine of two cores whose counters say so many joules, or nothing."""

    spent: float | None = None

    @cached_property
    def machine(self) -> Machine:
        return Machine("a processor", (), 2, "Linux", {})

    def joules(self, contender: Contender, batch: Batch, seconds: float) -> float | None:
        with closing(load_engine(contender.directory, contender.spec)) as engine:
            engine.run(batch)
        return self.spent


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return read_spec(write_study(tmp_path_factory.mktemp("study")))


@pytest.mark.parametrize(
    ("agent", "where"),
    [(None, "this machine"), ("http://target:8100", "http://target:8100")],
    ids=["here", "elsewhere"],
)
def test_energy_is_refused_when_the_target_does_not_say_it(
    agent: str | None, where: str, spec: Spec, tmp_path: Path
) -> None:
    target = spec.target.model_copy(update={"agent": agent})
    spec = replace(spec, objective="energy", target=target)
    with pytest.raises(SpecInvalid) as caught:
        refuse_contradictions(spec, tmp_path, Metered())
    assert str(caught.value) == (
        f"objective: energy can't be read on {where} (its processor's counters are missing, "
        "or this user may not read them), want cost, latency or size"
    )


@pytest.mark.parametrize(
    ("objective", "spent"),
    [
        pytest.param("energy", 0.25, id="the target says it"),
        pytest.param("cost", None, id="nobody asks for it"),
    ],
)
def test_study_passes_without_energy_s_counters_or_with_them_when(
    objective: Objective, spent: float | None, spec: Spec, tmp_path: Path
) -> None:
    refuse_contradictions(replace(spec, objective=objective), tmp_path, Metered(spent=spent))


def test_cores_are_refused_when_the_target_has_fewer(spec: Spec, tmp_path: Path) -> None:
    target = spec.target.model_copy(update={"cores": 3, "agent": "http://target:8100"})
    with pytest.raises(SpecInvalid) as caught:
        refuse_contradictions(replace(spec, target=target), tmp_path, Metered())
    assert str(caught.value) == (
        "target.cores: got 3, want at most 2: variants are timed on http://target:8100"
    )


def test_repository_is_refused_when_it_is_a_file(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(NotADirectoryError, match="want a directory for the repository"):
        refuse_contradictions(spec, tmp_path / "models", Metered())


@pytest.mark.parametrize(
    ("weights", "least", "what"),
    [("shared", 9.0, "the supernet"), ("own", 1.0, "one network of its first round")],
)
def test_budget_that_is_too_small_for_the_first_network_is_refused_with_what_it_takes(
    weights: str, least: float, what: str, spec: Spec, tmp_path: Path
) -> None:
    given = ArchitectureSpec.model_validate(
        {
            "space": {"kind": "vision", "stems": [4], "stages": [{"depths": [1], "widths": [4]}]},
            "weights": weights,
            "epochs": 9,
        }
    )
    techniques = spec.techniques.model_copy(update={"architecture": given})
    for epochs in (0.9 * least, least):
        budget = spec.budget.model_copy(update={"training_epochs": epochs})
        one = replace(spec, techniques=techniques, budget=budget)
        if epochs >= least:
            refuse_contradictions(one, tmp_path, Metered())
            continue
        with pytest.raises(SpecInvalid) as caught:
            refuse_contradictions(one, tmp_path, Metered())
        assert f"want at least {least:g}: {what} takes as many" in str(caught.value)


SEARCHED = ArchitectureSpec.model_validate(
    {"space": {"kind": "vision", "stems": [8], "stages": [{"depths": [1], "widths": [8]}]}}
)
WHY = "it takes torch models, got onnx"


@pytest.mark.parametrize(
    ("techniques", "kind", "left_out"),
    [
        pytest.param(Techniques(), Kind.ONNX, {}, id="nothing is named"),
        pytest.param(
            Techniques(include=("pruning", "quantization", "compilation")), Kind.ONNX,
            {"pruning": WHY}, id="one of those that are named takes torch models",
        ),
        pytest.param(
            Techniques(include=("pruning", "quantization", "compilation")), Kind.TORCH, {},
            id="the model is torch's",
        ),
        pytest.param(Techniques(architecture=SEARCHED), Kind.ONNX, {"architecture": WHY},
                     id="a search for another network is asked for"),
    ],
)  # fmt: skip
def test_techniques_are_left_out_with_the_reason_when(
    techniques: Techniques, kind: Kind, left_out: dict[str, str], spec: Spec
) -> None:
    enabled = enabled_techniques(replace(spec, techniques=techniques))
    assert why_left_out(enabled, techniques.named, kind) == left_out
