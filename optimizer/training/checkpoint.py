"""Checkpoints: how far a training has come, so that it can go on after it was killed.

One safetensors file with tensors by name, and counters and a digest of the tensors as JSON in its
header; it is replaced whole. It doesn't know what the tensors are.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """At `path`, of the training that `identity` names: a digest of all that decides it."""

    path: Path
    identity: str

    def save(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, float]) -> None:
        """Replace what is there. Raises OSError."""
        kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        header = {"format": _FORMAT, "identity": self.identity, "counters": dict(counters),
                  "digest": _digest(kept)}  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            save_file(kept, partial, {"training": json.dumps(header)})
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
        """What was saved last; None where nothing was, it is damaged, or is another training's."""
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("training", "{}"))
                if header.get("format") != _FORMAT or header.get("identity") != self.identity:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return (tensors, header["counters"]) if header["digest"] == _digest(tensors) else None
        except (OSError, SafetensorError, ValueError):
            return None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of names and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
