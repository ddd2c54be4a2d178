"""Takes what serving never loads out of an environment that an image is made of.

Runs while the image is built. What is taken out is in `UNUSED`; files that an installed package has
no longer are an error, so that an update of the package is seen. After them go the ends of shared
libraries (segments.py); then what is left is compiled as far as it is loaded (caches.py). It
doesn't know images, nor what installed the packages, whose metadata stay.
"""

import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path

from images import caches, segments

UNUSED: dict[str, dict[str, str]] = {
    "onnxruntime": {
        "onnxruntime/capi/libonnxruntime.so.*": "for programs in C; Python's module has its own",
        "onnxruntime/transformers": "makes models",
        "onnxruntime/quantization": "makes models",
        "onnxruntime/tools": "makes models",
    },
    "openvino": {
        "openvino/frontend/[!_o]*/": "versions are IR or ONNX",
        "openvino/tools": "makes models",
        "openvino/torch": "compiles for torch",
        "openvino/libs/libopenvino_intel_gpu_plugin.so": "the engine compiles for the CPU",
        "openvino/libs/cache.json": "tuning of the GPU's kernels",
        "openvino/libs/libopenvino_intel_npu_plugin.so": "the engine compiles for the CPU",
        "openvino/libs/libopenvino_tensorflow*": "versions are IR or ONNX",
        "openvino/libs/libopenvino_pytorch*": "versions are IR or ONNX",
        "openvino/libs/libopenvino_paddle*": "versions are IR or ONNX",
        "openvino/libs/libopenvino_gguf*": "versions are IR or ONNX",
        "openvino/libs/libopenvino_jax*": "versions are IR or ONNX",
        "openvino/libs/libopenvino_c.so*": "for programs in C",
        "openvino/include": "for programs in C++",
    },
    "botocore": {
        "botocore/data/[!s_]*/": "services of AWS other than S3",
        "botocore/data/s[!3st]*/": "services of AWS other than S3",
    },
    "pillow": {
        "PIL/_avif*.so": "a format that requests can't have",
        "pillow.libs/libavif-*": "a format that requests can't have",
        "PIL/_imagingft*.so": "draws letters",
        "pillow.libs/libfreetype-*": "draws letters",
        "pillow.libs/libharfbuzz-*": "draws letters",
    },
    "pygments": {"pygments/lexers/[!_ps]*.py": "the commands' help has Python and shell at most"},
    "numpy": {
        "numpy/**/tests": "tests",
        "numpy/_core/_simd*.so": "for tests",
        "numpy/f2py": "compiles Fortran",
        "numpy/**/*.pyi": "for type checkers",
    },
}
"""Package -> pattern of files or folders below site-packages -> why serving doesn't load them.
Of botocore's services those stay that sign in: sso, sts."""


class PatternUnmatched(Exception):
    """Files that were to be taken out aren't there."""

    def __init__(self, package: str, pattern: str) -> None:
        super().__init__(f"{package}: got no file for {pattern!r}, want one; mend UNUSED")


def slim(folder: Path, unused: Mapping[str, Mapping[str, str]] = UNUSED) -> int:
    """Take it out of the site-packages `folder`; returns the bytes. Packages that aren't installed
    are passed over. Raises PatternUnmatched before anything is taken out."""
    named = set(_unused(folder, unused))
    paths = [path for path in named if not named & set(path.parents)]
    n_bytes = sum(_size_bytes(path) for path in paths)
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return n_bytes


def _unused(folder: Path, unused: Mapping[str, Mapping[str, str]]) -> Iterator[Path]:
    installed = {one.name.lower() for one in distributions(path=[str(folder)])}
    for package in sorted(installed & set(unused)):
        for pattern in unused[package]:
            paths = sorted(folder.glob(pattern))
            if not paths:
                raise PatternUnmatched(package, pattern)
            yield from paths


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


if __name__ == "__main__":
    site = Path(sysconfig.get_path("purelib"))
    taken_bytes = slim(site) + segments.shorten_all(site)
    sys.stdout.write(f"{taken_bytes / 1e6:.0f} MB taken out\n")
    caches.write()
