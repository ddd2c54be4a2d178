from pathlib import Path

import pytest

from loadtest.document import DocumentInvalid
from loadtest.slo import Slo, histogram_edges, read_slo

GOOD = """\
apiVersion: trimserve/v1
kind: SLO
name: resnet
latency:
  quantile: 0.99
  threshold_ms: 50
workload:
  rate_per_s: 200
"""


def read(folder: Path, text: str) -> Slo:
    path = folder / "slo.yaml"
    path.write_text(text, "utf-8")
    return read_slo(path)


def test_read_slo_fills_in_defaults_when_only_the_necessary_is_given(tmp_path: Path) -> None:
    slo = read(tmp_path, GOOD)
    assert slo.latency.threshold_s == 0.05
    assert slo.workload.arrivals == "poisson"
    assert slo.workload.encoding == "binary"
    assert slo.success_ratio == 0.999
    assert slo.planned_requests() == 6000


def test_read_slo_gives_the_same_when_read_from_its_own_dictionary(tmp_path: Path) -> None:
    slo = read(tmp_path, GOOD)
    assert Slo.model_validate(slo.to_dict()) == slo


@pytest.mark.parametrize(
    ("old", "new", "line", "messages"),
    [
        pytest.param(
            "  threshold_ms: 50",
            "  treshold_ms: 50",
            6,
            [
                "latency.treshold_ms",
                "did you mean 'threshold_ms'?",
                "latency.threshold_ms: missing",
            ],
            id="an unknown key names the nearest one",
        ),
        pytest.param(
            "  threshold_ms: 50",
            "  threshold_s: 0.05",
            6,
            ["latency.threshold_s: unknown key", "did you mean 'threshold_ms'?"],
            id="a key in another unit names the right one",
        ),
        pytest.param(
            "quantile: 0.99", "quantile: 99", 5, ["got 99", "did you mean 0.99?"], id="a percentage"
        ),
        pytest.param(
            "quantile: 0.99", "quantile: 1.0", 5, ["share above 0 and below 1"], id="a maximum"
        ),
        pytest.param(
            "threshold_ms: 50", "threshold_ms: 0", 6, ["greater than 0"], id="no time at all"
        ),
        pytest.param(
            "threshold_ms: 50", "threshold_ms: '50'", 6, ["got '50'"], id="a number as a text"
        ),
        pytest.param("threshold_ms: 50", "threshold_ms: .nan", 6, ["finite"], id="not a number"),
        pytest.param(
            "name: resnet", "name: ResNet 50", 3, ["got 'ResNet 50'", "pattern"], id="a bad name"
        ),
        pytest.param(
            "kind: SLO", "kind: SLO\nkind: SLO", 3, ["kind: given twice"], id="a repeated key"
        ),
        pytest.param(
            "trimserve/v1", "trimserve/v2", 1, ["got 'trimserve/v2'"], id="another version"
        ),
        pytest.param(
            "rate_per_s: 200",
            "rate_per_s: 200\n  input_lengths: {min: 8, max: 4}",
            9,
            ["workload.input_lengths.max", "at least min (8)"],
            id="lengths upside down",
        ),
        pytest.param(
            "rate_per_s: 200",
            "rate_per_s: 200\nsuccess_ratio: 99.9",
            9,
            ["did you mean 0.999?"],
            id="a success percentage",
        ),
    ],
)
def test_read_slo_names_line_and_remedy_when_a_value_is_wrong(
    tmp_path: Path, old: str, new: str, line: int, messages: list[str]
) -> None:
    assert old in GOOD
    with pytest.raises(DocumentInvalid) as caught:
        read(tmp_path, GOOD.replace(old, new))
    text = str(caught.value)
    assert f"slo.yaml:{line}: " in text
    for message in messages:
        assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "slo.yaml: the file is empty, want a mapping", id="an empty file"),
        pytest.param(b"# only\n", "slo.yaml: the file is empty", id="comments alone"),
        pytest.param(b"- a\n- b\n", "want a mapping", id="a list"),
        pytest.param(b"a: [1\n", "not valid YAML", id="an open bracket"),
        pytest.param(b"a: \xff\n", "not UTF-8", id="another encoding"),
        pytest.param(b"#" * 1_000_001, "want a smaller document", id="a huge file"),
        pytest.param(b"a: !!python/object:os.system {}\n", "not valid YAML", id="a Python object"),
    ],
)
def test_read_slo_refuses_a_document_when_it_is_no_slo(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "slo.yaml"
    path.write_bytes(content)
    with pytest.raises(DocumentInvalid, match=message):
        read_slo(path)


def test_read_slo_names_the_path_when_the_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DocumentInvalid, match=r"absent\.yaml: No such file"):
        read_slo(tmp_path / "absent.yaml")


@pytest.mark.parametrize("threshold_s", [0.0005, 0.05, 1 / 3, 1.0, 600.0])
def test_histogram_edges_hold_the_threshold_when_it_is_any(threshold_s: float) -> None:
    edges = histogram_edges(threshold_s)
    assert threshold_s in edges
    assert list(edges) == sorted(set(edges))
    assert edges[-1] >= 10
