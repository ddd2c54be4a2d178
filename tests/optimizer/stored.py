"""Facts to store, small ones, and a program whose writers write them until they are killed.

    python -m tests.optimizer.stored LOCATION ARTIFACTS

For each study named on standard input it starts a writer, a process of its own, and says with
which status that ended. The writer says a line with its process id before it opens the store,
and one for each fact once that is kept.
"""

import os
import sys
from itertools import count
from pathlib import Path

from optimizer.store import Key, Store, StoredVariant
from optimizer.variant import onnx_model
from serve.artifact import Step
from serve.machine import Machine

MACHINE = Machine("a processor", ("avx2",), 2, "Linux", {})
STEP = Step("quantization", "1", {"calibration": "minmax", "reduce_range": False}, 0, {"onnx": "1"})


def variant(
    store: Store, variant_id: str = "v", content: bytes = b"weights", parent_id: str = "parent"
) -> StoredVariant:
    with store.workshop() as directory:
        (directory / "model.onnx").write_bytes(content)
        model = onnx_model(directory, "model.onnx", "int8", ("a note",))
        return store.add(StoredVariant(variant_id, parent_id, STEP, "data", model, 1.5))


def timing_of(variant_id: str) -> Key:
    return Key(variant_id, MACHINE, "timing", 1, {"threads": 1})


def write(location: str, artifacts: Path, study: str) -> None:
    say(f"opening {os.getpid()}")
    with Store(location, artifacts) as store:
        for number in count(1):
            name = f"{study}-{number}"
            store.record(timing_of(name), {"p50_s": number})
            say(f"measurement {name} {number}")
            store.log_trial(study, number, {"variant": name})
            say(f"trial {study} {number}")
            store.log_look(study, name, study)
            say(f"look {study} {number}")
            variant(store, name, name.encode())
            say(f"variant {name} {number}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(location: str, artifacts: Path) -> None:
    for line in sys.stdin:
        writer = os.fork()  # importing all anew for each would take most of the time
        if writer == 0:
            write(location, artifacts, line.strip())
        _, status = os.waitpid(writer, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
