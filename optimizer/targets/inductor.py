"""TorchInductor at work, in a process of its own: `python -m optimizer.targets.inductor`.

So that equal programs give equal packages (it numbers graphs through the life of a process), and
that a compiler which hangs or fills the memory can be ended. It reads a program that this process's
parent wrote, and trusts it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimizer.targets.torch_program import quiet

_CONFIG: Mapping[str, Any] = {
    "freezing": True,
    # The number of threads is the server's choice, and not what this process happens to have.
    "cpp.dynamic_threads": True,
    # Names for the profiler, next to nothing where none is at work.
    "cpp.enable_kernel_profile": True,
    "aot_inductor.enable_line_tables": False,
}


def main(program: Path, package: Path) -> None:
    """Compile the archive `program` to the package."""
    import torch
    from torch._inductor import aoti_compile_and_package

    loaded = torch.export.load(program)
    with quiet(), torch.no_grad():  # weights are only folded without gradients
        aoti_compile_and_package(loaded, package_path=str(package), inductor_configs=dict(_CONFIG))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
