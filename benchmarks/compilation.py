"""What each engine makes of three networks: latency by batch size and threads, quality, size and
build time, with the options that were tried.

    python -m benchmarks.compilation build resnet56 --work DIR
    python -m benchmarks.compilation time resnet56 --work DIR --threads 1
    python -m benchmarks.compilation quality resnet56 --work DIR
    python -m benchmarks.compilation table

All contenders of a network and a number of threads take turns in one run, and batch sizes change
from call to call; a ratio is the median over passes of eager torch's time by the contender's.
What is in benchmarks/results/compilation.json isn't done again; `--machine NAME` keeps another
machine's results in compilation-NAME.json beside it.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compilation_networks import NETWORKS, Network
from optimizer.data.splits import Samples, Split
from optimizer.model_source import source_digest
from optimizer.space import defaults
from optimizer.techniques import Context, load_technique
from optimizer.variant import Model, OnnxModel, source_model
from serve.engines import Engine, EngineOption, EngineSpec, load_engine
from serve.machine import this_machine

RESULTS = Path(__file__).parent / "results"
SIZES = (1, 8, 32)
MIN_PASSES, MAX_PASSES, MAX_SECONDS = 8, 60, 60.0
REFERENCE = "eager torch"
N_CALIBRATION = 128


@dataclass(frozen=True)
class Contender:
    """`files` is the folder below the work directory; `fixed` compiles for each of SIZES."""

    files: str
    engine: str
    precision: str = "fp32"
    options: Mapping[str, EngineOption] = field(default_factory=dict)
    fixed: bool = False
    changing: bool = True
    """False: each size alone, over and over, as a server never has it."""


CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender("torch", "torch"),
    "AOTInductor": Contender("aotinductor", "aotinductor"),
    "ONNX Runtime": Contender("onnx", "onnxruntime"),
    "ONNX Runtime, extended": Contender(
        "onnx", "onnxruntime", options={"optimization": "extended"}
    ),
    "ONNX Runtime, basic": Contender("onnx", "onnxruntime", options={"optimization": "basic"}),
    "ONNX Runtime, plain layout": Contender("onnx", "onnxruntime", options={"layout": "plain"}),
    "ONNX Runtime, no arena": Contender("onnx", "onnxruntime", options={"arena": False}),
    "ONNX Runtime, no memory pattern": Contender(
        "onnx", "onnxruntime", options={"memory_pattern": False}
    ),
    "ONNX Runtime, spinning": Contender("onnx", "onnxruntime", options={"spinning": True}),
    "ONNX Runtime int8": Contender("int8", "onnxruntime", "int8"),
    "ONNX Runtime int8, extended": Contender(
        "int8", "onnxruntime", "int8", {"optimization": "extended"}
    ),
    "OpenVINO": Contender("onnx", "openvino", fixed=True),
    "OpenVINO, dynamic shape": Contender("onnx", "openvino"),
    "OpenVINO, dynamic shape, one size": Contender("onnx", "openvino", changing=False),
    "OpenVINO, throughput hint": Contender(
        "onnx", "openvino", options={"hint": "THROUGHPUT"}, fixed=True
    ),
    "OpenVINO, a stream a thread": Contender(
        "onnx", "openvino", options={"streams": "threads"}, fixed=True
    ),
    "OpenVINO bf16": Contender("onnx", "openvino", "bf16", fixed=True),
    "OpenVINO int8": Contender("int8", "openvino", "int8", fixed=True),
    "OpenVINO int8, dynamic shape": Contender("int8", "openvino", "int8"),
    "OpenVINO int8, dynamic shape, one size": Contender("int8", "openvino", "int8", changing=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("build", "time", "quality", "table"))
    parser.add_argument("network", nargs="?", choices=tuple(NETWORKS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", help="whose results: compilation-NAME.json")
    given = parser.parse_args()
    kept = RESULTS / ("compilation" + (f"-{given.machine}" if given.machine else "") + ".json")
    if given.what == "table":
        print("\n".join(table(results(kept))))
        return
    work = given.work / given.network
    part = given.network + (f"/{given.threads}" if given.what == "time" else f"/{given.what}")
    if part in results(kept)["parts"]:
        print(f"{part} is there already")
        return
    network = NETWORKS[given.network]()
    done = {"build": build, "quality": quality, "time": measure}[given.what]
    keep(kept, part, done(network, work, given.threads))


def results(kept: Path) -> dict[str, Any]:
    if not kept.exists():
        return {"machine": asdict(this_machine()), "parts": {}}
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def keep(kept: Path, part: str, value: object) -> None:
    found = results(kept)
    found["parts"][part] = value
    RESULTS.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


# --- building


def build(network: Network, work: Path, threads: int) -> dict[str, Any]:
    """Seconds and bytes by folder."""
    del threads
    model = source_model(network.source, source_digest(network.source))
    context = Context(_split(network), this_machine(), 0, max(SIZES))
    found: dict[str, Any] = {}

    def make(name: str, technique: str, parent: Model, **given: str) -> Model:
        directory = work / name
        directory.mkdir(parents=True)
        one = load_technique(technique)
        parameters = defaults(one.space(parent, context), **given)
        start = time.perf_counter()
        made = one.apply(parent, parameters, context, directory)
        files = [file.stat().st_size for file in directory.iterdir()]
        found[name] = {"build_s": time.perf_counter() - start, "size_bytes": sum(files)}
        print(name, found[name], *getattr(made, "notes", ()))
        return made

    make("torch", "torch_compilation", model, engine="torch")
    exported = make("onnx", "export", model)
    assert isinstance(exported, OnnxModel)
    try:
        make("int8", "quantization", exported)
    except Exception as error:  # noqa: BLE001 - the matrix goes on without
        print("int8:", error)
    make("openvino", "compilation", exported, engine="openvino")
    make("aotinductor", "torch_compilation", model, engine="aotinductor")
    return found


class _Memory:
    """A split in memory, as techniques read it."""

    name = "calibration"
    digest = "benchmark"

    def __init__(self, inputs: Mapping[str, np.ndarray]) -> None:
        self._inputs = inputs

    def __len__(self) -> int:
        return min(N_CALIBRATION, len(next(iter(self._inputs.values()))))

    def read(self, indices: Any = None) -> Any:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)

        inputs = {name: array[chosen] for name, array in self._inputs.items()}
        return Samples(inputs, None, self.digest)


def _split(network: Network) -> Split:
    return _Memory(network.inputs)  # type: ignore[return-value]


# --- measuring


def load(work: Path, one: Contender, threads: int) -> Engine:
    folder = work / one.files
    sizes = SIZES if one.fixed else ()
    file = "model.pt2" if one.engine in ("torch", "aotinductor") else "model.onnx"
    spec = EngineSpec(one.engine, file, one.precision, threads, 1, sizes, one.options)
    return load_engine(folder, spec)


def contenders(work: Path) -> Iterator[tuple[str, Contender]]:
    for name, one in CONTENDERS.items():
        if (work / one.files).is_dir():
            yield name, one


def measure(network: Network, work: Path, threads: int) -> dict[str, Any]:
    """Median seconds and ratios to eager torch, by contender and batch size."""
    random = np.random.default_rng(0)
    engines = {name: load(work, one, threads) for name, one in contenders(work)}
    seconds: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in SIZES} for name in engines
    }
    n = len(next(iter(network.inputs.values())))
    for engine in engines.values():
        for size in SIZES:
            engine.run({k: v[:size] for k, v in network.inputs.items()})
    gc.disable()
    start = time.perf_counter()
    for number in range(MAX_PASSES):
        if number >= MIN_PASSES and time.perf_counter() - start > MAX_SECONDS:
            break
        calls = []
        for size in random.permutation(SIZES):
            first = int(random.integers(n - size + 1))
            calls.append({k: v[first : first + size] for k, v in network.inputs.items()})
        for name in random.permutation(list(engines)):
            for batch in calls:
                size = len(next(iter(batch.values())))
                if not CONTENDERS[name].changing:
                    engines[name].run(batch)  # so that the timed call finds the size as it was
                begin = time.perf_counter()
                engines[name].run(batch)
                seconds[name][size].append(time.perf_counter() - begin)
    reference = seconds[REFERENCE]
    return {
        name: {
            str(size): {
                "median_s": float(np.median(taken)),
                "ratio": float(np.median(np.divide(reference[size], taken))),
                "n": len(taken),
            }
            for size, taken in of_sizes.items()
        }
        for name, of_sizes in seconds.items()
    }


def quality(network: Network, work: Path, threads: int) -> dict[str, Any]:
    """Top-1 where there are labels, else the mean cosine to eager torch; and the largest
    difference to eager torch, relative to its largest value."""
    wanted: np.ndarray | None = None
    found = {}
    for name, one in contenders(work):
        if one.options or not one.changing or "dynamic" in name:
            continue
        engine = load(work, replace(one, fixed=one.fixed), threads)
        given = np.concatenate(list(_outputs(engine, network)))
        wanted = given if wanted is None else wanted
        difference = float(np.abs(given - wanted).max() / np.abs(wanted).max())
        found[name] = {"difference": difference, **_scores(given, wanted, network)}
        print(name, found[name])
    return found


def _scores(given: np.ndarray, wanted: np.ndarray, network: Network) -> dict[str, float]:
    if network.labels is not None:
        return {
            "top1": float((given.argmax(1) == network.labels).mean()),
            "agreement": float((given.argmax(1) == wanted.argmax(1)).mean()),
        }
    norms = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
    return {"cosine": float(((given * wanted).sum(1) / norms).mean())}


def _outputs(engine: Engine, network: Network) -> Iterator[np.ndarray]:
    n = len(next(iter(network.inputs.values())))
    for start in range(0, n, max(SIZES)):
        batch = {k: v[start : start + max(SIZES)] for k, v in network.inputs.items()}
        yield next(iter(engine.run(batch).values())).astype(np.float64)


# --- showing


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """In the words of docs/experiments.md."""
    parts = found["parts"]
    for name in NETWORKS:
        times = {n: parts[f"{name}/{n}"] for n in (1, 2) if f"{name}/{n}" in parts}
        if not times:
            continue
        columns = [(n, size) for n in times for size in SIZES]
        heads = " | ".join(f"{n} thr, batch {size}" for n, size in columns)
        yield f"\n**{name}** (ms a batch, and eager torch's time by it)\n"
        yield f"| contender | {heads} | quality | MB | build s |"
        yield "|---|" + "---|" * (len(columns) + 3)
        built, qualities = parts.get(f"{name}/build", {}), parts.get(f"{name}/quality", {})
        for contender in next(iter(times.values())):
            cells = [_cell(times[n].get(contender, {}).get(str(size))) for n, size in columns]
            made = built.get(_folder(contender), {})
            yield (
                f"| {contender} | {' | '.join(cells)} | {_quality(qualities.get(contender))} | "
                f"{made.get('size_bytes', 0) / 1e6:.1f} | {made.get('build_s', 0):.1f} |"
            )


def _folder(contender: str) -> str:
    one = CONTENDERS[contender]
    return "openvino" if (one.engine, one.files) == ("openvino", "onnx") else one.files


def _cell(found: Mapping[str, float] | None) -> str:
    return f"{found['median_s'] * 1e3:.3g} ({found['ratio']:.2f}×)" if found else ""


def _quality(found: Mapping[str, float] | None) -> str:
    if not found:
        return ""
    shown = f"{found['top1']:.1%}" if "top1" in found else f"cos {found['cosine']:.5f}"
    return f"{shown}, Δ {found['difference']:.0e}"


if __name__ == "__main__":
    main()
