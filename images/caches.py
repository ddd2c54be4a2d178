"""Compiles the modules of an environment that serving loads, and no others.

Runs while the image is built, by the environment's own interpreter, after an installation that
compiled nothing. A container can't write bytecode, so without it each start would take longer; any
other module that is asked for all the same is compiled then.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec

PACKAGES = ("serve",)
"""All of their modules."""
MODULES = (
    "trimserve", "onnxruntime", "openvino", "tokenizers", "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin", "PIL.WebPImagePlugin", "s3fs", "aiobotocore.session", "botocore.handlers",
    "uvicorn.lifespan.on", "uvicorn.protocols.http.httptools_impl", "uvloop", "rich.markdown",
)  # fmt: skip
"""What those modules, and the packages below them, import when they are asked to."""


def write(packages: Iterable[str] = PACKAGES, modules: Iterable[str] = MODULES) -> None:
    """Import them, which writes the bytecode of all that is loaded then. What isn't installed is
    passed over; anything else that can't be imported raises ImportError."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        for package in packages:
            path = importlib.import_module(package).__path__
            for one in pkgutil.walk_packages(path, f"{package}."):
                _load(one.name)
        for name in modules:
            _load(name)
    finally:
        sys.dont_write_bytecode = before


def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or find_spec(missing) is not None:
            raise
