"""Judgement: scores of variants on a split, kept in the store, and the bounds made of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from optimizer import judgement as judging
from optimizer.data.splits import Samples, Split
from optimizer.errors import SpecInvalid
from optimizer.evaluator import Evaluator
from optimizer.judgement import Judgement
from optimizer.spec import TaskSpec
from optimizer.store import Store, StoredVariant
from optimizer.tasks import Task, make_task
from optimizer.tasks.classification import Agreement, Top1
from optimizer.variant import OnnxModel
from serve.artifact import Step
from serve.machine import Machine
from serve.tensor import Array
from tests.optimizer import stored

BATCH = 8


@dataclass(frozen=True, eq=False)
class Rows:
    """A split in memory, whose inputs are logits."""

    values: Array
    labels: Array | None
    name: str = "validation"
    digest: str = "rows"

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: Sequence[int] | Array | None = None) -> Samples:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return Samples({"x": self.values[chosen]}, labels, "rows")


@dataclass(eq=False)
class Engines:
    """Stands for the evaluator: each variant gives its input times a factor, wrong in the samples
    that `wrong` names for it. `runs` are the variants that ran over a split."""

    store: Store
    factors: Mapping[str, float] = field(default_factory=dict)
    wrong: Mapping[str, Sequence[int]] = field(default_factory=dict)
    machine: Machine = stored.MACHINE
    runs: list[str] = field(default_factory=list)

    def outputs(
        self, variant: StoredVariant, split: Split
    ) -> Iterator[tuple[Samples, Mapping[str, Array]]]:
        self.runs.append(variant.id)
        for start in range(0, len(split), BATCH):
            indices = np.arange(start, min(start + BATCH, len(split)))
            samples = split.read(indices)
            logits = samples.inputs["x"] * np.float32(self.factors.get(variant.id, 1.0))
            is_wrong = np.isin(indices, list(self.wrong.get(variant.id, ())))
            logits = np.where(is_wrong[:, None], -logits, logits)
            yield samples, {"logits": logits, "negative": -logits}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def variant(name: str) -> StoredVariant:
    step = Step("compilation", "1", {}, 0)
    return StoredVariant(name, "p", step, "", OnnxModel(Path(), "model.onnx", name), 0.0)


BASE = variant("base")


def judge(engines: Engines, task: Task | None = None, confidence: float = 0.9) -> Judgement:
    return Judgement(cast(Evaluator, engines), task or Top1(), confidence, seed=0)


def one_hot(n: int, n_classes: int = 3) -> tuple[Array, Array]:
    """Logits that are right, and their labels."""
    labels = np.arange(n) % n_classes
    return np.eye(n_classes, dtype=np.float32)[labels], labels


def points(n: int) -> Array:
    return np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)


def test_scores_cover_every_sample_in_order_when_the_last_batch_is_short(store: Store) -> None:
    engines = Engines(store, wrong={"v": (0, 20)})
    found = judge(engines).scores(variant("v"), BASE, Rows(*one_hot(21)))
    assert np.flatnonzero(~found.judged).tolist() == [0, 20]
    assert len(found) == 21


def test_scores_are_measured_once_when_they_are_asked_for_by_two_studies(store: Store) -> None:
    split = Rows(*one_hot(21))
    first, again = Engines(store, wrong={"v": (3,)}), Engines(store)
    judgement = judge(first)
    qualities = [judgement.quality(variant("v"), BASE, split) for _ in range(2)]
    assert first.runs == ["v", "base"]
    assert judge(again).quality(variant("v"), BASE, split) == qualities[0] == qualities[1]
    assert again.runs == []


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((Rows(*one_hot(21), digest="more"), Top1(), BASE), id="of another split"),
        pytest.param((Rows(*one_hot(21)), Top1("negative"), BASE), id="of another output"),
        pytest.param((Rows(*one_hot(21)), Agreement(), BASE), id="by another measure"),
    ],
)
def test_scores_are_measured_anew_when_they_are(
    other: tuple[Rows, Task, StoredVariant], store: Store
) -> None:
    judge(Engines(store)).scores(variant("v"), BASE, Rows(*one_hot(21)))
    split, task, base = other
    engines = Engines(store)
    judge(engines, task).scores(variant("v"), base, split)
    assert "v" in engines.runs


def test_fidelity_is_measured_anew_when_it_is_to_another_base(store: Store) -> None:
    split = Rows(points(30), None)
    engines = Engines(store, factors={"other": -1.0})
    judgement = judge(engines, Agreement())
    assert judgement.scores(variant("v"), BASE, split).mean == 1.0
    assert judgement.scores(variant("v"), variant("other"), split).mean == 0.0


def test_scores_are_of_the_output_that_the_task_names(store: Store) -> None:
    scores = judge(Engines(store), Top1("negative")).scores(variant("v"), BASE, Rows(*one_hot(9)))
    assert scores.mean == 0.0


def test_scores_are_refused_when_the_model_has_no_such_output(store: Store) -> None:
    with pytest.raises(SpecInvalid, match="got 'lost', want an output of logits, negative"):
        judge(Engines(store), Top1("lost")).scores(variant("v"), BASE, Rows(*one_hot(9)))


def test_base_runs_once_when_many_variants_are_compared_with_its_answers(store: Store) -> None:
    split = Rows(points(30), None)
    engines = Engines(store, wrong={"v": (4,), "w": (5, 29)})
    judgement = judge(engines, Agreement())
    drops = [judgement.quality(variant(name), BASE, split).drop for name in ("v", "w")]
    assert drops == [pytest.approx(1 / 30), pytest.approx(2 / 30)]
    assert engines.runs.count("base") == 2  # for its outputs, and for its own scores


def test_base_is_wholly_faithful_to_itself(store: Store) -> None:
    quality = judge(Engines(store), Agreement()).quality(BASE, BASE, Rows(points(30), None))
    assert (quality.value, quality.drop, quality.guarantee) == (1.0, 0.0, "fidelity")


@pytest.mark.parametrize("has_labels", [True, False], ids=["with labels", "without"])
def test_scores_are_those_of_one_chunk_when_samples_are_compared_with_each_other(
    has_labels: bool, store: Store
) -> None:
    task = make_task(TaskSpec(kind="embedding"), has_labels)
    values = points(100)
    labels = (values[:, 0] > 0).astype(np.int64) if has_labels else None
    engines = Engines(store, factors={"v": -2.0})
    found = judge(engines, task).scores(variant("v"), BASE, Rows(values, labels))
    whole = task.scores({"logits": -2 * values}, labels, {"logits": values})
    np.testing.assert_array_equal(found.judged, whole.judged)


def test_outputs_are_refused_by_name_when_all_at_once_are_too_large(store: Store) -> None:
    class Endless(Engines):
        """Gives one array over and over, so that they take no memory here."""

        def outputs(
            self, variant: StoredVariant, split: Split
        ) -> Iterator[tuple[Samples, Mapping[str, Array]]]:
            large = np.broadcast_to(np.float32(0), (2**20, 2**7))
            for _ in range(1 + judging.MAX_WHOLE_BYTES // large.nbytes):
                yield split.read(), {"logits": large}

    task = make_task(TaskSpec(kind="embedding"), has_labels=False)
    with pytest.raises(SpecInvalid) as caught:
        judge(Endless(store), task).scores(variant("v"), BASE, Rows(points(4), None))
    assert str(caught.value) == (
        "data.validation: the outputs of its 4 samples take more than 2 GiB, which the task "
        "needs at once: want fewer, by rows"
    )


def test_bounds_among_all_are_wider_when_there_are_several_variants(store: Store) -> None:
    split = Rows(*one_hot(300))
    rng = np.random.default_rng(0)
    wrong = {f"v{i}": rng.choice(300, 12, replace=False).tolist() for i in range(5)}
    judgement = judge(Engines(store, wrong=wrong))
    variants = [variant(name) for name in wrong]

    together = judgement.bounds_among_all(variants, BASE, split)

    alone = {one.id: judgement.quality(one, BASE, split).drop_bound for one in variants}
    assert together.keys() == alone.keys()
    assert all(together[name] > alone[name] for name in alone)
    for one in variants:
        of_one = judgement.bounds_among_all([one], BASE, split)
        assert of_one == {one.id: pytest.approx(alone[one.id])}


def test_bounds_among_all_hold_at_once_as_often_as_they_say(store: Store) -> None:
    """Over many draws of samples from a population in which the drop is known."""
    n_held, n_draws, n, drop = 0, 100, 200, 0.1
    rng = np.random.default_rng(1)
    variants = [variant(f"v{i}") for i in range(4)]
    for draw in range(n_draws):
        wrong = {one.id: np.flatnonzero(rng.random(n) < drop).tolist() for one in variants}
        split = Rows(*one_hot(n), digest=str(draw))
        judgement = judge(Engines(store, wrong=wrong), confidence=0.9)
        bounds = judgement.bounds_among_all(variants, BASE, split)
        n_held += all(bound >= drop for bound in bounds.values())
    assert n_held / n_draws >= 0.85  # 0.9 less two standard errors of the share
