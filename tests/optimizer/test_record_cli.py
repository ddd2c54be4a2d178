"""The commands `trimserve explain` and `trimserve compare`."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import trimserve
from optimizer import comparison, explain
from optimizer.comparison import compared, paired_difference, print_comparison
from optimizer.explain import print_explanation
from optimizer.subject import SubjectNotFound, find_subject
from tests.optimizer.records import BASE_ID, DATA, FakeRecords, publish, two_variants
from tests.optimizer.study_result import met

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def printed(show: Callable[[Console], None], width: int = 100) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width))
    return file.getvalue()


# --- finding


def test_newest_version_is_found_when_none_is_named(repository: Path) -> None:
    for version in ("1", "2", "10"):
        publish(repository, version)
    (repository / "digits" / "11").mkdir()  # an interrupted write

    assert find_subject("digits", repository, None, "s").name == "digits/10"
    assert find_subject("digits/2", repository, None, "s").name == "digits/2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("digits/7", "digits has no version '7' in .*; there are: 1", id="a version"),
        pytest.param("digit", "no model 'digit' in .*; there are: digits", id="a model"),
        pytest.param("digit/1", "no model 'digit' in .*; there are: digits", id="its version"),
        pytest.param("../models/digits", "no model '..'", id="a path"),
        pytest.param("cccc", r"no variant's id starts with 'cccc' in here.*--store", id="an id"),
        pytest.param("aaa", "no model 'aaa'", id="too few digits"),
        pytest.param("aab", "no model 'aab'", id="too few digits of an id that is there"),
    ],
)
def test_error_names_what_there_is_when_nothing_has_the_name(
    name: str, message: str, repository: Path, tmp_path: Path
) -> None:
    publish(repository, "1")

    with pytest.raises(SubjectNotFound, match=message):
        find_subject(name, repository, two_variants(tmp_path), "here")


def test_error_shows_the_ids_when_a_prefix_is_not_unique(tmp_path: Path) -> None:
    records = two_variants(tmp_path)
    longer = {one.replace("aabb", "aaaab", 1): v for one, v in records.variants.items()}

    with pytest.raises(SubjectNotFound, match="start of 2 ids in here, want more digits: aaaa"):
        find_subject("aaaa", tmp_path, FakeRecords(longer), "here")


def test_error_says_how_to_name_the_store_when_there_is_none(repository: Path) -> None:
    publish(repository, "1")

    with pytest.raises(SubjectNotFound, match="there is none at here: name it with --store"):
        find_subject("aaaa1111", repository, None, "here")


# --- explain


def test_explanation_of_a_version_needs_no_store(repository: Path) -> None:
    publish(repository, "3")
    subject = find_subject("digits/3", repository, None, "s")

    text = printed(lambda console: print_explanation(subject, console))

    for said in (
        "1 export 1  opset=20, seed=0",
        "2 quantization 1  calibration=percentile, per_channel=True, seed=0",
        "of 111111111111",
        "The store of its study knows",
        "accuracy 93.86%, 0.41 points below its base [0.11, 0.81], at most 0.76 (95% confidence)",
        "Measured against the labels of 5,000 samples of the validation split",
        "openvino, int8, 2 kB",
        "1 × 2 (instances × threads), batches up to 8, queue delay 0 ms",
        "1 × 2, ms by batch size: 1: 3.2, 2: 4.48",
        "promises p99 within 50 ms at 100 requests/s",
        "load test: met, 13.4 ms at 100 requests/s",
        "0.0546 per million inferences, a replica sustains 406 requests/s",
        "AMD EPYC 9R14, 2 cores, avx2, avx512f, avx512_vnni",
        "trimserve optimize 'my spec.yaml' --repository models",
    ):
        assert said in text


def test_explanation_says_what_a_bare_manifest_leaves_open(repository: Path) -> None:
    publish(repository, "1", made_by=(), evidence=None, quality=None, profile=None, slo=None)
    subject = find_subject("digits", repository, None, "s")

    text = printed(lambda console: print_explanation(subject, console))

    assert "load test: none on record" in text
    assert "the manifest doesn't name the command" in text
    assert "Quality" not in text
    assert "Machine" not in text


def test_explanation_has_ids_artifacts_and_build_times_when_the_store_knows_it(
    repository: Path, tmp_path: Path
) -> None:
    records = two_variants(tmp_path)
    publish(repository, "1", variant_id="aaaa" * 16, parent_id="e" * 64)

    by_version = find_subject("digits", repository, records, "s")
    by_prefix = find_subject("AAAA", repository, records, "s")

    assert by_version.origins == by_prefix.origins
    text = printed(lambda console: print_explanation(by_prefix, console))
    assert f"0 base model  {BASE_ID[:12]}" in text
    assert "variant aaaaaaaaaaaa, of eeeeeeeeeeee, artifact aaaaaaaaaaaa, built in 1.5 s" in text
    assert "with torch 2.13.0" in text
    assert "100.0% of the convolutions' and matrix products' time in int8 kernels" in text
    assert "3 × Conv + Relu in brgconv_avx2_f32: 3 → 2 ms" in text
    assert "unfused: added by the engine (reorder_f32) 1 ms" in text
    assert "The store of its study knows" not in text


def test_explanation_has_the_notes_of_the_steps(tmp_path: Path) -> None:
    records = two_variants(tmp_path)
    known = records.variants["aaaa" * 16]
    noted = replace(known, model=replace(known.model, notes=("3 of 9 layers stay in fp32",)))
    with_note = FakeRecords({**records.variants, known.id: noted}, records.measured)

    subject = find_subject("aaaa", tmp_path, with_note, "s")
    without = find_subject("aabb", tmp_path, with_note, "s")

    assert explain.document(subject)["notes"] == ["3 of 9 layers stay in fp32"]
    text = printed(lambda console: print_explanation(subject, console))
    assert "Notes\n  3 of 9 layers stay in fp32" in text
    assert "Notes" not in printed(lambda console: print_explanation(without, console))


def test_step_on_the_way_is_explained_too(tmp_path: Path) -> None:
    subject = find_subject("eeee", tmp_path, two_variants(tmp_path), "s")

    text = printed(lambda console: print_explanation(subject, console))

    assert "no engine yet" in text


def test_explanation_as_json_has_the_whole_ids(repository: Path, tmp_path: Path) -> None:
    subject = find_subject("aabb", repository, two_variants(tmp_path), "s")

    read = json.loads(json.dumps(explain.document(subject)))

    assert read["base_id"] == BASE_ID
    assert [one["variant_id"] for one in read["lineage"]] == ["e" * 64, "aabb" * 16]
    assert read["lineage"][1]["artifact"] == "aabb" * 16
    assert read["service_times"][0]["times"][0]["batch_size"] == 1


# --- compare


def test_comparison_of_variants_pairs_their_samples_and_relates_their_times(
    tmp_path: Path,
) -> None:
    records = two_variants(tmp_path)
    a, b = (find_subject(name, tmp_path, records, "s") for name in ("aaaa", "aabb"))

    rows = {(row.section, row.name): row for row in compared(a, b)}

    paired = paired_difference(a, b)
    assert paired is not None
    assert (paired.gain, paired.n_samples, paired.data_digest) == (-0.25, 4, DATA)
    assert paired.lower < -0.25 < paired.upper
    assert rows["ms by batch size, 1 × 2", "8"].change == "0.5×"
    assert rows["recipe", "compilation: hint"].differs
    assert not rows["recipe", "export: opset"].differs
    assert rows["kernels, share of time", "qgemm/MlasConv, int8"].a == "81.0%"


def test_comparison_of_versions_needs_no_store(repository: Path) -> None:
    publish(repository, "1")
    quality = met().variants[5].quality
    assert quality is not None
    publish(repository, "2", quality=quality, recipe=met().variants[0].recipe)
    a, b = (find_subject(f"digits/{n}", repository, None, "s") for n in (1, 2))

    text = printed(lambda console: print_comparison(a, b, console), 120)

    assert "≠ accuracy" in text
    assert "-0.11 points" in text
    assert "≠ quantization: calibration" in text
    assert "≠ export: opset" not in text
    assert "  highest rate, requests/s" in text


def test_comparison_leaves_out_what_is_measured_otherwise(repository: Path) -> None:
    one = publish(repository, "1")
    publish(repository, "2", engine=replace(one.engine, instances=2, threads=1))
    a, b = (find_subject(f"digits/{n}", repository, None, "s") for n in (1, 2))

    assert not [row for row in compared(a, b) if row.section.startswith("ms by batch size")]
    assert paired_difference(a, b) is None


def test_comparison_says_so_when_nothing_differs(repository: Path) -> None:
    publish(repository, "1")
    subject = find_subject("digits", repository, None, "s")

    text = printed(lambda console: print_comparison(subject, subject, console))

    assert "The two don't differ in anything on record." in text
    assert "≠" not in text


def test_comparison_as_json_marks_the_rows_that_differ(tmp_path: Path) -> None:
    records = two_variants(tmp_path)
    a, b = (find_subject(name, tmp_path, records, "s") for name in ("aaaa", "aabb"))

    read = json.loads(json.dumps(comparison.document(a, b)))

    differing = {row["name"] for row in read["rows"] if row["differs"]}
    assert "compilation: hint" in differing
    assert "export: opset" not in differing
    assert read["paired"]["gain"] == -0.25


# --- the commands


def test_commands_print_json_when_asked(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(repository, "1")
    publish(repository, "2")

    assert trimserve.main(["explain", "digits/1", "--repository", str(repository), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "digits/1"
    command = ["compare", "digits/1", "digits", "--repository", str(repository), "--json"]
    assert trimserve.main(command) == 0
    assert json.loads(capsys.readouterr().out)["b"]["name"] == "digits/2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["explain", "digits/4"], "there are: 1", id="an unknown version"),
        pytest.param(["compare", "digits/1", "beef5555"], "--store", id="a variant, no store"),
        pytest.param(["explain", "digits/1", "--store", "none.sqlite"],
                     "there is no file none.sqlite", id="a store that isn't there"),
    ],
)  # fmt: skip
def test_exit_code_is_2_when_there_is_nothing_to_show(
    arguments: list[str],
    message: str,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    publish(repository, "1")
    monkeypatch.chdir(tmp_path)

    assert trimserve.main([*arguments, "--repository", str(repository)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / ".trimserve").exists()


def test_commands_work_when_torch_is_not_installed(repository: Path, tmp_path: Path) -> None:
    publish(repository, "1")
    program = (
        "import sys; sys.modules['torch'] = None; import trimserve; "
        "sys.exit(trimserve.main(sys.argv[1:]))"
    )
    for arguments in (["explain", "digits"], ["compare", "digits", "digits/1"]):
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments, "--repository", str(repository)],
            cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
