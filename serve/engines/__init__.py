"""Engines: the runtimes that execute an artifact, one module each.

This module holds the contract and the table of names; it imports no runtime. An engine is
loaded from a file and an `EngineSpec`, runs batches, and can say which kernels really ran.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from serve.padding import Padding
from serve.tensor import Array, TensorSpec

EngineOption = str | int | float | bool

# engine name -> (module, extra that installs its runtime)
ENGINES: dict[str, tuple[str, str]] = {
    "onnxruntime": ("serve.engines.onnxruntime", "cpu"),
    "openvino": ("serve.engines.openvino", "openvino"),
    "torch": ("serve.engines.torch", "torch"),
    "aotinductor": ("serve.engines.aotinductor", "torch"),
}
RUNS_CODE = frozenset({"torch", "aotinductor"})
"""Engines whose files can carry code that loading them runs: for trusted repositories only."""


@dataclass(frozen=True)
class Signature:
    """Tensors in and out; every shape starts with the batch dimension where `batched`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool = True


@dataclass(frozen=True)
class EngineSpec:
    """How an artifact is executed.

    `threads` is per instance, `instances` run batches concurrently, `precision` is what the
    arithmetic is declared to run in ("fp32", "bf16", "int8", ...). `batch_sizes` are the sizes
    that an engine with fixed shapes compiles for; a batch is padded to the next of them.
    """

    name: str
    file: str
    precision: str = "fp32"
    threads: int = 1
    instances: int = 1
    batch_sizes: tuple[int, ...] = ()
    options: Mapping[str, EngineOption] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelTime:
    """One executed kernel: the graph node's name and operator, the kernel that the runtime
    chose for it, the precision of its arithmetic, and the seconds spent in a run. `sources` are
    the nodes of the model that it computes, where the runtime tells."""

    node: str
    operator: str
    kernel: str
    precision: str
    duration_s: float
    sources: tuple[str, ...] = ()


class Engine(Protocol):
    """One instance. `run` is called from one thread at a time."""

    @property
    def signature(self) -> Signature: ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, for inputs whose arrays share the batch dimension.

        Arrays are owned by the caller and not kept; results own their memory. Raises
        InvalidRequest for values that the model can't take, anything else for its own failures.
        """
        ...

    def close(self) -> None: ...


class EngineModule(Protocol):
    """What each module in `ENGINES` provides."""

    def load(self, directory: Path, spec: EngineSpec, padding: Padding | None = None) -> Engine:
        """One instance. `padding` names the lengths that inputs will have, for engines that
        compile fixed shapes."""
        ...

    def profile(
        self, directory: Path, spec: EngineSpec, inputs: Mapping[str, Array], n_runs: int
    ) -> tuple[KernelTime, ...]:
        """The kernels that one run executes, timed as a mean over `n_runs`, in a session of
        its own, since profiling slows a session down."""
        ...


class EngineUnavailable(Exception):
    """The engine's runtime isn't installed, or the name is unknown."""


def engine_module(name: str) -> EngineModule:
    """The module of engine `name`; raises EngineUnavailable, which says what to install."""
    if name not in ENGINES:
        raise EngineUnavailable(f"engine {name!r} is unknown, want one of {', '.join(ENGINES)}")
    module, extra = ENGINES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineUnavailable(
            f"engine {name!r} can't be loaded ({error}); pip install 'trimserve[{extra}]'"
        ) from error


def load_engine(directory: Path, spec: EngineSpec, padding: Padding | None = None) -> Engine:
    """Load one instance of the engine that `spec` names on the files in `directory`."""
    return engine_module(spec.name).load(directory, spec, padding)
