"""The preflight: what would make a study fail or prove nothing, said before it spends anything."""

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from loadtest.slo import Slo
from optimizer.architecture.halving import first_epochs
from optimizer.data.splits import DataSplits
from optimizer.errors import SpecInvalid
from optimizer.measuring import Measurer
from optimizer.model_source import read_signature
from optimizer.overheads import trivial_model
from optimizer.spec import Spec
from optimizer.tasks import Task
from optimizer.techniques import Technique
from optimizer.timing import Contender
from optimizer.variant import Kind
from serve.artifact import check_model_name
from serve.engines import EngineSpec

_ENERGY_SECONDS = 0.1


def refuse_contradictions(spec: Spec, repository: Path, measurer: Measurer) -> None:
    """Raises SpecInvalid for what the target can't do, and what the repository's place or name
    would refuse at the end."""
    cores, target = spec.target.cores, measurer.machine
    where = "this machine" if spec.target.agent is None else spec.target.agent
    if cores is not None and cores > target.cores:
        problem = (
            f"target.cores: got {cores}, want at most {target.cores}: variants are timed on {where}"
        )
        raise SpecInvalid(str(spec.source), [problem])
    check_model_name(spec.name)
    if repository.exists() and not repository.is_dir():
        raise NotADirectoryError(f"{repository}: want a directory for the repository")
    if spec.objective == "energy" and not _reads_energy(measurer):
        problem = (
            f"objective: energy can't be read on {where} (its processor's counters are missing, "
            "or this user may not read them), want cost, latency or size"
        )
        raise SpecInvalid(str(spec.source), [problem])
    problem = _too_few_epochs(spec)
    if problem:
        raise SpecInvalid(str(spec.source), [problem])


def refuse_lost_output(spec: Spec, task: Task) -> None:
    """Raises SpecInvalid where the task reads an output that the model hasn't."""
    task.wanted(read_signature(spec.model).output_names)


def why_left_out(
    techniques: Mapping[str, Technique], named: Collection[str], kind: Kind
) -> dict[str, str]:
    """Of the techniques that the spec's author has named, those that no recipe from a model of
    this kind can have, each with the reason."""
    kinds = {kind}
    for _ in Kind:
        kinds |= {one.traits.gives for one in techniques.values() if one.traits.accepts in kinds}
    return {
        name: f"it takes {one.traits.accepts} models, got {kind}"
        for name, one in techniques.items()
        if name in named and one.traits.accepts not in kinds
    }


def why_undecidable(spec: Spec, task: Task, splits: DataSplits, verify: bool) -> str:
    """Why no variant, however good, could be shown to keep the SLO; empty where one could."""
    too_few = _too_few_samples(spec, task, len(splits.validation))
    return too_few or (_too_few_requests(spec.slo) if verify else "")


def _too_few_epochs(spec: Spec) -> str:
    """Why the budget isn't enough for the first network of a search for an architecture."""
    given, budget = spec.techniques.architecture, spec.budget.training_epochs
    if given is None or budget is None:
        return ""
    is_shared = given.weights == "shared"
    wanted = given.epochs if is_shared else first_epochs(given.epochs)
    if budget >= wanted:
        return ""
    what = "the supernet" if is_shared else "one network of its first round"
    return (
        f"budget.training_epochs: got {budget:g}, want at least {wanted:g}: {what} takes as many "
        f"(techniques.architecture.epochs is {given.epochs:g})"
    )


def _reads_energy(measurer: Measurer) -> bool:
    """Asked by measuring a model that does next to nothing: only the target knows."""
    with tempfile.TemporaryDirectory(prefix="trimserve-energy-") as folder:
        (Path(folder) / "model.onnx").write_bytes(trivial_model(4))
        contender = Contender(Path(folder), EngineSpec("onnxruntime", "model.onnx"))
        batch = {"x": np.zeros((1, 4), np.float32)}
        return measurer.joules(contender, batch, _ENERGY_SECONDS) is not None


def _too_few_samples(spec: Spec, task: Task, n_samples: int) -> str:
    accuracy = spec.slo.accuracy
    if accuracy is None or accuracy.judged_by == "estimate":
        return ""
    n_wanted = task.min_samples(accuracy.max_drop, accuracy.confidence)
    if n_samples >= n_wanted:
        return ""
    drop = f"{accuracy.max_drop_points:g} points"
    return (
        f"data.validation has {n_samples} samples, but a drop of at most {drop} "
        f"can't be shown by a bound at {accuracy.confidence:.0%} with fewer than "
        f"{n_wanted}: give more, allow a larger drop, or set judged_by: estimate"
    )


def _too_few_requests(slo: Slo) -> str:
    """With several replicas it takes more: then the load test says so."""
    if slo.planned_requests() >= slo.min_requests():
        return ""
    return (
        f"workload.rate_per_s x window_s of the SLO are {slo.planned_requests():.4g} requests, but "
        f"a quantile of {slo.latency.quantile:g} can't be shown with fewer than "
        f"{slo.min_requests()}: want a longer window_s"
    )
