"""Tasks: what they score, and what they say of a variant against its base."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.spec import TaskSpec
from optimizer.tasks import Scores, concatenated, make_task
from optimizer.tasks.classification import Agreement, Top1
from optimizer.tasks.custom import CustomMetric
from optimizer.tasks.embedding import NearestNeighbour, RankCorrelation
from optimizer.tasks.similarity import N_ANCHORS


def booleans(*values: int) -> Scores:
    return Scores(np.array(values, dtype=np.bool_))


def shares(values: Any) -> Scores:
    return Scores(np.asarray(values, dtype=np.float32))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- scores


@pytest.mark.parametrize("n", [1, 7, 8, 9])
def test_scores_survive_json(n: int) -> None:
    rng = np.random.default_rng(n)
    kl = np.append(rng.random(n - 1), np.nan).astype(np.float32)
    right = Scores(rng.random(n) < 0.5, {"kl": kl})
    again = Scores.from_dict(json.loads(json.dumps(right.to_dict())))
    assert again.judged.tolist() == right.judged.tolist()
    np.testing.assert_array_equal(again.figures["kl"], kl)
    real = shares(rng.random(n))
    again = Scores.from_dict(json.loads(json.dumps(real.to_dict())))
    assert again.judged.dtype == np.float32
    assert again.judged.tolist() == real.judged.tolist()


def test_scores_of_chunks_become_those_of_the_whole() -> None:
    logits, labels = normal(10, 4), np.arange(10) % 4
    task = Top1()
    whole = task.scores({"y": logits}, labels, None)
    parts = [
        task.scores({"y": logits[rows]}, labels[rows], None)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    assert concatenated(parts).judged.tolist() == whole.judged.tolist()


def test_figures_leave_out_samples_that_have_none() -> None:
    figures = {"kl": np.array([1, np.nan, 3], np.float32), "cosine": np.full(3, np.nan, np.float32)}
    assert Scores(np.ones(3, np.bool_), figures).mean_figures() == {"kl": 2.0}


# --- classification


def test_top1_counts_nan_as_wrong_and_a_tie_as_the_lower_class() -> None:
    logits = np.array([[np.nan, 1, 0], [1, 1, 0], [0, 1, 1]], dtype=np.float32)
    found = Top1().scores({"logits": logits}, np.array([0, 0, 2]), None)
    assert found.judged.tolist() == [False, True, False]


def test_top1_is_refused_when_the_output_has_another_shape() -> None:
    message = r"'y' is float32 \[2, 3, 4\], want numbers \[n, class\]"
    with pytest.raises(SpecInvalid, match=message):
        Top1().scores({"y": normal(2, 3, 4)}, np.zeros(2, np.int64), None)


def test_top1_has_no_drop_but_a_bound_when_nothing_differs() -> None:
    right = booleans(*[1] * 100)
    found = Top1().quality(right, right, 0.95, "validation", "digest")
    assert found.drop == 0.0
    assert found.drop_lower == -found.drop_upper
    assert 0 < found.drop_bound < found.drop_upper
    assert (found.metric, found.guarantee, found.n_samples) == ("top1", "labels", 100)


def test_top1_is_mirrored_when_base_and_variant_change_places() -> None:
    rng = np.random.default_rng(0)
    one, other = Scores(rng.random(400) < 0.9), Scores(rng.random(400) < 0.8)
    loss = Top1().quality(other, one, 0.95, "validation", "digest")
    gain = Top1().quality(one, other, 0.95, "validation", "digest")
    assert loss.drop == -gain.drop
    assert loss.drop_lower == pytest.approx(-gain.drop_upper)
    assert loss.drop_lower < loss.drop < loss.drop_bound < loss.drop_upper


def test_agreement_bounds_the_drop_of_accuracy_whatever_the_labels_are() -> None:
    base, variant = normal(500, 5), normal(500, 5) + normal(500, 5, seed=1) / 2
    task = Agreement()
    scores = task.scores({"y": variant}, None, {"y": base})
    found = task.quality(scores, scores, 0.95, "validation", "digest")
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(5, size=500)
        drop = np.mean(base.argmax(1) == labels) - np.mean(variant.argmax(1) == labels)
        assert abs(drop) <= found.drop
    assert found.drop == pytest.approx(1 - found.value)
    assert found.drop_lower < found.drop < found.drop_bound < found.drop_upper
    assert found.guarantee == "fidelity"


def test_agreement_gives_the_divergence_of_the_softmax_in_nats() -> None:
    base, variant = normal(50, 7), 3 * normal(50, 7, seed=1)
    found = Agreement().scores({"y": variant}, None, {"y": base})
    p, q = log_softmax(base, axis=1), log_softmax(variant, axis=1)
    np.testing.assert_allclose(
        found.figures["kl"], (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-4, atol=1e-6
    )


def test_agreement_has_no_divergence_when_variant_and_base_are_the_same() -> None:
    logits = 1000 * normal(50, 7)
    found = Agreement().scores({"y": logits}, None, {"y": logits})
    assert found.mean == 1.0
    assert found.mean_figures() == {"kl": 0.0}


def test_agreement_counts_nan_as_disagreement_and_leaves_it_out_of_the_divergence() -> None:
    base = normal(3, 4)
    variant = base.copy()
    variant[1, 2] = np.nan
    found = Agreement().scores({"y": variant}, None, {"y": base})
    assert found.judged.tolist() == [True, False, True]
    assert found.mean_figures() == {"kl": 0.0}


def test_agreement_can_pass_from_just_as_many_samples_as_it_says() -> None:
    task = Agreement()
    n = task.min_samples(0.01, 0.95)
    assert n == 299
    bounds = [
        task.quality(one, one, 0.95, "validation", "d").drop_bound
        for one in (booleans(*[1] * n), booleans(*[1] * (n - 1)))
    ]
    assert bounds[0] <= 0.01 < bounds[1]


# --- embedding


def spearman(base: np.ndarray, variant: np.ndarray) -> list[float]:
    """By scipy, a sample at a time."""
    found = []
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (base, variant)]
    for sample in range(len(base)):
        others = np.arange(len(base)) != sample
        left, right = (one[others] @ one[sample] for one in unit)
        found.append(stats.spearmanr(left, right).statistic)
    return found


def test_rank_correlation_is_spearmans_of_the_similarities_to_the_others() -> None:
    base, variant = normal(40, 6).astype(np.float64), normal(40, 6).astype(np.float64)
    variant += normal(40, 6, seed=1)
    found = RankCorrelation().scores({"y": variant}, None, {"y": base})
    np.testing.assert_allclose(found.judged, np.maximum(spearman(base, variant), 0), atol=1e-6)


def test_rank_correlation_is_one_when_a_variant_rotates_and_scales_but_its_cosine_is_not() -> None:
    base = normal(100, 6).astype(np.float64)
    rotation = np.linalg.qr(normal(6, 6, seed=1))[0]
    found = RankCorrelation().scores({"y": 3 * base @ rotation}, None, {"y": base})
    assert found.mean == pytest.approx(1.0, abs=1e-6)
    assert found.mean_figures()["cosine"] < 0.5


def test_rank_correlation_is_low_when_a_common_part_hides_what_is_lost() -> None:
    common = np.array([100.0, 0, 0, 0])
    base, other = common + normal(100, 4), common + normal(100, 4, seed=1)
    found = RankCorrelation().scores({"y": other}, None, {"y": base})
    assert found.mean_figures()["cosine"] > 0.99
    assert found.mean < 0.7


def test_rank_correlation_needs_as_many_axes_only_for_the_cosine() -> None:
    base = np.concatenate([normal(50, 3), np.zeros((50, 2), np.float32)], axis=1)
    found = RankCorrelation().scores({"y": base[:, :3]}, None, {"y": base})
    assert found.mean == pytest.approx(1.0, abs=1e-6)
    assert found.mean_figures() == {}


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_rank_correlation_falls_only_where_a_variant_is_broken(broken: float) -> None:
    base = normal(60, 5)
    variant = base.copy()
    variant[7] = broken
    found = RankCorrelation().scores({"y": variant}, None, {"y": base})
    assert found.judged[7] == 0.0
    assert np.delete(found.judged, 7).min() > 0.85


def test_rank_correlation_is_zero_when_a_variant_gives_all_the_same() -> None:
    found = RankCorrelation().scores({"y": np.ones((30, 4))}, None, {"y": normal(30, 4)})
    assert found.mean == 0.0


def test_rank_correlation_uses_the_same_anchors_each_time_when_there_are_many() -> None:
    n = 2 * N_ANCHORS
    base, variant = normal(n, 8), normal(n, 8) + normal(n, 8, seed=1) / 4
    task = RankCorrelation()
    one = task.scores({"y": variant}, None, {"y": base})
    again = task.scores({"y": variant}, None, {"y": base})
    np.testing.assert_array_equal(one.judged, again.judged)
    exact = spearman(base[:50], variant[:50])
    assert one.judged[:50].mean() == pytest.approx(np.mean(exact), abs=0.02)


def test_rank_correlation_has_a_bound_above_its_drop_when_every_score_is_equal() -> None:
    same = shares(np.ones(400))
    found = RankCorrelation().quality(same, same, 0.95, "validation", "digest")
    assert (found.value, found.drop) == (1.0, 0.0)
    assert found.drop_lower <= 0.0 < found.drop_bound < found.drop_upper < 0.02
    assert found.guarantee == "fidelity"


def test_embedding_is_refused_when_a_split_has_two_samples() -> None:
    with pytest.raises(SpecInvalid, match="got a split of 2 samples, want at least 3"):
        RankCorrelation().scores({"y": normal(2, 4)}, None, {"y": normal(2, 4)})


def test_nearest_neighbour_is_right_when_the_nearest_other_has_the_label() -> None:
    angles = np.radians([0, 1, 90, 91, 180, 45.4])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [9], [1], [9], [1], [1]]
    labels = np.array([0, 0, 1, 1, 1, 0])
    found = NearestNeighbour().scores({"y": points}, labels, {"y": points})
    assert found.judged.tolist() == [True, True, True, True, True, True]
    labels[4] = 0
    found = NearestNeighbour().scores({"y": points}, labels, {"y": points})
    assert found.judged.tolist() == [True, True, True, True, False, True]
    assert found.mean_figures() == pytest.approx({"cosine": 1.0, "rank_correlation": 1.0})


def test_nearest_neighbour_equals_the_slow_search_when_there_are_many() -> None:
    points, labels = normal(600, 5).astype(np.float64), np.arange(600) % 3
    found = NearestNeighbour().scores({"y": points}, labels, {"y": points})
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -2)
    assert found.judged.tolist() == (labels[similar.argmax(axis=1)] == labels).tolist()


def test_nearest_neighbour_is_wrong_for_nan_and_nobody_elses_neighbour_is_nan() -> None:
    points = np.array([[1, 0], [1, 0.1], [np.nan, 0], [0, 1], [0.1, 1]])
    labels = np.array([0, 0, 0, 1, 1])
    found = NearestNeighbour().scores({"y": points}, labels, {"y": np.nan_to_num(points)})
    assert found.judged.tolist() == [True, True, False, True, True]
    assert np.isnan(found.figures["cosine"]).tolist() == [False, False, True, False, False]


def test_nearest_neighbour_is_judged_in_pairs_against_the_base() -> None:
    points, labels = normal(300, 5), np.arange(300) % 2
    task = NearestNeighbour()
    base = task.scores({"y": points}, labels, {"y": points})
    found = task.quality(base, base, 0.95, "test", "digest")
    assert (found.drop, found.guarantee, found.metric) == (0.0, "labels", "nearest_neighbour")


# --- metrics of the user's

METRICS = """
import numpy as np

def error(outputs, labels):
    return 10 - np.abs(outputs["y"][:, 0] - labels)

def is_positive(outputs, labels):
    assert labels is None
    return outputs["y"][:, 0] > 0

def both(outputs, labels):
    return [float(sorted(outputs) == ["y", "z"])] * len(outputs["z"])

def raises(outputs, labels):
    raise KeyError("no such output")

def short(outputs, labels):
    return np.ones(len(outputs["y"]) - 1)

def words(outputs, labels):
    return ["good"] * len(outputs["y"])

def high(outputs, labels):
    return np.where(np.arange(len(outputs["y"])) == 2, 1.5, 1.0)

def broken(outputs, labels):
    return np.full(len(outputs["y"]), np.nan)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(METRICS)
    return tmp_path


def own(folder: Path, function: str, **fields: Any) -> CustomMetric:
    settings = {"output": None, "range": (0.0, 1.0), "has_labels": False} | fields
    return CustomMetric(Importable("own", function, folder), **settings)


def test_custom_scores_are_shares_of_their_range(folder: Path) -> None:
    task = own(folder, "error", range=(0.0, 10.0), has_labels=True)
    found = task.scores({"y": np.array([[1.0], [5.0]])}, np.array([1, 0]), None)
    assert found.judged.tolist() == [1.0, 0.5]
    base = task.scores({"y": np.array([[1.0], [0.0]])}, np.array([1, 0]), None)
    quality = task.quality(found, base, 0.95, "validation", "digest")
    assert (quality.metric, quality.guarantee) == ("own:error", "labels")
    assert (quality.value, quality.drop) == (0.75, 0.25)
    assert quality.drop < quality.drop_bound <= quality.drop_upper


def test_custom_booleans_are_right_or_wrong_and_wrong_for_nan(folder: Path) -> None:
    task = own(folder, "is_positive")
    found = task.scores({"y": np.array([[1.0, 0], [-1.0, 0], [1.0, np.nan]])}, None, None)
    assert found.judged.dtype == np.bool_
    assert found.judged.tolist() == [True, False, False]
    assert task.quality(found, found, 0.95, "validation", "digest").guarantee == "metric"


def test_custom_metric_gets_every_output_unless_one_is_named(folder: Path) -> None:
    outputs = {"y": normal(3, 2), "z": normal(3, 4)}
    assert own(folder, "both").scores(outputs, None, None).mean == 1.0
    assert own(folder, "both", output="z").scores(outputs, None, None).mean == 0.0
    assert own(folder, "both", output="z").wanted(["y", "z"]) == ("z",)


def test_custom_scores_are_the_lowest_where_outputs_are_nan(folder: Path) -> None:
    found = own(folder, "broken").scores({"y": np.full((3, 1), np.nan)}, None, None)
    assert found.judged.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "own:raises failed: KeyError: 'no such output'"),
        ("missing", "own:missing failed: AttributeError"),
        ("short", "own:short returned float64 [3] for 4 samples, want numbers [4]"),
        ("words", "own:words returned <U4 [4] for 4 samples, want numbers [4]"),
        ("high", "own:high returned 1.5 for sample 2 of 4, want 0 to 1: correct it, or set"),
        ("broken", "own:broken returned nan for sample 0 of 4, want 0 to 1"),
    ],
)
def test_custom_metric_is_refused_by_name_when_it(
    folder: Path, function: str, message: str
) -> None:
    with pytest.raises(SpecInvalid) as caught:
        own(folder, function).scores({"y": normal(4, 2)}, None, None)
    assert str(caught.value).startswith(f"task.metric: {message}")


def test_custom_identity_changes_with_the_source_of_the_metric(folder: Path) -> None:
    before = dict(own(folder, "error").identity)
    (folder / "own.py").write_text(METRICS + "\n# another\n")
    assert own(folder, "error").identity != before


# --- every task


@pytest.mark.parametrize(
    ("kind", "has_labels", "metric", "needs"),
    [
        ("classification", True, "top1", (False, False)),
        ("classification", False, "agreement", (True, False)),
        ("embedding", True, "nearest_neighbour", (True, True)),
        ("embedding", False, "rank_correlation", (True, True)),
        ("custom", False, "own:is_positive", (False, False)),
    ],
)
def test_task_is_made_of_spec_and_labels(
    folder: Path, kind: str, has_labels: bool, metric: str, needs: tuple[bool, bool]
) -> None:
    fields: dict[str, Any] = {"kind": kind, "output": "y"}
    if kind == "custom":
        fields["metric"] = Importable("own", "is_positive", folder)
    task = make_task(TaskSpec.model_validate(fields), has_labels)
    assert task.metric == metric
    assert (task.needs_reference, task.needs_whole_split) == needs
    assert task.wanted(["x", "y"]) == ("y",)
    assert task.identity["output"] == "y"


@pytest.mark.parametrize("task", [Top1(), Agreement(), NearestNeighbour(), RankCorrelation()])
def test_task_says_a_drop_whose_mean_is_that_of_the_quality(
    task: Top1 | Agreement | NearestNeighbour | RankCorrelation,
) -> None:
    labels = np.arange(50) % 3
    base, variant = normal(50, 3), normal(50, 3) + normal(50, 3, seed=1)
    scored = task.scores({"y": variant}, labels, {"y": base})
    own_scores = task.scores({"y": base}, labels, {"y": base})
    found = task.quality(scored, own_scores, 0.9, "validation", "digest")
    assert task.differences(scored, own_scores).mean() == pytest.approx(found.drop)
    assert found.drop_lower <= found.drop <= found.drop_bound <= found.drop_upper
    assert task.quality(own_scores, own_scores, 0.9, "validation", "d").drop == pytest.approx(
        0.0, abs=1e-9
    )


@pytest.mark.parametrize("task", [Top1(), Agreement(), NearestNeighbour(), RankCorrelation()])
@pytest.mark.parametrize("max_drop", [0.01, 0.1])
def test_task_passes_with_its_fewest_samples_and_not_with_fewer(
    task: Top1 | Agreement | NearestNeighbour | RankCorrelation, max_drop: float
) -> None:
    n = task.min_samples(max_drop, 0.95)
    perfect = shares(np.ones(n)) if task.metric == "rank_correlation" else booleans(*[1] * n)
    fewer = Scores(perfect.judged[:-1])
    assert task.quality(perfect, perfect, 0.95, "v", "d").drop_bound <= max_drop * (1 + 1e-9)
    assert task.quality(fewer, fewer, 0.95, "v", "d").drop_bound > max_drop


def test_scores_are_refused_when_variant_and_base_differ_in_kind() -> None:
    with pytest.raises(ValueError, match="want equal"):
        Top1().quality(booleans(1, 0), shares([1, 0]), 0.95, "validation", "digest")
