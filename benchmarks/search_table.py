"""A space small enough to try everything in: all of it built, trained, judged and timed.

    python -m benchmarks.search_table FOLDER [--judge [--part I N] | --time | --write OUT.json]

ResNet-20 on CIFAR-10: 1 to 3 blocks in each of three stages, all or half of the inner channels,
trained by distillation (`examples/cifar10/shrink.py`, for fewer passes), as fp32 or int8, on ONNX
Runtime or OpenVINO, and the untouched network: 220 points, one core. `benchmarks/search.py` replays
searches on the table that `--write` makes. Each step goes on where it was stopped: FOLDER has the
store. `--judge` takes an hour of one core, doesn't mind company, and can be split into N parts that
run at once; `--time` minds.

Before and after short training a network is judged in eager torch, for all four of its engines:
int8 moves accuracy by a point, missing training by tens. The full training is judged in each
engine.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from optimizer.blocks import block_inputs, write_block
from optimizer.evaluator import Evaluator
from optimizer.execution.setup import Surroundings, enabled_techniques, read_data
from optimizer.judgement import Judgement
from optimizer.measuring.local import LocalMeasurer
from optimizer.recipe import EFFORTS, Recipe
from optimizer.serving import Serving
from optimizer.simulation import FrontEnd
from optimizer.space import Categorical, defaults
from optimizer.spec import read_spec
from optimizer.store import Key, Store
from optimizer.tasks import make_task
from optimizer.tasks.scores import Scores, concatenated
from optimizer.techniques.quantization import Quantization
from optimizer.timing import Contender, Effort
from optimizer.torch_variant import load_torch
from optimizer.variant import Kind
from serve.machine import this_machine

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10"
CORES = 1
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
N_VALIDATION = 1000
EPOCHS = {"recalibrate": 0.0, "short": 0.02, "full": 0.08}
WIDTHS = (1.0, 0.5)
ENGINES = ("onnxruntime", "openvino")
BLOCK_SIZES = (1, 8, 32)
EFFORT = Effort(seconds=1.2, max_warmup_s=0.5, max_retries=1)
# Nothing is infeasible by these: a table is of everything, a replay sets its own limits.
SLO = {
    "apiVersion": "trimserve/v1",
    "kind": "SLO",
    "name": "search",
    "latency": {"quantile": 0.99, "threshold_ms": 50},
    # So that the engine's work outweighs the front end's.
    "workload": {"rate_per_s": 20, "rows": 8},
    "accuracy": {"max_drop_points": 100},
}


def brief_distillation():
    """The example's, for fewer passes."""
    import shrink

    found = shrink.Distill()
    found.passes = EPOCHS
    return found


class Int8(Quantization):
    """One kind of it, the default."""

    def space(self, model, context):
        chosen = defaults(super().space(model, context))
        return {name: Categorical((value,)) for name, value in chosen.items()}


class Table:
    """What the study would set up, without the search."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.spec = read_spec(_written(folder))
        self.splits = read_data(self.spec)
        measurer = LocalMeasurer()
        techniques = enabled_techniques(self.spec) | {
            "distill": brief_distillation(),
            "quantization": Int8(),
        }
        surroundings = Surroundings(self.spec, self.splits, measurer.machine, techniques)
        surroundings.check()
        self.store = Store(folder / "store.db")
        self.builder = surroundings.builder(self.store)
        self.evaluator = Evaluator(
            self.store, measurer, CORES, BATCH_SIZES, self.builder.inputs, self.spec.seed, EFFORT
        )
        self.task = make_task(self.spec.task, has_labels=True)
        self.judgement = Judgement(self.evaluator, self.task, 0.95, self.spec.seed)
        self.base = self.builder.build(next(self.recipes(None)))

    def shapes(self) -> Iterator[dict | None]:
        """None first, for the network as it is."""
        yield None
        depths = itertools.product((3, 1, 2), (3, 2, 1), (3, 2, 1))
        for blocks, width in itertools.product(depths, WIDTHS):
            yield {**{f"blocks_{n}": b for n, b in enumerate(blocks, 1)}, "width": width}

    def recipes(self, shape: dict | None) -> Iterator[Recipe]:
        """Of the shape's four engines; fp32 on ONNX Runtime first."""
        techniques = self.builder.techniques
        network = Recipe(Kind.TORCH)
        if shape is not None:
            network = network.then(techniques["shrink"].traits, shape)
            network = network.then(techniques["distill"].traits, {"effort": "full"})
        exported = network.then(techniques["export"].traits, {})
        option = self.builder.option("quantization", _bare(exported))
        int8 = {name: one.default for name, one in option.space.items()}
        for recipe in (exported, exported.then(option.traits, int8)):
            compiling = self.builder.option("compilation", _bare(recipe))
            for engine in ENGINES:
                given = {"engine": engine}
                for name, one in compiling.space.items():
                    if one.when and engine in one.when["engine"]:
                        given[name] = one.default
                yield recipe.then(compiling.traits, given)

    def judge(self, part: int, n_parts: int) -> None:
        for number, shape in enumerate(self.shapes()):
            if number % n_parts != part:
                continue
            start = time.monotonic()
            for recipe in self.recipes(shape):
                variant = self.builder.build(recipe)
                parent = self.builder.find(variant.parent_id)
                self.evaluator.check(variant, parent.model)
                quality = self.judgement.quality(variant, self.base, self.splits.validation)
            if shape:
                self._early_drops(shape)
            print(
                f"{number:3} {shape} drop {quality.drop:.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )

    def time(self) -> None:
        """Every variant against the base, in turns, and every block."""
        for number, shape in enumerate(self.shapes()):
            for recipe in self.recipes(shape):
                timing, *_ = self.evaluator.timings(self.builder.build(recipe), self.base, 0.0)
                speedup = timing.speedup
                print(
                    f"{number:3} {self.builder.label(recipe)} x{speedup.estimate:.2f}", flush=True
                )

    def write(self, path: Path) -> None:
        serving = Serving(self.spec, CORES, FrontEnd())
        blocks, rows = {}, []
        for shape in self.shapes():
            counts = {}
            if shape is not None:
                recipe = next(self.recipes(shape))
                found = self.builder.blocks(recipe) or {}
                blocks |= {block.key: block for block in found}
                counts = {block.key: count for block, count in found.items()}
            drops = self._early_drops(shape) if shape else {}
            for recipe in self.recipes(shape):
                rows.append(self._row(recipe, shape, drops, counts, serving))
                print(len(rows), rows[-1]["label"], rows[-1]["serving"]["cost_per_million"])
        table = {
            "machine": asdict(self.evaluator.machine),
            "slo": SLO,
            "epochs": EPOCHS,
            "n_validation": N_VALIDATION,
            "base": self.base.id,
            "blocks": {key: self._block_times(block) for key, block in blocks.items()},
            "rows": rows,
        }
        path.write_text(json.dumps(table, separators=(",", ":")) + "\n")

    def _early_drops(self, shape: dict) -> dict[str, dict]:
        """By effort, of the network before its full training, in eager torch."""
        network = Recipe(Kind.TORCH, next(self.recipes(shape)).choices[:2])
        return {effort: self._eager_quality(network.with_effort(effort)) for effort in EFFORTS[:2]}

    def _eager_quality(self, network: Recipe) -> dict:
        variant, split = self.builder.build(network), self.splits.validation
        key = Key(variant.id, self.evaluator.machine, "eager", 1, {"split": split.digest})
        stored = self.store.recorded(key)
        if stored is None:
            module, parts = load_torch(variant.model), []
            with torch.inference_mode():
                for outputs, labels in self._batches(module):
                    parts.append(self.task.scores({"logits": outputs}, labels, None))
            stored = concatenated(parts).to_dict()
            self.store.record(key, stored)
        ours, theirs = Scores.from_dict(stored), self.judgement.scores(self.base, self.base, split)
        return asdict(self.task.quality(ours, theirs, 0.95, split.name, split.digest))

    def _batches(self, module):
        for start in range(0, N_VALIDATION, 100):
            samples = self.splits.validation.read(np.arange(start, start + 100))
            yield module(torch.from_numpy(samples.inputs["image"])).numpy(), samples.labels

    def _drop(self, recipe: Recipe) -> dict:
        variant = self.builder.build(recipe)
        return asdict(self.judgement.quality(variant, self.base, self.splits.validation))

    def _row(self, recipe, shape, drops, counts, serving) -> dict:
        variant = self.builder.build(recipe)
        quality = self._drop(recipe)
        timing, *_ = self.evaluator.timings(variant, self.base, 0.0)
        times = replace(timing.times, quantiles=())
        return {
            "label": self.builder.label(recipe),
            "shape": shape,
            "int8": variant.model.precision == "int8",
            "engine": variant.model.spec.name,
            "size_bytes": variant.model.size_bytes(),
            "times": asdict(times),
            "speedup": asdict(timing.speedup),
            "serving": asdict(serving.choose([timing.times])),
            "quality": {**drops, "full": quality},
            "blocks": counts,
        }

    def _block_times(self, block) -> dict:
        """By engine and batch size, seconds."""
        found = {}
        for engine in ENGINES:
            with self.store.workshop() as directory:
                model = write_block(block, engine, directory, this_machine())
                contender = Contender(directory, model.served(CORES, 1, BLOCK_SIZES))
                inputs = block_inputs(block, BLOCK_SIZES[-1], 0)
                timing = self.evaluator.measurer.time(
                    contender, None, inputs, BLOCK_SIZES, effort=EFFORT, seed=0
                )
            found[engine] = {str(one.batch_size): one.p50_s for one in timing.times.times}
        return found


def _bare(recipe: Recipe) -> Recipe:
    return recipe.skeleton()


def _written(folder: Path) -> Path:
    """The example's spec, for this space."""
    spec = yaml.safe_load((EXAMPLE / "resnet20.yaml").read_text())
    spec["slo"] = str(folder / "slo.yaml")
    spec["data"]["validation"]["rows"] = [45000, 45000 + N_VALIDATION]
    (folder / "slo.yaml").write_text(yaml.safe_dump(SLO))
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLE))
    table = Table(arguments.folder.resolve())
    if arguments.judge:
        table.judge(*arguments.part)
    if arguments.time:
        table.time()
    if arguments.write:
        table.write(arguments.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
