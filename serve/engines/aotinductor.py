"""AOTInductor: executes a package (`model.pt2`) that TorchInductor compiled to a native library.

The library is made for the instruction set of one kind of CPU, or for CUDA, and takes batches of
any size. Loading one runs its code: the server wants to be told that it may, and compares the
file with its digest before.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.engines import EngineSpec, KernelTime, Signature
from serve.engines.torch_archive import (
    check_archive,
    check_options,
    first_line,
    import_torch,
    limit_threads,
    read_signature,
    to_arrays,
    to_tensors,
)
from serve.errors import ArtifactInvalid
from serve.padding import Padding
from serve.tensor import Array

_NAME = "aotinductor"
_PRECISIONS = ("fp32",)
_FOLDER = "data/aotinductor/model/"
_RECORDS = ("archive_format", "archive_version", "byteorder", ".data/version",
            ".data/serialization_id", "version")  # fmt: skip
"""What an archive has beside the package. It can hold a program and pickles too, which are
refused: torch would read them."""
_GENERATED = re.compile(r"(?:graph_\d+_)?((?:cpp|triton)_\w*fused\w*)")
"""Names of the kernels that Inductor wrote: what was fused, and a number."""
_EXTERN = re.compile(r"aoti_torch_(?:cpu|cuda|mkldnn)_(\w+)")
"""Those of libraries, oneDNN's and torch's own."""
_INT8 = re.compile(r"qconv|qlinear|int8|_int_mm")


class AotInductorEngine:
    """One package. It releases the GIL while it runs."""

    def __init__(
        self, torch: Any, loader: Any, signature: Signature, threads: int, device: str
    ) -> None:
        self.signature = signature
        self._torch = torch
        self._loader = loader
        self._threads = threads
        self._device = device

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        torch = self._torch
        limit_threads(torch, self._threads)
        tensors = to_tensors(torch, self.signature, inputs, self._device)
        with torch.inference_mode():
            return to_arrays(self.signature, self._loader.boxed_run(tensors))

    def close(self) -> None:
        del self._loader

    def profile(self, inputs: Mapping[str, Array], n_runs: int) -> tuple[KernelTime, ...]:
        """By torch's profiler."""
        profiler = self._torch.profiler
        self.run(inputs)
        activities = [profiler.ProfilerActivity.CPU]
        with profiler.profile(activities=activities) as recorded:
            for _ in range(n_runs):
                self.run(inputs)
        with tempfile.TemporaryDirectory() as scratch:
            trace = Path(scratch) / "trace.json"
            recorded.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        return tuple(_kernel_times(events, n_runs))


def load(directory: Path, spec: EngineSpec, padding: Padding | None = None) -> AotInductorEngine:
    """Load the package. Raises ArtifactInvalid for a broken one, one for another kind of machine,
    or an unknown option; EngineUnavailable without torch."""
    del padding
    torch = import_torch(_NAME)
    path = directory / spec.file
    device = check_options(path, spec)
    if spec.precision not in _PRECISIONS:
        raise ArtifactInvalid(
            str(path),
            f"engine.precision: got {spec.precision!r}, want one of {', '.join(_PRECISIONS)}",
        )
    _check_entries(path, check_archive(path))
    signature = read_signature(directory)
    try:
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(path), run_single_threaded=True)
    except Exception as error:  # torch raises many kinds, none of them documented
        raise ArtifactInvalid(
            str(path), f"AOTInductor can't load it: {first_line(error)}"
        ) from error
    return AotInductorEngine(torch, package.loader, signature, spec.threads, device)


def profile(
    directory: Path, spec: EngineSpec, inputs: Mapping[str, Array], n_runs: int
) -> tuple[KernelTime, ...]:
    """The kernels that Inductor wrote and those of libraries; see `EngineModule.profile`."""
    return load(directory, spec).profile(inputs, n_runs)


def _check_entries(path: Path, names: Sequence[str]) -> None:
    others = sorted(n for n in names if not n.startswith(_FOLDER) and n not in _RECORDS)
    if others:
        raise ArtifactInvalid(str(path), f"can't load it: it holds {others[0]}, want code alone")
    if not any(name.startswith(_FOLDER) and name.endswith(".so") for name in names):
        raise ArtifactInvalid(str(path), "can't load it: it holds no compiled model")


def _kernel_times(events: Sequence[Mapping[str, Any]], n_runs: int) -> Iterator[KernelTime]:
    """Each run calls the same kernels in the same order; which one it is, its place says."""
    kernels = [one for one in events if one.get("ph") == "X" and _is_kernel(str(one["name"]))]
    kernels.sort(key=lambda one: float(one["ts"]))
    n_calls = len(kernels) // n_runs
    for place in range(n_calls):
        calls = kernels[place::n_calls]
        name = str(calls[0]["name"])
        seconds = sum(float(one["dur"]) for one in calls) * 1e-6 / n_runs
        precision = "int8" if _INT8.search(name) else "fp32"
        yield KernelTime(f"{place}:{name}", _operator(name), name, precision, seconds)


def _is_kernel(name: str) -> bool:
    return bool(_GENERATED.fullmatch(name) or _EXTERN.fullmatch(name))


def _operator(name: str) -> str:
    extern = _EXTERN.fullmatch(name)
    if extern is not None:
        return extern.group(1).removeprefix("mkldnn_").lstrip("_").removesuffix("_out")
    generated = _GENERATED.fullmatch(name)
    assert generated is not None
    parts = re.sub(r"^(?:cpp|triton)_\w*?fused_|_?\d*$", "", generated.group(1))
    return parts or "fused"
