"""Values of a spec, and what they are relative to: paths against the spec's folder, variables from
its environment, functions by `module:attribute`.

Files have to be there; no user code is imported.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import AfterValidator, BeforeValidator, Field

from optimizer.importable import Importable

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_IMPORTABLE = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_][\w.]*)")


class Resolver(Protocol):
    """Decides for a spec from elsewhere what its paths mean and which functions it may name.

    Both raise ValueError, with what is wanted instead."""

    def path(self, text: str) -> Path: ...

    def function(self, name: str) -> None: ...


@dataclass(frozen=True)
class _Surroundings:
    """What values in a spec are relative to."""

    directory: Path
    environ: Mapping[str, str]
    resolver: Resolver | None = None


_surroundings: ContextVar[_Surroundings] = ContextVar("spec_surroundings")


@contextmanager
def within(
    directory: Path, environ: Mapping[str, str], resolver: Resolver | None = None
) -> Iterator[None]:
    """Read values relative to these. With a `resolver` paths are what it says, whether or not
    they are there, and variables aren't expanded."""
    token = _surroundings.set(_Surroundings(directory, environ, resolver))
    try:
        yield
    finally:
        _surroundings.reset(token)


def _here() -> _Surroundings:
    """The spec being read, or for models built in Python the working directory."""
    return _surroundings.get(None) or _Surroundings(Path.cwd(), os.environ)


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not environ.get(name):
            raise ValueError(f"want the environment variable {name} to be defined")
        return environ[name]

    return _VARIABLE.sub(value, text)


def _existing_file(value: object) -> object:
    """Expand `${VAR}`, make absolute against the spec's directory; the file must exist."""
    path = _absolute(value)
    if _is_unchecked(value) and not path.is_file():
        raise ValueError(f"want an existing file, {path} is none")
    return path


def _existing_path(value: object) -> object:
    """The same for a file or a folder."""
    path = _absolute(value)
    if _is_unchecked(value) and not path.exists():
        raise ValueError(f"want an existing file or folder, {path} is none")
    return path


def _is_unchecked(value: object) -> bool:
    return not isinstance(value, Path) and _here().resolver is None


def _absolute(value: object) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("want a path")
    here = _here()
    if here.resolver is not None:
        return here.resolver.path(value)
    return Path(os.path.abspath(here.directory / _expanded(value, here.environ)))


def _importable(value: object) -> object:
    if isinstance(value, Importable):
        return value
    match = _IMPORTABLE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("want 'module:function', the module beside the spec or installed")
    here = _here()
    if here.resolver is not None:
        here.resolver.function(match[0])
    return Importable(match["module"], match["attribute"], here.directory)


def _without_code(value: Path) -> Path:
    if value.suffix != ".safetensors":
        raise ValueError(
            "want a .safetensors file: a pickled checkpoint can run code, "
            "convert it by safetensors.torch.save_file(model.state_dict(), path)"
        )
    return value


def listed(value: object) -> object:
    """YAML knows lists only; ours are frozen."""
    return tuple(value) if isinstance(value, list) else value


ExistingFile = Annotated[Path, BeforeValidator(_existing_file)]
Weights = Annotated[Path, BeforeValidator(_existing_file), AfterValidator(_without_code)]
ExistingPath = Annotated[Path, BeforeValidator(_existing_path)]
FunctionName = Annotated[Importable, BeforeValidator(_importable)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Share = Annotated[float, Field(ge=0, le=1)]
