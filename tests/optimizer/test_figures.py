"""The charts of a study's times."""

from dataclasses import replace

import pytest

from optimizer.figures import latency_by_batch_size, predicted_against_measured
from tests.optimizer.study_result import met


def test_predictions_are_drawn_where_there_is_a_measurement() -> None:
    unloaded = tuple(replace(row, verification=None) for row in met().variants)

    figure = predicted_against_measured(met())

    assert figure is not None
    assert figure["data"][0]["y"] == [pytest.approx(31.5), pytest.approx(13.4)]
    assert predicted_against_measured(replace(met(), variants=unloaded)) is None


def test_latency_by_batch_size_begins_with_the_chosen_and_the_baseline() -> None:
    names = [trace["name"] for trace in latency_by_batch_size(met())["data"] if "name" in trace]

    assert names[:2] == ["openvino int8 (percentile) · 1×2", "onnxruntime fp32 · 1×2"]
