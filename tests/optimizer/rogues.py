"""Techniques made for tests of what runs them: one that behaves as badly as its parameter says, one
that refuses, one that isn't what it claims. They are named in specs as plugins."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from optimizer.blocks import Block
from optimizer.recipe import Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_variant import load_torch, torch_model
from optimizer.variant import Kind, Model, Stage, TorchModel, TorchVariant

PLUGINS = tuple(f"tests.optimizer.rogues:{name}" for name in ("Rogue", "Refusing", "Lossy"))


class Rogue:
    """Changes nothing, in a way of its own."""

    traits = Traits("rogue", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH)

    def check(self, model: Model, context: Context) -> str | None:
        return None

    def space(self, model: Model, context: Context) -> Space:
        ways = ("talks", "listens", "raises", "is killed", "hangs")
        return {"way": Categorical(ways)}

    def timed_blocks(self, model: Model, context: Context) -> Sequence[Block]:
        return (Block("conv", (3, 8, 8), 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),)

    def describe(self, parameters: Parameters) -> str:
        return f"a rogue that {parameters['way']}"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        behave(str(parameters["way"]))
        return torch_model(directory, model, load_torch(model))


def behave(way: str) -> None:
    match way:
        case "talks":
            print('{"answer": "from print"}')  # noqa: T201 - what it is for
            os.write(1, b'{"answer": "from the descriptor"}\n')
            subprocess.run(["echo", '{"answer": "from a child"}'], check=True)
        case "listens":
            assert sys.stdin.read() == ""
            assert os.read(0, 1) == b""
        case "raises":
            raise RuntimeError("a layer without a name")
        case "is killed":
            sys.stderr.write("last words\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":  # with a child, which keeps standard error open
            subprocess.Popen(["sh", "-c", "echo lingering >&2; sleep 1000; true"])
            signal.pause()


class Refusing(Rogue):
    traits = Traits("refusing", "1", Stage.DECOMPOSE, Kind.TORCH, Kind.TORCH)

    def check(self, model: Model, context: Context) -> str | None:
        return "no layer is wide enough"

    def space(self, model: Model, context: Context) -> Space:
        return {}


class Lossy(Rogue):
    """Claims to preserve outputs, and doubles a weight."""

    traits = Traits("lossy", "1", Stage.DECOMPOSE, Kind.TORCH, Kind.TORCH)

    def space(self, model: Model, context: Context) -> Space:
        return {}

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        module = load_torch(model)
        next(module.parameters()).data.mul_(2)
        return torch_model(directory, model, module)
