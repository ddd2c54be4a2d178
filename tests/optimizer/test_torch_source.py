"""Torch models that come as an exported program or as an object."""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.data.splits import Samples
from optimizer.errors import SpecInvalid, TechniqueFailed
from optimizer.model_source import check_model, read_signature, source_digest
from optimizer.parity import check_parity
from optimizer.spec import (
    NOT_RESUMABLE,
    ExportedSource,
    InputSpec,
    ModuleSource,
    OutputSpec,
    TorchKind,
)
from optimizer.study import Options, optimize
from optimizer.techniques import load_technique
from optimizer.torch_source import load_source
from optimizer.variant import OnnxModel, TorchModel, source_model
from tests.optimizer.tiny_study import QUICK, FakeVerifier, build_network, write_study
from tests.optimizer.trials_bench import in_a_hurry
from tests.optimizer.workbench import MAX_BATCH_SIZE, Workbench, make_workbench

BATCH = torch.export.Dim("batch")
INPUTS = (InputSpec(name="image", shape=(1, 8, 8)),)
OUTPUTS = (OutputSpec(name="logits"),)

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")


class Flat(nn.Module):
    """Base of networks of one linear layer, [n, 1, 8, 8] to [n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 4)


class Dict(Flat):
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = image.flatten(1)
        return {"features": flat, "logits": self.linear(flat)}


class Keyword(Flat):
    def forward(self, image: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(image.flatten(1)) * scale
        return out


class Dropping(Flat):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.linear(image.flatten(1)), training=self.training)


class Deciding(Flat):
    """Its way through depends on the data, and samples go both ways."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        out: torch.Tensor = self.linear(flat)
        return out if flat.sum() == 0 else -out


@torch.library.custom_op("trimserve_tests::double_", mutates_args=("values",))
def double_(values: torch.Tensor) -> None:
    values.mul_(2)


class InPlace(Flat):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(image.flatten(1))
        double_(out)
        return out


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


def export(
    path: Path,
    module: nn.Module | None = None,
    batch: object = BATCH,
    keywords: dict[str, torch.Tensor] | None = None,
) -> ExportedSource:
    shapes: dict[str, object] = {"image": {0: batch}} | dict.fromkeys(keywords or {})
    program = torch.export.export(
        module or build_network().eval(),
        (torch.zeros(2, 1, 8, 8),),
        keywords,
        dynamic_shapes=shapes if module is not None else ({0: batch},),
    )
    torch.export.save(program, path)
    return ExportedSource(path)


def samples(n: int = 8) -> Samples:
    images = np.random.default_rng(0).normal(size=(n, 1, 8, 8)).astype(np.float32)
    return Samples({"image": images}, None, digest="")


def refusal(source: TorchKind) -> str:
    with pytest.raises(SpecInvalid) as caught:
        check_model(source, samples(), n_classes=0)
    return str(caught.value)


def exported(source: TorchKind, bench: Workbench, directory: Path) -> OnnxModel:
    """The source as ONNX, compared with torch."""
    model = source_model(source, source_digest(source))
    assert isinstance(model, TorchModel)
    directory.mkdir()
    made = load_technique("export").apply(model, {}, bench.context, directory)
    check_parity(made, model, bench.inputs, MAX_BATCH_SIZE)
    assert isinstance(made, OnnxModel)
    return made


def test_exported_program_computes_what_its_module_does(bench: Workbench, tmp_path: Path) -> None:
    module = build_network().eval()
    source = export(tmp_path / "net.pt2")
    named = replace(source, inputs=INPUTS, outputs=OUTPUTS)
    check_model(named, samples(), n_classes=4)
    images = torch.from_numpy(samples().inputs["image"])
    torch.testing.assert_close(load_source(source)(images), module(images))
    exported(named, bench, tmp_path / "onnx")


def test_exported_program_gives_its_own_names_when_the_spec_names_none(tmp_path: Path) -> None:
    signature = read_signature(export(tmp_path / "net.pt2", Dict()))
    assert signature.inputs == INPUTS
    assert signature.output_names == ("features", "logits")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        pytest.param(
            lambda path: export(path, batch=None), "has a fixed batch of 2: export it again:",
            id="the batch is fixed",
        ),
        pytest.param(
            lambda path: export(path, batch=torch.export.Dim("batch", max=16)),
            "takes batches of 0 to 16, want 1 to 32", id="the batch is too small",
        ),
        pytest.param(
            lambda path: export(path, Dropping()),
            "was exported in training mode (aten.dropout.default)", id="it is in training mode",
        ),
        pytest.param(
            lambda path: export(path, Keyword(), keywords={"scale": torch.ones(1)}),
            "takes scale by keyword, want all by position", id="it takes keywords",
        ),
        pytest.param(
            lambda path: replace(export(path), outputs=(*OUTPUTS, OutputSpec(name="more"))),
            "has 1 outputs, model.outputs names 2", id="the spec names more outputs",
        ),
        pytest.param(
            lambda path: replace(export(path), inputs=(InputSpec(name="image", shape=(3, 8, 8)),)),
            "is FP32 [1, 8, 8], model.inputs says FP32 [3, 8, 8]", id="the spec has other shapes",
        ),
    ],
)  # fmt: skip
def test_exported_program_is_refused_when(
    make: Callable[[Path], ExportedSource], problem: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "net.pt2")
    assert problem in refusal(source)


class Trap:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def with_entry(path: Path, name: str, content: bytes) -> None:
    """Replace an entry of the archive, or add it."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(entries)).partition("/")[0]
    entries[f"{root}/{name}"] = content
    with zipfile.ZipFile(path, "w") as archive:
        for entry, stored in entries.items():
            archive.writestr(entry, stored)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        pytest.param("data/sample_inputs/model.pt", "can't be opened", id="as example inputs"),
        pytest.param("data/weights/model.pt", "is pickled", id="as weights"),
        pytest.param("data/aotinductor/model/x.so", "compiled code", id="as compiled code"),
    ],
)
def test_exported_program_runs_nothing_when_it_holds_a_pickle(
    name: str, problem: str, tmp_path: Path
) -> None:
    source = export(tmp_path / "net.pt2")
    trace = tmp_path / "trace"
    with_entry(source.path, name, pickle.dumps(Trap(trace)))
    assert problem in refusal(source)
    assert not trace.exists()


def test_exported_program_is_refused_when_a_weight_is_pickled(tmp_path: Path) -> None:
    source = export(tmp_path / "net.pt2")
    config = b'{"config": {"helper": {"path_name": "opaque_obj_0", "use_pickle": true}}}'
    with_entry(source.path, "data/constants/model_constants_config.json", config)
    assert "helper is a pickled object" in refusal(source)


def test_exported_program_is_refused_when_it_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"nothing")
    assert "can't be opened" in refusal(ExportedSource(tmp_path / "net.pt2"))


def test_object_is_copied_and_stays_as_it_was(bench: Workbench, tmp_path: Path) -> None:
    module = build_network().train()
    source = ModuleSource(module, INPUTS, OUTPUTS)
    before = source_digest(source)
    check_model(source, samples(), n_classes=4)
    exported(source, bench, tmp_path / "onnx")
    copied = load_source(source)
    copied.get_submodule("0").weight.data.zero_()
    assert module.training
    assert source_digest(source) == before


def test_digest_of_an_object_covers_tensors_layers_and_plain_attributes() -> None:
    def digest(module: nn.Module) -> str:
        return source_digest(ModuleSource(module, INPUTS, OUTPUTS))

    first, tuned, scaled = build_network(), build_network(), build_network()
    tuned.get_submodule("7").weight.data[0, 0] += 1
    scaled.scale = 2.0  # type: ignore[assignment]
    inner = nn.Sequential(*list(build_network().children())[:-1], Flat().linear)
    digests = {digest(module) for module in (first, tuned, scaled, inner, Dict(), Deciding())}
    assert len(digests) == 6
    assert digest(build_network().eval()) == digest(first)


def test_object_is_refused_with_what_to_do_when_it_cannot_be_copied() -> None:
    module = build_network()
    module.cache = torch.ones(2, requires_grad=True) * 2  # type: ignore[assignment]
    assert "can't be copied" in refusal(ModuleSource(module, INPUTS, OUTPUTS))


def test_dict_of_outputs_is_exported_in_the_order_of_the_spec(
    bench: Workbench, tmp_path: Path
) -> None:
    for number, names in enumerate((("logits", "features"), ("logits",))):
        outputs = tuple(OutputSpec(name=name) for name in names)
        exported(ModuleSource(Dict(), INPUTS, outputs), bench, tmp_path / str(number))


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        pytest.param(Deciding(), "write it with torch.where or torch.cond", id="decides by data"),
        pytest.param(InPlace(), "double_", id="has a custom operator that works in place"),
    ],
)
def test_export_fails_by_name_with_what_to_do_when_the_model(
    module: nn.Module, advice: str, bench: Workbench, tmp_path: Path
) -> None:
    source = ModuleSource(module, INPUTS, OUTPUTS)
    check_model(source, samples(), n_classes=4)
    with pytest.raises(TechniqueFailed) as caught:
        exported(source, bench, tmp_path / "onnx")
    message = str(caught.value)
    assert message.startswith("export failed: the dynamo exporter says: ")
    assert advice in message
    assert "name the file as model.onnx in the spec" in message


@pytest.mark.full  # takes a while
def test_study_of_an_object_says_that_it_cannot_be_resumed(tmp_path: Path) -> None:
    path = in_a_hurry(write_study(tmp_path))
    text = path.read_text()
    path.write_text(text[: text.index("model:")] + text[text.index("data:") :])
    options = Options(store=tmp_path / "store.sqlite", verifier=FakeVerifier(), effort=QUICK)
    model = ModuleSource(build_network(), INPUTS, OUTPUTS)
    result = optimize(path, tmp_path / "models", options, model=model)
    assert result.outcome == "met"
    assert NOT_RESUMABLE in result.notes
