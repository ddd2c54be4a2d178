"""Torch modules built from a source: a factory and its weights, an exported program, an object.

Weights are read from safetensors, never unpickled; the factory, however, is the user's code and
runs in this process. What is done to a module after that is `optimizer.torch_variant`'s matter.
"""

import copy
import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import SpecInvalid
from optimizer.exported import load_program
from optimizer.spec import ExportedSource, ModuleSource, TorchKind, TorchSource

if TYPE_CHECKING:
    import torch

_MAX_NAMED = 5


def load_source(source: TorchKind) -> "torch.nn.Module":
    """The source's module, with its weights; float32 CPU, eval mode.

    Nobody else holds the module. Raises SpecInvalid where the factory fails, the weights don't
    fit it key by key, an archive or object can't be used, or the module isn't float32.
    """
    if isinstance(source, ExportedSource):
        module = _from_program(source.path)
    elif isinstance(source, ModuleSource):
        module = _copied(source.module)
    else:
        module = _from_factory(source)
    _check_precision(module, shown(source))
    return module.eval()


def shown(source: TorchKind) -> str:
    """The source in an error message."""
    if isinstance(source, TorchSource):
        return str(source.factory)
    return str(source.path) if isinstance(source, ExportedSource) else type(source.module).__name__


def named_outputs(result: object, names: Sequence[str]) -> "dict[str, torch.Tensor]":
    """What `forward` returned, by the names of the outputs: of a dict or a dict-like object the
    keys, of a tensor or a tuple in that order. Raises ValueError where they don't fit."""
    import torch

    if isinstance(result, Mapping):
        absent = [name for name in names if name not in result]
        if absent:
            keys = ", ".join(map(str, result))
            raise ValueError(f"returned the keys {keys}; model.outputs names {', '.join(absent)}")
        result = tuple(result[name] for name in names)
    tensors = tuple(result) if isinstance(result, tuple | list) else (result,)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        types = ", ".join(type(tensor).__name__ for tensor in tensors)
        raise ValueError(f"returned {types}, want tensors, a tuple or a dict of them")
    if len(tensors) != len(names):
        raise ValueError(
            f"returned {len(tensors)} tensors, the spec names {len(names)}: {', '.join(names)}"
        )
    return dict(zip(names, tensors, strict=True))


def module_digest(module: "torch.nn.Module") -> str:
    """SHA-256 (hex) of all tensors, and of each layer's class, with its source where Python has
    it, and plain attributes. Attributes that are objects, and what the code calls, aren't in it.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        kind = type(part)
        digest.update(f"{name}\0{kind.__module__}.{kind.__qualname__}\0".encode())
        digest.update(f"{_source_of(kind)}\0{part.extra_repr()}\0".encode())
        digest.update(repr(sorted(filter(_is_plain, vars(part).items()))).encode())
    tensors = {**module.state_dict(), **dict(module.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _source_of(kind: type) -> str:
    if kind.__module__.startswith("torch."):
        return ""  # the version of torch is in the steps
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _is_plain(attribute: tuple[str, Any]) -> bool:
    name, value = attribute
    if name == "training":
        return False
    parts = value if isinstance(value, tuple | list) else (value,)
    return all(part is None or isinstance(part, bool | int | float | str) for part in parts)


def _bytes(tensor: "torch.Tensor") -> bytes:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _from_factory(source: TorchSource) -> "torch.nn.Module":
    """What the factory draws beside its weights is the same each time, and the process's random
    numbers stay as they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _build(source)
    problems = load_weights(module, source.weights)
    if problems:
        raise _invalid(
            str(source.weights),
            f"model.weights: {source.weights} doesn't fit the factory: {'; '.join(problems)}",
        )
    return module


def _from_program(path: Path) -> "torch.nn.Module":
    module = load_program(path).module()
    # They only refuse to work: a program computes the same in both modes.
    for refusing in ("train", "eval"):
        vars(module).pop(refusing, None)
    return module


def _copied(module: "torch.nn.Module") -> "torch.nn.Module":
    try:
        return copy.deepcopy(module).cpu()
    except Exception as error:
        raise _invalid(
            type(module).__name__,
            f"model: {type(module).__name__} can't be copied ({type(error).__name__}: {error}), "
            "name a factory in the spec instead",
        ) from error


def _check_precision(module: "torch.nn.Module", name: str) -> None:
    import torch

    for key, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
            raise _invalid(
                name,
                f"model: {name} has {key} in {str(tensor.dtype).removeprefix('torch.')}, want "
                "float32: convert it by model.float(); the search tries lower precisions itself",
            )


def load_weights(module: "torch.nn.Module", path: Path) -> list[str]:
    """Load the safetensors at `path` into the module; returns why they don't fit, the first
    few reasons, and then loads nothing.

    Tied tensors are one in the file, whichever of their names it bears there. Raises SpecInvalid
    where the file isn't safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _invalid(str(path), f"model.weights: {path}: not safetensors: {error}") from error
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = [
        *_named("missing", _untied(module, wanted.keys() - given.keys(), given.keys())),
        *_named("unexpected", given.keys() - wanted.keys()),
        *(
            f"{key} is {list(given[key].shape)}, want {list(wanted[key])}"
            for key in sorted(wanted.keys() & given.keys())
            if tuple(given[key].shape) != wanted[key]
        ),
    ]
    if not problems:
        module.load_state_dict(given, strict=False)
    return problems[:_MAX_NAMED]


def _build(source: TorchSource) -> "torch.nn.Module":
    import torch

    name = str(source.factory)
    try:
        module = source.factory.call()
    except ModuleNotFoundError as error:
        raise _invalid(
            name,
            f"model.factory: {error.msg}, want a module beside the spec "
            f"({source.factory.directory}) or installed",
        ) from error
    except Exception as error:
        raise _invalid(
            name, f"model.factory: {name} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise _invalid(
            name, f"model.factory: {name} returned {type(module).__name__}, want a torch.nn.Module"
        )
    return module


def _untied(module: "torch.nn.Module", missing: Set[str], given: Iterable[str]) -> set[str]:
    """The missing keys whose tensor isn't loaded under another name."""
    state = module.state_dict()
    loaded = {state[key].data_ptr() for key in given if key in state}
    return {key for key in missing if state[key].data_ptr() not in loaded}


def _named(what: str, keys: Set[str]) -> list[str]:
    if not keys:
        return []
    shown = ", ".join(sorted(keys)[:_MAX_NAMED])
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return [f"{what} {shown}{more}"]


def _invalid(source: str, problem: str) -> SpecInvalid:
    return SpecInvalid(source, [problem])
