"""Torch variants: weights and a plan on disk, and the module that is made of them again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from optimizer.builder import Builder
from optimizer.errors import TechniqueFailed
from optimizer.importable import Importable
from optimizer.recipe import Recipe, Traits
from optimizer.space import defaults
from optimizer.spec import InputSpec, OutputSpec, TorchSource
from optimizer.store import Store
from optimizer.study import Options, optimize
from optimizer.techniques import Technique, load_technique
from optimizer.torch_variant import Plan, PlanStep, bound, load_torch, read_plan, torch_model
from optimizer.variant import (
    Json,
    Kind,
    Stage,
    StoredTorch,
    TorchModel,
    directory_digest,
    onnx_model,
)
from tests.optimizer.synthetic import Narrow, NotANumber, Tune
from tests.optimizer.tiny_study import QUICK, FakeVerifier, spec_with, write_study
from tests.optimizer.trials_bench import in_a_hurry
from tests.optimizer.workbench import Workbench, make_workbench

TIED = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.second(self.first(x)) * self.scale
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


@pytest.fixture
def tied(tmp_path: Path) -> TorchModel:
    from safetensors.torch import save_file

    (tmp_path / "tied.py").write_text(TIED)
    weights = tmp_path / "tied.safetensors"
    save_file({"first.weight": torch.eye(4)}, weights)
    source = TorchSource(
        Importable("tied", "Tied", tmp_path),
        weights,
        (InputSpec(name="x", shape=(4,)),),
        (OutputSpec(name="y"),),
    )
    return TorchModel(source, digest="of the base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    return made


def test_plan_grows_with_each_step_and_is_replayed_in_order(
    bench: Workbench, tmp_path: Path
) -> None:
    model = bench.torch
    for width, n_channels in ((0.75, 12), (0.5, 6)):
        directory = tmp_path / str(n_channels)
        directory.mkdir()
        model = Narrow().apply(model, {"width": width}, bench.context, directory)
        assert load_torch(model).get_submodule("0").weight.shape[0] == n_channels
    plan = read_plan(model)
    assert plan.base == bench.torch.digest
    assert [step.technique for step in plan.steps] == ["narrow", "narrow"]
    assert [len(step.operations["kept"]) for step in plan.steps] == [12, 6]


def test_plan_is_empty_when_the_model_is_the_base(bench: Workbench) -> None:
    assert read_plan(bench.torch) == Plan(bench.torch.digest)


def test_structure_is_kept_when_a_later_technique_changes_only_weights(
    bench: Workbench, tmp_path: Path
) -> None:
    narrow, tuned = tmp_path / "narrow", tmp_path / "tuned"
    narrow.mkdir()
    tuned.mkdir()
    parent = Narrow().apply(bench.torch, {"width": 0.5}, bench.context, narrow)
    made = Tune().apply(parent, {"effort": "short"}, bench.context, tuned)
    assert read_plan(made) == read_plan(parent)
    assert made.digest != parent.digest
    assert load_torch(made).get_submodule("0").weight.shape[0] == 8


def test_tied_weights_are_stored_once_and_stay_tied(tied: TorchModel, folder: Path) -> None:
    from safetensors.torch import load_file

    module = load_torch(tied)
    with torch.no_grad():
        module.get_parameter("first.weight").mul_(3)
    made = torch_model(folder, tied, module)
    assert list(load_file(folder / "model.safetensors")) == ["first.weight"]
    again = load_torch(made)
    assert again.get_parameter("second.weight") is again.get_parameter("first.weight")
    assert torch.equal(again.get_parameter("second.weight"), 3 * torch.eye(4))


def test_files_are_equal_when_tensors_lie_otherwise_in_memory(
    tied: TorchModel, tmp_path: Path
) -> None:
    digests = set()
    for name, values in (("a", torch.arange(16.0).reshape(4, 4)),
                         ("b", torch.arange(16.0).reshape(4, 4).T.contiguous().T)):  # fmt: skip
        module = load_torch(tied)
        module.get_submodule("first").weight = nn.Parameter(values)
        module.get_submodule("second").weight = module.get_submodule("first").weight
        (tmp_path / name).mkdir()
        digests.add(torch_model(tmp_path / name, tied, module).digest)
    assert len(digests) == 1


def test_module_is_refused_when_the_plan_does_not_give_it_again(
    tied: TorchModel, folder: Path
) -> None:
    wider = load_torch(tied)
    wider.get_submodule("second").weight = nn.Parameter(torch.ones(8, 4))
    with pytest.raises(ValueError, match=r"second.weight is \[8, 4\], want \[4, 4\]"):
        torch_model(folder, tied, wider)


def test_module_is_refused_when_a_buffer_outside_of_the_state_dict_changed(
    tied: TorchModel, folder: Path
) -> None:
    module = load_torch(tied)
    module.get_buffer("scale").fill_(2)
    with pytest.raises(ValueError, match="scale has other values"):
        torch_model(folder, tied, module)


def test_module_is_refused_when_untied_weights_would_be_tied_again(
    tied: TorchModel, folder: Path
) -> None:
    module = load_torch(tied)
    module.get_submodule("second").weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="has other values"):
        torch_model(folder, tied, module)


class Rewired:
    """Replaces a layer, by something else than its replay does."""

    traits = Traits("rewired", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, preserves=False)

    def restructure(self, module: nn.Module, operations: Json) -> nn.Module:
        module.get_submodule("0").padding_mode = operations
        return module


def test_module_is_refused_when_replay_gives_another_layer(bench: Workbench, folder: Path) -> None:
    module = Rewired().restructure(load_torch(bench.torch), "circular")
    with pytest.raises(ValueError, match="padding_mode=circular"):
        torch_model(folder, bench.torch, module, Rewired(), "reflect")


def test_stored_variant_is_bound_to_its_base_only(bench: Workbench, folder: Path) -> None:
    made = Narrow().apply(bench.torch, {"width": 0.5}, bench.context, folder)
    stored = StoredTorch(folder, made.digest)
    assert bound(stored, bench.torch, {"narrow": Narrow()}) == made
    with pytest.raises(ValueError, match="comes from the model"):
        bound(stored, replace(bench.torch, digest="another"), {"narrow": Narrow()})
    with pytest.raises(ValueError, match="comes from the model"):
        bound(stored, onnx_model(folder, "model.onnx"), {"narrow": Narrow()})
    for techniques in ({}, {"narrow": load_technique("export")}):
        with pytest.raises(ValueError, match="needs narrow, which can't replay it"):
            bound(stored, bench.torch, techniques)


def test_plan_is_refused_when_another_version_made_it(bench: Workbench, folder: Path) -> None:
    made = Narrow().apply(bench.torch, {"width": 0.5}, bench.context, folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["steps"][0]["technique_version"] = "0"
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="made by narrow 0, but this is 1"):
        load_torch(made)


def test_plan_holds_plain_json_and_no_path(bench: Workbench, folder: Path) -> None:
    Narrow().apply(bench.torch, {"width": 0.5}, bench.context, folder)
    plan = json.loads((folder / "plan.json").read_text())
    assert sorted(plan) == ["base", "format", "steps"]
    assert PlanStep(**plan["steps"][0]).technique == "narrow"
    assert sorted(file.name for file in folder.iterdir()) == ["model.safetensors", "plan.json"]


def test_variant_is_a_failure_by_name_when_it_computes_nan(
    bench: Workbench, tmp_path: Path
) -> None:
    technique: Technique = NotANumber()
    recipe = Recipe(Kind.TORCH).then(
        technique.traits, defaults(technique.space(bench.torch, bench.context))
    )
    with Store(tmp_path / "store.sqlite") as store:
        builder = Builder(store, bench.torch, {"tune": technique}, bench.context, bench.inputs)
        with pytest.raises(TechniqueFailed) as caught:
            builder.build(recipe)
        assert builder.find(builder.variant_id(recipe)) is None
    assert str(caught.value) == (
        "tune failed: output logits has 4 of 4 values NaN or infinite at batch size 1"
    )


@pytest.mark.full  # several studies
def test_study_searches_over_torch_techniques_and_continues_from_the_store(tmp_path: Path) -> None:
    spec = spec_with(in_a_hurry(write_study(tmp_path)), trials=8)
    techniques: dict[str, Technique] = {
        "narrow": Narrow(),
        "tune": Tune(),
        "export": load_technique("export"),
        "compilation": load_technique("compilation"),
    }
    options = Options(
        store=tmp_path / "store.sqlite",
        verifier=FakeVerifier(),
        effort=QUICK,
        techniques=techniques,
    )
    first = optimize(spec, tmp_path / "models", options)
    before = directory_digest(tmp_path / "store.sqlite.artifacts")
    second = optimize(spec, tmp_path / "models", options)
    assert directory_digest(tmp_path / "store.sqlite.artifacts") == before
    assert [row.id for row in first.variants] == [row.id for row in second.variants]
    recipes = {tuple(step.technique for step in row.recipe) for row in first.variants}
    assert ("export", "compilation") in recipes
    assert any(recipe[:2] == ("narrow", "tune") for recipe in recipes)
    baseline = next(row for row in first.variants if row.id == first.baseline_id)
    assert [step.technique for step in baseline.recipe] == ["export", "compilation"]
