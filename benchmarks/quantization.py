"""Our quantization against onnxruntime.quantization's, NNCF's and Olive's: the same networks, the
same calibration samples, the same bound on accuracy, timed in turns.

    python -m benchmarks.quantization_models models
    python -m benchmarks.quantization models --others-python env/bin/python \
        [--results benchmarks/results/quantization.json] [--only resnet56] \
        [--stage build|judge|time] [--stop-after-s 150]
    python -m benchmarks.quantization models --table

The others run in an environment of their own (`--others-python`, with nncf, olive-ai,
onnxruntime, onnx and openvino), which needn't agree with ours in anything. Needs TRIMSERVE_DATA.
Every finished part is kept in the results, and a rerun goes on from there: `--stop-after-s` lets
timings be taken in short stretches. The ratio of a timing is theirs by ours: above 1 ours is
faster.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer

from optimizer.data.splits import Samples
from optimizer.parity import fixed_sizes
from optimizer.quantization.dynamic import quantize_dynamic
from optimizer.quantization.graph import Graph, folded
from optimizer.quantization.layout import layers_of
from optimizer.quantization.processor import kernel_layout
from optimizer.quantization.qdq import Arithmetic
from optimizer.quantization.sensitivity import fewest
from optimizer.quantization.static import Settings, prepare
from optimizer.timing import Contender, Effort, measure
from serve.engines import EngineSpec, load_engine
from serve.machine import this_machine

SIZES = (1, 8)
EFFORT = Effort(min_passes=12, max_passes=120, seconds=6.0, max_warmup_passes=12, max_retries=0)
ENGINES = ("onnxruntime", "openvino")
MAX_EVALUATIONS = 5
"""Of accuracy, when layers to keep in fp32 are sought."""
OTHERS_TIMEOUT_S = 1200.0
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Samples in memory."""

    inputs: Arrays
    labels: np.ndarray
    name: str = "calibration"
    digest: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Any = None) -> Samples:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        return Samples({name: array[chosen] for name, array in self.inputs.items()}, None, "")


def rows_of(file: str, start: int, end: int) -> tuple[list[Any], np.ndarray]:
    table = pq.read_table(Path(os.environ["TRIMSERVE_DATA"]) / file).slice(start, end - start)
    return table.column(0).to_pylist(), np.array(table["label"].to_pylist())


def images(
    file: str, start: int, end: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ArraySplit:
    rows, labels = rows_of(file, start, end)
    pixels = []
    for row in rows:
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels.append(np.asarray(image.crop((left, top, left + size, top + size))))
    scaled = (np.stack(pixels).astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return ArraySplit({"image": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}, labels)


def sentences(models: Path, file: str, start: int, end: int) -> ArraySplit:
    rows, labels = rows_of(file, start, end)
    tokenizer = Tokenizer.from_file(str(models / "minilm-tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)
    found = tokenizer.encode_batch(rows)
    ids = np.array([one.ids for one in found], np.int64)
    mask = np.array([one.attention_mask for one in found], np.int64)
    return ArraySplit({"input_ids": ids, "attention_mask": mask}, labels)


CIFAR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = ((0.498,) * 3, (0.502,) * 3)
# network -> samples from `start` to `end`, by what they are for
SAMPLES: Mapping[str, Mapping[str, Callable[[Path], ArraySplit]]] = {
    "resnet56": {
        "calibration": lambda _: images("cifar10-train.parquet", 0, 256, 32, *CIFAR),
        "evaluation": lambda _: images("cifar10-train.parquet", 45000, 45500, 32, *CIFAR),
    },
    "efficientnet-lite0": {
        "calibration": lambda _: images("imagenet-sample-500.parquet", 0, 96, 224, *LITE),
        "evaluation": lambda _: images("imagenet-sample-500.parquet", 100, 500, 224, *LITE),
    },
    "outlying": {
        "calibration": lambda _: images("imagenet-sample-500.parquet", 0, 96, 224, *LITE),
        "evaluation": lambda _: images("imagenet-sample-500.parquet", 100, 500, 224, *LITE),
    },
    "minilm": {
        "calibration": lambda models: sentences(models, "wordnet-train.parquet", 0, 96),
        "evaluation": lambda models: sentences(models, "wordnet-test.parquet", 0, 256),
    },
}
ENCODERS = ("minilm",)
OTHERS = ("onnxruntime-minmax", "onnxruntime-entropy", "onnxruntime-percentile", "nncf-onnx",
          "nncf-openvino", "olive")  # fmt: skip
OTHERS_OF_ENCODERS = (*OTHERS, "onnxruntime-dynamic")
MAX_DROP_POINTS = 0.5
MIN_RANK_CORRELATION = 0.99
BATCH_SIZE = 16
MIXED = "ours, mixed"


def ours(network: str, arithmetic: Arithmetic) -> dict[str, Settings]:
    """What the search begins with, by name."""
    if network in ENCODERS:
        return {
            "ours": Settings(arithmetic, smoothing=0.75),
            "ours, not smoothed": Settings(arithmetic),
            "ours, dynamic": Settings(arithmetic, "minmax"),
        }
    return {
        "ours": Settings(arithmetic),
        "ours, minmax": Settings(arithmetic, "minmax"),
        "ours, entropy": Settings(arithmetic, "entropy"),
        "ours, equalized": Settings(arithmetic, equalize="weights"),
        "ours, biases as they are": Settings(arithmetic, corrects_biases=False),
    }


class Results:
    """A JSON file of finished parts, by a path of keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def once(self, keys: tuple[str, ...], make: Callable[[], Any]) -> Any:
        found = self.content
        for key in keys[:-1]:
            found = found.setdefault(key, {})
        if keys[-1] not in found:
            found[keys[-1]] = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")
            print(" / ".join(keys), json.dumps(found[keys[-1]])[:200], flush=True)
        return found[keys[-1]]


@dataclass(frozen=True)
class Bench:
    """One network with its files."""

    models: Path
    network: str
    results: Results
    others_python: Path | None

    @property
    def model(self) -> Path:
        return self.models / f"{self.network}.onnx"

    @property
    def is_encoder(self) -> bool:
        return self.network in ENCODERS

    @property
    def arithmetic(self) -> Arithmetic:
        activations, saturates = kernel_layout(this_machine())
        return Arithmetic(activations == "int8", saturates, least_error=True)

    @property
    def others(self) -> tuple[str, ...]:
        return OTHERS_OF_ENCODERS if self.is_encoder else OTHERS

    def file(self, contender: str) -> Path:
        suffix = "xml" if contender == "nncf-openvino" else "onnx"
        name = contender.replace(",", "").replace(" ", "-")
        return self.models / f"{self.network}.{name}.{suffix}"

    def samples(self, purpose: str) -> ArraySplit:
        return SAMPLES[self.network][purpose](self.models)

    # --- building

    def build(self) -> None:
        for name, settings in ours(self.network, self.arithmetic).items():
            self._once("build", name, lambda name=name, s=settings: self._ours(name, s))
        calibration = self.models / f"{self.network}.calibration.npz"
        if not calibration.is_file():
            np.savez(calibration, **self.samples("calibration").inputs)
        for tool in self.others:
            self._once("build", tool, lambda tool=tool: self._theirs(tool, calibration))

    def _once(self, stage: str, name: str, make: Callable[[], Any]) -> Any:
        return self.results.once((self.network, stage, name), make)

    def _ours(self, name: str, settings: Settings) -> dict[str, Any]:
        start, calibration = time.perf_counter(), self.samples("calibration")
        graph = folded(self.model)
        if name == "ours, dynamic":
            made: Graph = quantize_dynamic(
                graph,
                pairs_saturate=settings.arithmetic.pairs_saturate,
                least_error=True,
            )
        else:
            made = prepare(graph, calibration, settings).quantized()
        self.file(name).write_bytes(made.to_bytes())
        return {"seconds": round(time.perf_counter() - start, 1)}

    def _theirs(self, tool: str, calibration: Path) -> dict[str, Any]:
        if self.others_python is None:
            raise SystemExit("--others-python is needed to build theirs")
        command = [str(self.others_python), str(Path(__file__).with_name("quantization_others.py")),
                   tool, str(self.model), str(calibration), str(self.file(tool))]  # fmt: skip
        command += ["--encoder"] * self.is_encoder
        command += ["--saturates"] * self.arithmetic.pairs_saturate
        start = time.perf_counter()
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=OTHERS_TIMEOUT_S, check=False
        )
        found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
        if ended.returncode:
            found["error"] = (ended.stderr.strip().splitlines() or ["no word"])[-1][:300]
        return found

    # --- judging

    def contenders(self) -> list[str]:
        built = self.results.content.get(self.network, {}).get("build", {})
        return [name for name, one in built.items() if "error" not in one]

    def judge(self) -> None:
        samples = self.samples("evaluation")
        wanted = outputs_of("onnxruntime", self.model, "fp32", samples)
        base = self._judged(wanted, wanted, samples.labels)
        self._once("quality", "fp32", lambda: {"onnxruntime": base})
        for name in self.contenders():
            self._once("quality", name, lambda name=name: self._judge(name, wanted, samples))
        if MIXED not in self.contenders() and not self._meets("ours", "onnxruntime"):
            self._once("build", MIXED, lambda: self._mixed(wanted, samples))
            name = MIXED
            self._once("quality", name, lambda: self._judge(name, wanted, samples))

    def _judge(self, name: str, wanted: np.ndarray, samples: ArraySplit) -> dict[str, Any]:
        found = {}
        for engine in ENGINES:
            if engine == "onnxruntime" and self.file(name).suffix == ".xml":
                continue
            try:
                given = outputs_of(engine, self.file(name), "int8", samples)
                found[engine] = self._judged(given, wanted, samples.labels)
            except Exception as error:  # noqa: BLE001  whatever an engine says of a strange file
                found[engine] = {"error": str(error).splitlines()[0][:200]}
        return found

    def _judged(self, given: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        error = float(((given - wanted) ** 2).mean() / wanted.var())
        if self.is_encoder:
            return {"rank": round(rank_correlation(given, wanted), 4), "error": error}
        right = given.argmax(axis=1) == labels
        agree = given.argmax(axis=1) == wanted.argmax(axis=1)
        return {"top1": float(right.mean()), "agree": float(agree.mean()), "error": error}

    def _meets(self, name: str, engine: str) -> bool:
        quality = self.results.content[self.network]["quality"]
        found = quality[name].get(engine, {"error": ""})
        if "top1" in found:
            drop = 100 * (quality["fp32"]["onnxruntime"]["top1"] - found["top1"])
            return bool(drop <= MAX_DROP_POINTS)
        return bool(found.get("rank", 0) >= MIN_RANK_CORRELATION)

    def _mixed(self, wanted: np.ndarray, samples: ArraySplit) -> dict[str, Any]:
        """As few layers in fp32 as meet the bound."""
        start, calibration = time.perf_counter(), self.samples("calibration")
        graph = folded(self.model)
        prepared = prepare(graph, calibration, ours(self.network, self.arithmetic)["ours"])
        ranking = prepared.ranking(calibration)
        target = self.file(MIXED)
        n_layers, asked = len(layers_of(graph)), []
        n_parts = len(ranking.parts)

        def is_enough(n: int) -> bool:
            target.write_bytes(prepared.quantized(ranking.first(n)).to_bytes())
            given = outputs_of("onnxruntime", target, "int8", samples)
            quality = self.results.content[self.network]["quality"]
            quality[MIXED] = {"onnxruntime": self._judged(given, wanted, samples.labels)}
            meets = self._meets(MIXED, "onnxruntime")
            del quality[MIXED]
            asked.append(n)
            return meets

        n = fewest(n_parts, is_enough, MAX_EVALUATIONS)
        target.write_bytes(prepared.quantized(ranking.first(n)).to_bytes())
        seconds = round(time.perf_counter() - start, 1)
        kept = len(ranking.first(n))
        return {"seconds": seconds, "parts": n, "kept": kept, "layers": n_layers, "asked": asked}

    # --- timing

    def time(self, is_over: Callable[[], bool]) -> None:
        samples = self.samples("evaluation").inputs
        inputs = {name: array[:64] for name, array in samples.items()}
        quality = self.results.content[self.network]["quality"]
        for engine in ENGINES:
            for name in ["fp32", *self.contenders()]:
                if is_over():
                    return
                found = quality[name].get(engine, {"error": ""})
                usable = name == "fp32" or not isinstance(found.get("error"), str)
                if usable and name != "ours":
                    self.results.once(
                        (self.network, "time", engine, name),
                        lambda name=name, engine=engine: self._time(engine, name, inputs),
                    )

                if name == MIXED and engine == "openvino":
                    self.results.once(
                        (self.network, "time", engine, f"{MIXED}, rest in bf16"),
                        lambda: self._time("openvino", MIXED, inputs, {"rest": "bf16"}),
                    )

    def _time(
        self, engine: str, name: str, inputs: Arrays, options: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        mine = self._contender(engine, self.file("ours"), "int8")
        theirs = (
            self._contender(engine, self.model, "fp32")
            if name == "fp32"
            else self._contender(engine, self.file(name), "int8", options)
        )
        timing = measure(mine, theirs, inputs, SIZES, effort=EFFORT)
        assert timing.speedup is not None
        ratio = [timing.speedup.low, timing.speedup.estimate, timing.speedup.high]
        return {
            "ratio": [round(one, 3) for one in ratio],
            "ours_ms": {str(t.batch_size): round(t.p50_s * 1e3, 3) for t in timing.times.times},
        }

    def _contender(
        self, engine: str, path: Path, precision: str, options: Mapping[str, str] | None = None
    ) -> Contender:
        sizes = fixed_sizes(engine, SIZES)
        spec = EngineSpec(engine, path.name, precision, 1, 1, sizes, options or {})
        return Contender(path.parent, spec)


def outputs_of(engine: str, path: Path, precision: str, samples: ArraySplit) -> np.ndarray:
    sizes = fixed_sizes(engine, (BATCH_SIZE,))
    loaded = load_engine(path.parent, EngineSpec(engine, path.name, precision, 2, 1, sizes))
    found = []
    for start in range(0, len(samples), BATCH_SIZE):
        batch = {name: array[start : start + BATCH_SIZE] for name, array in samples.inputs.items()}
        found.append(next(iter(loaded.run(batch).values())))
    return np.concatenate(found)


def rank_correlation(given: np.ndarray, wanted: np.ndarray) -> float:
    """Spearman's, of the cosines of all pairs."""

    def ranks(vectors: np.ndarray) -> np.ndarray:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        return np.argsort(np.argsort(cosines)).astype(float)

    return float(np.corrcoef(ranks(given), ranks(wanted))[0, 1])


def table(results: Mapping[str, Any]) -> None:
    for network, parts in results.items():
        print(f"\n{network}\n")
        is_encoder = network in ENCODERS
        measure_name = "rank correlation" if is_encoder else "top-1"
        heads = [f"{engine}: {what}" for engine in ENGINES for what in
                 (measure_name, "squared error", "time by ours [95%]")]  # fmt: skip
        print("| | built in s | " + " | ".join(heads) + " |")
        print("|---|---|" + "---|" * len(heads))
        for name in ["fp32", *parts["build"]]:
            built = parts["build"].get(name, {})
            cells = [str(built.get("seconds", ""))]
            for engine in ENGINES:
                cells += cells_of(parts, name, engine)
            print(f"| {name} | " + " | ".join(cells) + " |")


def cells_of(parts: Mapping[str, Any], name: str, engine: str) -> list[str]:
    found = parts["quality"].get(name, {}).get(engine, {})
    if "top1" in found:
        quality = f"{found['top1']:.2%}"
    else:
        quality = f"{found['rank']:.4f}" if "rank" in found else found.get("error", "")[:40]
    error = found["error"] if isinstance(found.get("error"), float) else None
    ratio = parts.get("time", {}).get(engine, {}).get(name, {}).get("ratio")
    shown = f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]" if ratio else ""
    return [quality, "" if error is None else f"{error:.4f}", "1" if name == "ours" else shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--others-python", type=Path)
    here = Path(__file__).parent
    parser.add_argument("--results", type=Path, default=here / "results" / "quantization.json")
    parser.add_argument("--only", choices=SAMPLES, nargs="*", default=[*SAMPLES])
    parser.add_argument("--stage", choices=("build", "judge", "time"))
    parser.add_argument("--stop-after-s", type=float, default=float("inf"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    results, start = Results(given.results), time.monotonic()
    if given.table:
        return table(results.content)
    for network in given.only:
        bench = Bench(given.models, network, results, given.others_python)
        if given.stage in (None, "build"):
            bench.build()
        if given.stage in (None, "judge"):
            bench.judge()
        if given.stage in (None, "time"):
            bench.time(lambda: time.monotonic() - start > given.stop_after_s)
    return None


if __name__ == "__main__":
    sys.exit(main())
