"""An encoder of texts in training: tables that stand still or don't, and views of texts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.space import defaults
from optimizer.spec import InputSpec, ModuleSource, OutputSpec, TaskSpec, TrainingSpec
from optimizer.techniques import Context
from optimizer.techniques.pruning import Pruning
from optimizer.techniques.recovery import Recovery
from optimizer.torch_variant import load_torch, torch_model
from optimizer.training.embeddings import standing_still, tables_of
from optimizer.variant import TorchModel, TorchVariant, source_model
from tests.optimizer.networks import Bert
from tests.optimizer.test_pruning import Given, context_of

TABLES = ("words.weight", "places.weight")


class Tied(nn.Module):
    """A table that is the last layer's weight too, and one that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.EmbeddingBag(5, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight


def built(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def names_of(module: nn.Module, whole: nn.Module) -> set[str]:
    found = {id(one) for one in tables_of(module, whole)}
    return {name for name, one in module.named_parameters() if id(one) in found}


def test_tables_are_those_of_embeddings_alone() -> None:
    assert names_of(built(), built()) == {"places.weight"}


def test_a_table_that_isnt_the_whole_ones_has_to_learn() -> None:
    assert names_of(built(1), built()) == set()
    smaller = built()
    smaller.places = nn.EmbeddingBag(5, 2)
    assert names_of(smaller, built()) == set()


def test_what_stands_still_needs_gradients_again_after_an_error() -> None:
    learned, fixed = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)

    def fail() -> None:
        with standing_still([learned, fixed]):
            assert not learned.requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (learned.requires_grad, fixed.requires_grad) == (True, False)


def of_bert(**training: object) -> tuple[TorchModel, Context]:
    at = context_of("bert")
    data = at.calibration.read()
    ids, mask = data.inputs.values()
    split = Given({"ids": ids, "attention_mask": mask}, data.labels)
    quick = {"epochs": 2.0, "batch_size": 4, "losses": ("answers",), **training}
    context = replace(
        at,
        calibration=split,
        train=split,
        training=TrainingSpec(**quick),  # type: ignore[arg-type]
        task=TaskSpec(kind="embedding", output="embedding"),
    )
    torch.manual_seed(0)
    inputs = tuple(
        InputSpec(name=name, datatype="INT64", shape=(-1,)) for name in ("ids", "attention_mask")
    )
    outputs = tuple(OutputSpec(name=name) for name in ("embedding", "tokens"))
    model = source_model(ModuleSource(Bert().eval(), inputs, outputs), "bert")
    assert isinstance(model, TorchModel)
    return model, context


def narrowed(whole: TorchModel, context: Context, directory: Path) -> TorchVariant:
    directory.mkdir()
    technique = Pruning()
    given = {"what": "channels", "ratio": 0.3, "multiple": 1, "allocation": "uniform"}
    parameters = defaults(technique.space(whole, context), **given)
    return technique.apply(whole, parameters, context, directory)


def recovered(cut: TorchVariant, context: Context, directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir()
    technique = Recovery()
    parameters = defaults(technique.space(cut, context), effort="full")
    made = technique.apply(cut, parameters, context, directory)
    return load_torch(made).state_dict()


@pytest.mark.parametrize("embeddings", ["kept", "trained"])
def test_recovery_of_a_narrowed_encoder_moves_tables_only_when_asked(
    embeddings: str, tmp_path: Path
) -> None:
    whole, context = of_bert(embeddings=embeddings)
    cut = narrowed(whole, context, tmp_path / "cut")
    before = load_torch(whole).state_dict()
    after = recovered(cut, context, tmp_path / "made")
    for name in TABLES:
        assert torch.equal(after[name], before[name]) == (embeddings == "kept")
    assert not torch.equal(after["layers.0.first.weight"], before["layers.0.first.weight"])


def test_recovery_trains_tables_of_a_network_that_begins_anew(tmp_path: Path) -> None:
    whole, context = of_bert()
    module = load_torch(whole)
    with torch.no_grad():
        module.words.weight += torch.from_numpy(np.random.default_rng(0).normal(size=(20, 8)))
    (tmp_path / "other").mkdir()
    other = torch_model(tmp_path / "other", whole, module)
    began = {name: one.clone() for name, one in module.state_dict().items()}
    after = recovered(other, context, tmp_path / "made")
    moved = [not torch.equal(after[name], began[name]) for name in TABLES]
    assert moved == [True, False]


def test_recovery_learns_by_texts_with_swapped_spans(tmp_path: Path) -> None:
    made = []
    for name in ("none", "swap_spans"):
        whole, context = of_bert(augmentation=name)
        assert Recovery().check(whole, context) is None
        cut = narrowed(whole, context, tmp_path / f"{name} cut")
        made.append(recovered(cut, context, tmp_path / name))
    plain, swapped = made
    assert not torch.equal(plain["layers.0.first.weight"], swapped["layers.0.first.weight"])


def test_swapped_spans_are_refused_where_labels_count_or_inputs_are_no_texts() -> None:
    whole, context = of_bert(augmentation="swap_spans")
    technique = Recovery()
    classes = replace(context, task=TaskSpec())
    assert technique.check(whole, classes) == (
        "training.augmentation is swap_spans, and training.alphas has 0.5: a text made of two has "
        "no label, want alphas of 0"
    )
    assert technique.check(whole, of_answers(classes)) is None
    renamed = tuple(
        one.model_copy(update={"name": f"x{i}"}) for i, one in enumerate(whole.source.inputs)
    )
    source = replace(whole.source, inputs=renamed)  # type: ignore[type-var]
    assert technique.check(replace(whole, source=source), context) == (
        "training.augmentation is swap_spans, and the model takes x0 [-1], x1 [-1]: want integers "
        "[length], and one of them named attention_mask"
    )
    reason = technique.check(whole, of_bert(augmentation="flip")[1])
    assert reason is not None
    assert reason.endswith("attention_mask [-1]: want one input [channel, y, x]")


def of_answers(context: Context) -> Context:
    training = context.training.model_copy(update={"alphas": (0.0,)})
    return replace(context, training=training)
