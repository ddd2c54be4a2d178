"""AOTInductor as a target: TorchInductor writes C++ for the model, and a compiler makes a library.

Weights are folded into the library ("freezing"), so that convolutions can be laid out and fused
when it is made. It needs a C++ compiler here, and runs where the same instructions are.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from optimizer.space import Categorical, Parameters
from optimizer.targets.archive import write_archive
from optimizer.targets.torch_program import export_program, quiet
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Model, TorchModel, engine_model
from serve.engines import EngineSpec
from serve.machine import this_machine

_FILE = "model.pt2"
_ROOT = Path(__file__).resolve().parents[2]
_MAX_STRIP_S = 120
_COMPILERS = ("g++", "clang++", "c++")
_MAX_COMPILE_S = 3600
_MAX_ERROR_LINES = 5
_DIGEST = re.compile(rb"(?<![a-z0-9])c[a-z2-7]{51}(?![a-z0-9])")
"""Inductor names files by SHA-256 of their content, in base 32."""
_NO_DIGEST = b"c" + b"0" * 51
_ADDRESS = re.compile(rb"(?<= at )0x[0-9a-f]+(?=>)")
"""Of Python objects, in texts for debuggers."""


@dataclass(frozen=True)
class AotInductorTarget:
    """On the CPU; on CUDA it hasn't run yet, for want of a GPU."""

    device: str = "cpu"
    name: str = "aotinductor"
    shown: str = "AOTInductor"

    def why_not(self, context: Context) -> str | None:
        if util.find_spec("torch") is None:
            return "it isn't installed: pip install 'trimserve[torch]'"
        if not any(map(shutil.which, _COMPILERS)):
            return f"no C++ compiler here, want one of {', '.join(_COMPILERS)} on the PATH"
        if context.machine.differences(this_machine()):
            return "it compiles for the machine that it is on, and the target is another"
        if self.device == "cuda" and not _has_gpu():
            return "no NVIDIA GPU, or torch isn't built for CUDA"
        return None

    def space(self, model: Model, context: Context) -> Mapping[str, Categorical]:
        del model, context
        if self.device != "cpu":
            return {}
        # So that a package's id tells what it was compiled for.
        return {"instructions": Categorical((_instructions(),))}

    def describe(self, parameters: Parameters) -> str:
        del parameters
        return self.shown

    def compile(self, model: Model, parameters: Parameters, directory: Path) -> EngineModel:
        import torch

        assert isinstance(model, TorchModel)
        if self.device == "cpu" and parameters["instructions"] != _instructions():
            raise ValueError(
                f"want a processor with {parameters['instructions']}, this has {_instructions()}"
            )
        program = export_program(model, directory, self.device)
        with tempfile.TemporaryDirectory() as scratch:
            source, package = Path(scratch) / "program.pt2", Path(scratch) / _FILE
            with quiet():
                torch.export.save(program, source)
            _compile(source, package)
            write_archive(package, directory / _FILE, _without_origin)
        options = {} if self.device == "cpu" else {"device": self.device}
        return engine_model(
            directory, EngineSpec("aotinductor", _FILE, options=options), model.notes
        )


def _compile(program: Path, package: Path) -> None:
    """In another process. Raises RuntimeError with its last words, and TimeoutExpired."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(  # noqa: S603 - our own module, as a list
        [sys.executable, "-P", "-m", "optimizer.targets.inductor", str(program), str(package)],
        capture_output=True,
        check=False,
        timeout=_MAX_COMPILE_S,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        said = " | ".join(line.strip() for line in lines[-_MAX_ERROR_LINES:])
        raise RuntimeError(f"compiling ended with {done.returncode}: {said}")


CPU = AotInductorTarget()
CUDA = AotInductorTarget("cuda", "aotinductor_cuda", "AOTInductor CUDA")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _instructions() -> str:
    """The vector instructions that Inductor writes for here."""
    from torch._inductor import cpu_vec_isa

    return str(cpu_vec_isa.pick_vec_isa()).lower() or "none"


def _without_origin(name: str, content: bytes) -> tuple[str, bytes] | None:
    """Without what tells this machine or this process: equal models give equal packages.

    Sources are left out. Names made of digests of the sources get one name. In the library,
    paths and addresses are blanked at their length, so that its own addresses stay true.
    """
    if name.endswith(".cpp"):
        return None
    name = _DIGEST.sub(_NO_DIGEST, name.encode()).decode()
    if not name.endswith(".so"):
        return name, content
    library = _ADDRESS.sub(lambda found: b"0" * len(found[0]), _stripped(content))
    library = _DIGEST.sub(_NO_DIGEST, library)
    for path in map(str.encode, _places()):
        library = library.replace(path, b"." + b"/" * (len(path) - 1))
    return name, library


def _places() -> tuple[str, str]:
    import torch
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(Path(torch.__file__).parent), cache_dir()


def _stripped(library: bytes) -> bytes:
    """Without symbols for debuggers and the id of the build, where the tool for it is there."""
    strip = shutil.which("strip")
    if strip is None:
        return library
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        command = [strip, "--strip-debug", "--remove-section=.note.gnu.build-id", file.name]
        subprocess.run(command, check=True, capture_output=True, timeout=_MAX_STRIP_S)  # noqa: S603
        return Path(file.name).read_bytes()
