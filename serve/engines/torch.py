"""Eager torch: executes a program of `torch.export` (`model.pt2`), operator by operator.

The reference that the other engines are compared with, and the way out for a model that no other
format can hold. Batches of any size run as they are. Opening an archive can run code (torch
evaluates the expressions of its symbolic shapes), so the server wants to be told that it may.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.engines import EngineSpec, KernelTime, Signature
from serve.engines.torch_archive import (
    check_archive,
    check_options,
    cpu_precision,
    first_line,
    import_torch,
    limit_threads,
    read_signature,
    refuse_pickles,
    to_arrays,
    to_tensors,
)
from serve.errors import ArtifactInvalid
from serve.padding import Padding
from serve.tensor import Array

_NAME = "torch"
_PRECISIONS = ("fp32",)


class TorchEngine:
    """One module. torch releases the GIL inside of operators only."""

    def __init__(
        self, torch: Any, module: Any, signature: Signature, threads: int, device: str
    ) -> None:
        self.signature = signature
        self._torch = torch
        self._module = module
        self._threads = threads
        self._device = device

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._run(self._module, inputs)

    def close(self) -> None:
        del self._module

    def profile(self, inputs: Mapping[str, Array], n_runs: int) -> tuple[KernelTime, ...]:
        """One node of the program after the other, timed."""
        stopwatch = _stopwatch(self._torch, self._module)
        self._run(stopwatch.run, inputs)  # warms up
        stopwatch.durations_s.clear()
        for _ in range(n_runs):
            self._run(stopwatch.run, inputs)
        return tuple(
            KernelTime(node, operator, kernel, precision, total_s / n_runs)
            for (node, operator, kernel, precision), total_s in stopwatch.durations_s.items()
        )

    def _run(self, module: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        torch = self._torch
        limit_threads(torch, self._threads)
        tensors = to_tensors(torch, self.signature, inputs, self._device)
        with torch.inference_mode():
            outputs = module(*tensors)
        return to_arrays(self.signature, outputs)


def load(directory: Path, spec: EngineSpec, padding: Padding | None = None) -> TorchEngine:
    """Load the program. Raises ArtifactInvalid for a broken archive, one that holds pickles or
    compiled code, or an unknown option; EngineUnavailable without torch."""
    del padding
    torch = import_torch(_NAME)
    path = directory / spec.file
    device = check_options(path, spec)
    if spec.precision not in _PRECISIONS:
        raise ArtifactInvalid(
            str(path),
            f"engine.precision: got {spec.precision!r}, want one of {', '.join(_PRECISIONS)}",
        )
    check_archive(path)
    signature = read_signature(directory)
    try:
        refuse_pickles(path)
        program = torch.export.load(path)
        module = program.module()
    except Exception as error:  # torch raises many kinds, none of them documented
        raise ArtifactInvalid(str(path), f"torch can't load it: {first_line(error)}") from error
    return TorchEngine(torch, module.to(device), signature, spec.threads, device)


def profile(
    directory: Path, spec: EngineSpec, inputs: Mapping[str, Array], n_runs: int
) -> tuple[KernelTime, ...]:
    """The program's operators, each timed by itself; see `EngineModule.profile`."""
    return load(directory, spec).profile(inputs, n_runs)


def _stopwatch(torch: Any, module: Any) -> Any:
    """An interpreter of the module's graph that times its calls."""

    class Stopwatch(torch.fx.Interpreter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(module)
            self.durations_s: dict[tuple[str, str, str, str], float] = {}

        def run_node(self, n: Any) -> Any:
            if n.op != "call_function":
                return super().run_node(n)
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            start = time.perf_counter_ns()
            result = super().run_node(n)
            self._synchronize()
            seconds = (time.perf_counter_ns() - start) * 1e-9
            kernel = str(n.target)
            operator = kernel.removeprefix("aten.").partition(".")[0]
            tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
            precision = cpu_precision(str(tensors[0].dtype)) if tensors else "unknown"
            key = (n.name, operator, kernel, precision)
            self.durations_s[key] = self.durations_s.get(key, 0.0) + seconds
            return result

        def _synchronize(self) -> None:
            """A GPU's operators are only under way when they return."""
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()

    return Stopwatch()
