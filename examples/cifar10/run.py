"""The whole loop on a real network: ResNet-56 on CIFAR-10, without training.

    python examples/cifar10/run.py --data DIR --weights DIR

Finds the cheapest way to serve it within slo.yaml, serves that on free ports of this machine, and
sends it open-loop load over REST and gRPC. Above the table stands the command that makes it again.
Exit code 0 only if the verdict is "met"; what it makes is in demo-output/cifar10/.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from loop import Loop, shown  # noqa: E402 - the folder above

EXIT_USAGE = 2
# option -> (environment variable that the spec names, files that must be there, what they are)
SOURCES = {
    "data": (
        "TRIMSERVE_DATA",
        ("cifar10-train.parquet", "cifar10-test.parquet"),
        "CIFAR-10 as parquet files in the Hugging Face layout",
    ),
    "weights": (
        "TRIMSERVE_WEIGHTS",
        ("resnet56-cifar10.safetensors",),
        "weights for resnet.py as safetensors",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, (variable, files, what) in SOURCES.items():
        parser.add_argument(
            f"--{option}",
            metavar="DIR",
            default=os.environ.get(variable),
            help=f"folder with {' and '.join(files)}: {what} (default: ${variable})",
        )
    parser.add_argument("--output", type=Path, default=Path("demo-output", "cifar10"))
    arguments = parser.parse_args()
    problems = [
        problem
        for option in SOURCES
        if (problem := missing(option, getattr(arguments, option))) is not None
    ]
    if problems:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in problems))
        return EXIT_USAGE
    environ = {
        variable: str(Path(getattr(arguments, option)).resolve())
        for option, (variable, *_) in SOURCES.items()
    }
    spec, slo = (shown(HERE / name) for name in ("spec.yaml", "slo.yaml"))
    return Loop(spec, slo, arguments.output, environ=environ).run()


def missing(option: str, directory: str | None) -> str | None:
    """What is wrong with a folder, None if nothing is."""
    variable, files, what = SOURCES[option]
    want = f"want a folder with {' and '.join(files)} ({what})"
    if not directory:
        return f"--{option}: got nothing, and {variable} is not set, {want}"
    absent = [name for name in files if not Path(directory, name).is_file()]
    return f"--{option}: {directory} has no {' and no '.join(absent)}, {want}" if absent else None


if __name__ == "__main__":
    sys.exit(main())
