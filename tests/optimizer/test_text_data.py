"""Texts and columns of numbers in parquet files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from optimizer.data.splits import load_splits
from optimizer.data.text import text_input
from optimizer.errors import SpecInvalid
from optimizer.spec import Columns, DataSpec, SplitSpec, TextSpec
from serve.tensor import TensorSpec
from serve.transform.text import load_text

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "cat", "eats", "mouse"]
TEXTS = {
    "train": ["a dog", "a cat eats", "a mouse eats a dog", "cat"],
    "validation": ["dog", "a cat eats a mouse"],
    "test": ["mouse", "a bird eats"],
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def write(folder: Path, name: str, **columns: Any) -> SplitSpec:
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return SplitSpec(path=path)


def text_data(
    folder: Path, tokenizer: Path, texts: dict[str, Sequence[str | None]] | None = None, **text: Any
) -> DataSpec:
    settings = {"max_length": 8, "mask": "attention_mask"} | text
    given = TEXTS if texts is None else {**TEXTS, **texts}
    splits = {
        name: write(folder, name, text=values, label=np.arange(len(values)) % 2)
        for name, values in given.items()
    }
    return DataSpec(format="parquet", **splits, text=TextSpec(tokenizer=tokenizer, **settings))


INPUTS = ["input_ids", "attention_mask"]


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(SpecInvalid) as caught:
        load()
    return str(caught.value)


def test_texts_become_tokens_filled_up_to_the_longest_that_is_read(
    tmp_path: Path, tokenizer: Path
) -> None:
    train = load_splits(text_data(tmp_path, tokenizer), INPUTS, seed=0).train
    few = train.read([3, 0]).inputs
    assert few["input_ids"].tolist() == [[1, 6, 2, 0], [1, 4, 5, 2]]
    assert few["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert few["input_ids"].dtype == np.int64
    everything = train.read()
    assert everything.inputs["input_ids"].shape == (4, 7)
    assert np.asarray(everything.labels).tolist() == [0, 1, 0, 1]
    assert train.read([]).inputs["input_ids"].shape == (0, 0)


def test_texts_are_filled_up_to_max_length_and_cut_off_when_the_spec_says_so(
    tmp_path: Path, tokenizer: Path
) -> None:
    data = text_data(tmp_path, tokenizer, max_length=5, padding="max_length", datatype="INT32")
    train = load_splits(data, INPUTS, seed=0).train
    ids = train.read([3, 2]).inputs["input_ids"]
    assert ids.tolist() == [[1, 6, 2, 0, 0], [1, 4, 8, 7, 2]]
    assert ids.dtype == np.int32


def test_texts_are_tokenized_as_the_server_does_it(tmp_path: Path, tokenizer: Path) -> None:
    data = text_data(tmp_path, tokenizer, types="segments")
    assert data.text is not None
    declared = text_input(data.text, "sentence")
    assert declared.name == "sentence"
    assert declared.problem() is None
    specs = {name: TensorSpec(name, "INT64", (-1, -1)) for name in declared.tensors}
    served = load_text(tokenizer.parent, declared, specs).tensors([b"a bird eats", b"mouse"])
    test = load_splits(data, [*INPUTS, "segments"], seed=0).test.read([1, 0])
    assert set(served) == set(test.inputs)
    for name, expected in served.items():
        np.testing.assert_array_equal(test.inputs[name], expected)


def test_texts_are_the_same_sample_when_their_bytes_are(tmp_path: Path, tokenizer: Path) -> None:
    data = text_data(tmp_path, tokenizer, {"test": ["a dog", "bird"]})
    message = refusal(lambda: load_splits(data, INPUTS, seed=0))
    assert "1 samples of train are in test too" in message


def test_text_digest_changes_with_the_tokenizer_and_not_with_its_place(
    tmp_path: Path, tokenizer: Path
) -> None:
    data = text_data(tmp_path, tokenizer)
    before = load_splits(data, INPUTS, seed=0).digest
    moved = tokenizer.rename(tmp_path / "moved.json")
    again = text_data(tmp_path, moved)
    assert load_splits(again, INPUTS, seed=0).digest == before
    moved.write_text(moved.read_text().replace('"mouse"', '"moose"'))
    assert load_splits(again, INPUTS, seed=0).digest != before
    shorter = text_data(tmp_path, moved, max_length=4)
    assert load_splits(shorter, INPUTS, seed=0).digest != load_splits(again, INPUTS, 0).digest


def test_texts_need_no_labels(tmp_path: Path, tokenizer: Path) -> None:
    data = text_data(tmp_path, tokenizer).model_copy(update={"columns": Columns(label=None)})
    splits = load_splits(data, INPUTS, seed=0)
    assert splits.n_classes == 0
    assert splits.validation.read().labels is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            ["input_ids", "attention_mask", "token_type_ids"],
            "data.text: makes input_ids, attention_mask, want all inputs of the model and no "
            "other (input_ids, attention_mask, token_type_ids): set ids, mask and types",
        ),
        (["input_ids"], "data.text: makes input_ids, attention_mask, want all inputs"),
    ],
)
def test_texts_are_refused_when_the_model_takes_something_else(
    tmp_path: Path, tokenizer: Path, inputs: list[str], message: str
) -> None:
    data = text_data(tmp_path, tokenizer)
    assert message in refusal(lambda: load_splits(data, inputs, seed=0))


@pytest.mark.parametrize(
    ("test", "text", "message"),
    [
        pytest.param(["dog", None], {}, "row 1: no text, want one", id="nothing"),
        pytest.param(
            ["x"], {"column": "sentence"}, "no column 'sentence', set data.text.column; it has: ",
            id="another column",
        ),
        pytest.param(
            ["x"], {"column": "label"}, "column 'label' is int64, want string", id="numbers"
        ),
        pytest.param(["x"], {"max_length": 2}, "adds 2 special tokens", id="no room for a token"),
    ],
)  # fmt: skip
def test_texts_are_refused_when_they_are(
    tmp_path: Path, tokenizer: Path, test: list[str | None], text: dict[str, Any], message: str
) -> None:
    data = text_data(tmp_path, tokenizer, {"test": test}, **text)
    assert message in refusal(lambda: load_splits(data, INPUTS, seed=0))


def test_texts_are_refused_when_the_tokenizer_is_none(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    data = text_data(tmp_path, wrong)
    message = refusal(lambda: load_splits(data, INPUTS, seed=0))
    assert message.startswith("data.text.tokenizer: ")
    assert "not a tokenizer.json" in message


def test_text_is_refused_by_its_row_when_it_is_too_long(tmp_path: Path, tokenizer: Path) -> None:
    data = text_data(tmp_path, tokenizer, {"test": ["cow", "bird", "dog " * 100_000]})
    test = load_splits(data, INPUTS, seed=0).test
    assert test.read([0, 1]).inputs["input_ids"].shape == (2, 3)
    assert "test.parquet: row 2: got 400000 bytes, want at most" in refusal(test.read)


# --- columns of numbers


def column_data(folder: Path, **columns: Any) -> DataSpec:
    """Train, validation and test are consecutive thirds of the columns."""
    n = len(next(iter(columns.values()))) // 3
    return DataSpec(
        format="parquet",
        **{
            name: write(
                folder,
                name,
                **{key: values[third * n : (third + 1) * n] for key, values in columns.items()},
            )
            for third, name in enumerate(("train", "validation", "test"))
        },
    )


def test_columns_become_arrays_when_they_hold_numbers_or_lists(tmp_path: Path) -> None:
    n = 15
    rng = np.random.default_rng(0)
    grid, age = rng.normal(size=(n, 2, 3)), np.arange(n)
    data = column_data(tmp_path, grid=grid.tolist(), age=age, old=age > 7, label=np.arange(n) % 3)
    splits = load_splits(data, ["grid", "age", "old"], seed=0)
    validation = splits.validation.read([1, 4])
    assert validation.inputs["grid"].dtype == np.float32
    np.testing.assert_allclose(validation.inputs["grid"], grid[[6, 9]], rtol=1e-6)
    assert validation.inputs["age"].tolist() == [6, 9]
    assert validation.inputs["old"].tolist() == [False, True]
    assert np.asarray(validation.labels).tolist() == [0, 0]


def test_columns_are_read_from_the_rows_that_are_named(tmp_path: Path) -> None:
    data = column_data(tmp_path, x=np.arange(15.0).reshape(15, 1).tolist(), label=np.arange(15) % 2)
    test = SplitSpec(path=data.test.path, rows=(1, 4))
    split = load_splits(data.model_copy(update={"test": test}), ["x"], seed=0).test
    assert split.read().inputs["x"].tolist() == [[11.0], [12.0], [13.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            [[1.0], [2.0, 3.0], [4.0]], "has lists of 1 and 2 values, want one length", id="ragged"
        ),
        pytest.param([1.0, None, 2.0], "row 1: nothing in column 'x', want a number", id="null"),
        pytest.param([[1.0], None, [2.0]], "row 1: nothing in column 'x'", id="no list"),
        pytest.param(
            [[1.0, 2.0], [3.0, None], [4.0, 5.0]], "row 1: nothing in column 'x'", id="half a list"
        ),
        pytest.param(["a", "b", "c"], "column 'x' is string, want numbers or lists", id="text"),
        pytest.param([1.0, float("nan"), 2.0], "NaN or infinite", id="NaN"),
    ],
)
def test_columns_are_refused_when_they_hold(
    tmp_path: Path, values: list[Any], message: str
) -> None:
    data = column_data(tmp_path, x=values * 3, label=[0, 1, 0] * 3)
    assert message in refusal(lambda: load_splits(data, ["x"], seed=0))
