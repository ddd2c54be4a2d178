"""Texts of unequal lengths through one engine: what batching past mismatches and padding are worth.

A two-layer text encoder in ONNX Runtime, one thread; a number of clients each keep one request of
random length waiting or running. Compared, in interleaved rounds:

  alone     every request runs by itself
  closing   the batch is closed at the first request of another length, as Triton's batcher does
  lanes     requests of one length run together, whatever came between (a version without padding)
  buckets   lengths are padded into buckets, short requests ride along where that is cheaper

    python -m benchmarks.ragged [--clients 32] [--step 16] [--requests 1000]
"""

import argparse
import itertools
import math
import queue
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from serve.artifact import Batching, FileDigest, Manifest
from serve.batch_policy import BatchQueue, Decision, Entry, Limits, ServiceTimes
from serve.batcher import Batcher, Work
from serve.engines import EngineSpec, load_engine
from serve.padding import CutOutput, PaddedInput, Padding
from serve.warmup import measured_queue

MAX_BATCH_SIZE = 16
WIDTH = 128


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1000, WIDTH)
        self.query, self.key, self.value = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, ids, mask):
        state = self.embedding(ids)
        far = (mask.unsqueeze(1).to(torch.float32) - 1) * 1e9
        for _ in range(2):
            scores = self.query(state) @ self.key(state).transpose(1, 2) / math.sqrt(WIDTH)
            state = state + torch.softmax(scores + far, -1) @ self.value(state)
            state = state + self.down(torch.relu(self.up(state)))
        return state


class Closing:
    """A first-in first-out queue that closes a batch at the first request of another length."""

    def __init__(self, limit):
        self.limits, self.waiting, self.n_requests = Limits(limit, 10**6), [], 0
        self.times = ServiceTimes([1], [1.0])

    def times_of(self, _):
        return self.times

    def offer(self, entry, _):
        self.waiting.append(entry)
        self.n_requests += 1
        return True, ()

    def decide(self, _):
        if not self.waiting:
            return Decision()
        first = self.waiting[0].lane
        same = itertools.takewhile(lambda entry: entry.lane == first, self.waiting)
        batch = tuple(itertools.islice(same, self.limits.max_batch_size))
        del self.waiting[: len(batch)]
        self.n_requests -= len(batch)
        return Decision(batch, reason="drained", lane=first)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--step", type=int, default=16, help="between buckets of lengths")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder) / "encoder.onnx")
        run(Path(folder), arguments)


def export(path):
    torch.manual_seed(0)
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    torch.onnx.export(
        Encoder().eval(), (ids, mask), path, input_names=["ids", "mask"], output_names=["state"],
        dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length}), dynamo=True, verbose=False,
    )  # fmt: skip


def run(folder, arguments):
    random = np.random.default_rng(0)
    drawn = np.exp(random.normal(math.log(24), 0.7, arguments.requests))
    lengths = np.clip(np.rint(drawn), 1, arguments.max_length).astype(int)
    buckets = tuple(range(arguments.step, arguments.max_length + 1, arguments.step))
    padding = Padding(
        (PaddedInput("ids"), PaddedInput("mask")), buckets, (CutOutput("state"),), mask="mask"
    )
    spec = EngineSpec("onnxruntime", "encoder.onnx", threads=1)
    engine = load_engine(folder, spec, padding)
    batching = Batching(MAX_BATCH_SIZE, 0.0, 10**6)
    files = {"encoder.onnx": FileDigest("", 0)}
    manifest = Manifest("encoder", "1", engine.signature, spec, batching, files, padding=padding)
    measured = measured_queue(manifest, [engine])

    def lanes():
        return BatchQueue(Limits(MAX_BATCH_SIZE, 10**6), measured.times)

    def bucketed():
        return BatchQueue(measured.limits, measured.times, measured.lane_times)

    ways = {
        "alone": (lambda: Closing(1), None),
        "closing": (lambda: Closing(MAX_BATCH_SIZE), None),
        "lanes": (lanes, None),
        "buckets": (bucketed, padding),
    }
    results = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, (make, pads) in ways.items():
            results[name].append(one_round(engine, make(), pads, lengths, arguments.clients))
    base = statistics.median(rate for rate, _ in results["closing"])
    for name, rounds in results.items():
        rates = [rate for rate, _ in rounds]
        rows = statistics.median(mean for _, mean in rounds)
        print(f"{name:8} {statistics.median(rates):7.0f} requests/s ({min(rates):.0f} to "
              f"{max(rates):.0f})  {statistics.median(rates) / base:5.2f}x closing  "
              f"{rows:5.1f} rows a batch")  # fmt: skip


def one_round(engine, waiting, padding, lengths, n_clients):
    """Requests a second, and the mean batch, with `n_clients` requests waiting or running."""
    batches = queue.Queue()
    batcher = Batcher(("encoder", "1"), [engine], waiting, batches.put, padding)

    def submit(length):
        ids = np.full((1, length), 7, np.int64)
        work = Work({"ids": ids, "mask": np.ones_like(ids)}, 1, None, length)
        lane = padding.bucket_of(length) if padding else (length,)
        batcher.submit(Entry(work, 1, time.monotonic(), lane=lane))

    coming = iter(lengths.tolist())
    for length in itertools.islice(coming, n_clients):
        submit(length)
    started = time.perf_counter()
    batcher.start()
    sizes, done = [], 0
    while done < len(lengths):
        batch = batches.get()
        assert all(one.error is None for one in batch.completions)
        sizes.append(batch.n_rows)
        done += len(batch.completions)
        for length in itertools.islice(coming, len(batch.completions)):
            submit(length)
    seconds = time.perf_counter() - started
    batcher.close()
    return len(lengths) / seconds, statistics.mean(sizes)


if __name__ == "__main__":
    main()
