"""Datasets that give a sample at a time, as PyTorch's do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.data.splits import load_splits
from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.spec import DataSpec, ImageSpec, SplitSpec

MODULE = """
import numpy as np
import torch

class Numbers(torch.utils.data.Dataset):
    def __init__(self, start, n=6):
        self.start, self.n, self.read = start, n, []
    def __len__(self):
        return self.n
    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((3,), self.start + index, dtype=torch.float64), torch.tensor(index % 2)

def train(): return Numbers(0)
def validation(): return [(np.full(3, 20.0 + index), index % 2) for index in range(4)]
def test(): return Numbers(40)
"""


def importable_data(folder: Path, test: str = "", image: ImageSpec | None = None) -> DataSpec:
    """With `test` as what the test split's function returns."""
    body = f"{MODULE}\ndef test(): return {test}\n" if test else MODULE
    (folder / "samples.py").write_text(body)
    return DataSpec(
        format="importable",
        **{
            name: SplitSpec(call=Importable("samples", name, folder))
            for name in ("train", "validation", "test")
        },
        image=image,
    )


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(SpecInvalid) as caught:
        load()
    return str(caught.value)


def test_dataset_gives_its_pairs_as_arrays_and_labels(tmp_path: Path) -> None:
    splits = load_splits(importable_data(tmp_path), ["x"], seed=0)
    samples = splits.test.read([4, 1])
    assert samples.inputs["x"].tolist() == [[44.0] * 3, [41.0] * 3]
    assert samples.inputs["x"].dtype == np.float32
    assert np.asarray(samples.labels).tolist() == [0, 1]
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [6, 4, 6]
    assert splits.n_classes == 2


def test_dataset_is_read_once_at_first_and_then_only_what_is_asked_for(tmp_path: Path) -> None:
    data = importable_data(tmp_path, "SHARED")
    (tmp_path / "samples.py").write_text(
        f"{MODULE}\nSHARED = Numbers(40)\ndef test(): return SHARED\n"
    )
    call = data.test.call
    assert call is not None
    rows = data.model_copy(update={"test": SplitSpec(call=call, rows=(2, 5))})
    split = load_splits(rows, ["x"], seed=0).test
    split.read([2])
    shared = Importable("samples", "SHARED", tmp_path).load()
    assert shared.read == [2, 3, 4, 4]


def test_dataset_may_give_several_inputs_and_no_labels(tmp_path: Path) -> None:
    pairs = "[({'x': np.full(3, 60.0 + i), 'y': np.array([i])}, None) for i in range(3)]"
    (tmp_path / "samples.py").write_text(
        "import numpy as np\n"
        + "".join(
            f"def {name}(): return {pairs.replace('60.0', start)}\n"
            for name, start in (("train", "0.0"), ("validation", "20.0"), ("test", "40.0"))
        )
    )
    data = DataSpec(
        format="importable",
        **{
            name: SplitSpec(call=Importable("samples", name, tmp_path))
            for name in ("train", "validation", "test")
        },
    )
    splits = load_splits(data, ["x", "y"], seed=0)
    assert splits.n_classes == 0
    assert splits.test.read([2]).inputs["y"].tolist() == [[2]]


def test_dataset_gives_images_of_any_size_when_a_preprocessing_is_given(tmp_path: Path) -> None:
    image = ImageSpec(mean=(0.0,), std=(1.0,), size=(2, 2))
    level = "np.full((3 + i, 4), start + i, dtype=np.uint8)"
    (tmp_path / "samples.py").write_text(
        "import numpy as np\n"
        f"def _made(start): return [({level}, i % 2) for i in range(4)]\n"
        "def train(): return _made(0)\n"
        "def validation(): return _made(50)\n"
        "def test(): return _made(100)\n"
    )
    data = DataSpec(
        format="importable",
        **{
            name: SplitSpec(call=Importable("samples", name, tmp_path))
            for name in ("train", "validation", "test")
        },
        image=image,
    )
    found = load_splits(data, ["x"], seed=0).test.read().inputs["x"]
    assert found.shape == (4, 1, 2, 2)
    np.testing.assert_allclose(found[3], np.full((1, 2, 2), 103 / 255), rtol=1e-6)


def test_dataset_is_refused_when_its_samples_change(tmp_path: Path) -> None:
    random = "type('Random', (Numbers,), {'__getitem__': lambda s, i: (np.random.rand(3), 0)})(0)"
    test = load_splits(importable_data(tmp_path, random), ["x"], seed=0).test
    message = refusal(test.read)
    assert "item 0 isn't what it was when it was first read, want no random" in message


@pytest.mark.parametrize(
    ("test", "message"),
    [
        pytest.param("[1, 2]", "item 0 is int, want a pair (input, label)", id="no pairs"),
        pytest.param("[(1.0, 0, 2)]", "item 0 is tuple, want a pair", id="three"),
        pytest.param("[]", "has no rows", id="none"),
        pytest.param("[(np.ones(3), 0.5)]", "got the label 0.5, want an integer", id="a fraction"),
        pytest.param(
            "[(np.ones(3), 0), (np.zeros(3), None)]", "item 1 has no label", id="half labelled"
        ),
        pytest.param("[('text', 0)]", "x is <U4 [], want numbers", id="text"),
        pytest.param("[(np.full(3, np.nan), 0)]", "item 0: x has values that are NaN", id="NaN"),
        pytest.param("[({'y': 1}, 0)]", "item 0: no inputs for x", id="another input"),
        pytest.param(
            "[(np.ones(3), 0), (np.ones(4), 1)]",
            "item 1: x is float64 [4], want float64 [3] as before",
            id="shapes that differ",
        ),
        pytest.param(
            "type('Broken', (Numbers,), {'__getitem__': lambda s, i: 1 / 0})(0)",
            "item 0 failed: ZeroDivisionError",
            id="raises",
        ),
        pytest.param(
            "type('Endless', (Numbers,), {'__len__': lambda s: 10**9})(0)",
            "has 1000000000 items, want at most 10000000",
            id="endless",
        ),
    ],
)
def test_dataset_is_refused_when_it_holds(tmp_path: Path, test: str, message: str) -> None:
    data = importable_data(tmp_path, test)
    assert message in refusal(lambda: load_splits(data, ["x"], seed=0))
