"""A Python object named in a spec as `module:attribute`.

It knows how to import what stands beside a spec without changing how anything else is
imported; it doesn't know what the object is for.
"""

import hashlib
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_PATH_LOCK = threading.RLock()


@dataclass(frozen=True)
class Importable:
    """`module:attribute`, where `module` lies in `directory` or is installed.

    A module found in `directory` is imported under a package name made of the directory's path,
    `trimserve_spec_<digest>.<module>`. So two specs may each have a `model.py`, and a `model`
    that the process had imported before is neither used nor replaced. While the module is
    imported, and while the object is called through `call`, `directory` stands first in
    `sys.path`, so that siblings can be imported by their plain names; those do land in
    `sys.modules` as such, hence of two specs with a sibling of the same name in one process
    the first wins. Afterwards `sys.path` is as it was.
    """

    module: str
    attribute: str
    directory: Path

    def __str__(self) -> str:
        return f"{self.module}:{self.attribute}"

    def load(self) -> Any:
        """Import the module and return the attribute.

        Raises whatever importing raises, and AttributeError for a missing attribute.
        """
        with _first_in_path(self.directory):
            found: Any = self._import()
        for part in self.attribute.split("."):
            found = getattr(found, part)
        return found

    def call(self, *arguments: Any) -> Any:
        """Import and call the attribute. Raises whatever that raises."""
        function = self.load()
        with _first_in_path(self.directory):
            return function(*arguments)

    def source_bytes(self) -> bytes:
        """The module's source where it lies in `directory`, else nothing: for digests."""
        source = self._local_source()
        return source.read_bytes() if source is not None else b""

    def _local_source(self) -> Path | None:
        path = self.directory.joinpath(*self.module.split("."))
        candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
        return next((file for file in candidates if file.is_file()), None)

    def _import(self) -> ModuleType:
        if self._local_source() is None:
            return importlib.import_module(self.module)
        return importlib.import_module(f"{_package(self.directory).__name__}.{self.module}")


def _package(directory: Path) -> ModuleType:
    """The package that holds the modules of `directory`, made on first use."""
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    name = f"trimserve_spec_{digest}"
    if name not in sys.modules:
        spec = ModuleSpec(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(directory)]
        sys.modules[name] = module_from_spec(spec)
    return sys.modules[name]


@contextmanager
def _first_in_path(directory: Path) -> Iterator[None]:
    entry = str(directory)
    with _PATH_LOCK:
        sys.path.insert(0, entry)
        try:
            importlib.invalidate_caches()
            yield
        finally:
            sys.path.remove(entry)
