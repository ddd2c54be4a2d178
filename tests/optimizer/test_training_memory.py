"""What a training frees: kept until it has ended. Page faults are counted, not timed."""

import ctypes
import resource
import subprocess
import sys

import pytest

from optimizer.training import memory
from optimizer.training.memory import kept_memory

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library isn't glibc"
)
_PAGES = 40 * 2**20 // resource.getpagesize()
PROGRAM = """
import resource, sys
import torch
from optimizer.training.memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.ones(40 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with kept_memory():
    with kept_memory():
        faults()
    print(faults())
print(faults())
"""


def test_large_blocks_are_not_faulted_in_again_inside() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    before, inside, after = map(int, run.stdout.split())
    # An aligned block seldom fits exactly where one of its size has been, so not all are reused.
    assert before >= 30 * _PAGES
    assert inside < 10 * _PAGES
    # What was kept is given back, though one of its holes may serve again and again since.
    assert after >= _PAGES


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="of the training"), kept_memory():
        raise RuntimeError("of the training")
    assert memory._n_inside == 0
