"""Takes the bytecode out of an environment that serving never loads.

Runs while the image is built, by the environment's own interpreter. An installer compiles every
module. Of those that the server loads the bytecode stays: its start would take longer without, and
a container can't write it. Any other module that is asked for all the same is compiled then.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("serve",)
"""All of their modules."""
MODULES = (
    "trimserve", "onnxruntime", "openvino", "tokenizers", "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin", "PIL.WebPImagePlugin", "s3fs", "aiobotocore.session", "botocore.handlers",
    "uvicorn.lifespan.on", "uvicorn.protocols.http.httptools_impl", "uvloop", "rich.markdown",
)  # fmt: skip
"""What those modules, and the packages below them, import when they are asked to."""


def take_out(folder: Path, loaded: Iterable[Path]) -> int:
    """Bytecode below the site-packages `folder` but for the files `loaded`; returns the bytes."""
    kept, n_bytes = set(loaded), 0
    for path in folder.rglob("__pycache__/*.pyc"):
        if path not in kept:
            n_bytes += path.stat().st_size
            path.unlink()
    return n_bytes


def load(packages: Iterable[str] = PACKAGES, modules: Iterable[str] = MODULES) -> set[Path]:
    """Import them; returns the bytecode's files of all that is loaded then. What isn't installed is
    passed over; anything else that can't be imported raises ImportError."""
    inside = (
        one.name
        for package in packages
        for one in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    )
    for name in (*inside, *modules):
        _load(name)
    cached = (getattr(one, "__cached__", None) for one in list(sys.modules.values()))
    return {Path(one) for one in cached if one}


def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or find_spec(missing) is not None:
            raise
