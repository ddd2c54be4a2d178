"""The whole loop in minutes: train, optimize, serve and load-test a small network.

    make demo            or            python examples/digits/demo.py

Trains a convolutional network on scikit-learn's digits, finds the cheapest way to serve it within
slo.yaml, serves that on free ports of this machine, and sends it open-loop load over REST and
gRPC. Exit code 0 only if the verdict is "met"; what it makes is in demo-output/.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from loop import Loop, make_console, run_step, shown, step  # noqa: E402 - the folder above


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()
    console = make_console()
    step(console, "Train: a small convolutional network on scanned digits")
    code = run_step([sys.executable, str(HERE / "train.py")])
    if code != 0:
        return code
    arguments.output.mkdir(parents=True, exist_ok=True)
    inputs = arguments.output / "inputs.npz"
    with np.load(HERE / "test.npz") as test:
        np.savez(inputs, image=test["image"])
    spec, slo = shown(HERE / "spec.yaml"), shown(HERE / "slo.yaml")
    return Loop(spec, slo, arguments.output, inputs, console=console).run()


if __name__ == "__main__":
    sys.exit(main())
