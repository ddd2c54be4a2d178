"""Write the modules of the `.proto` files here into the packages that speak the protocol.

Run it with grpcio-tools installed, from anywhere: `python proto/generate.py`. `--check` writes
nothing and exits with 1 where a written module differs from a freshly generated one.

The generated code registers its symbols in protobuf's process-wide pool, where every other
implementation of the protocol (tritonclient's too) registers the same names with its own file,
and the second one to be imported fails. So each package gets a pool of its own: a module that
imports none of the others makes it, one that does takes it from there.
"""

import argparse
import importlib.resources
import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
SOURCES = ("jobs.proto", "model_config.proto", "oip.proto")
_PROTOCOL = ("model_config_pb2", "oip_pb2")
PACKAGES = {"loadtest": _PROTOCOL, "serve": _PROTOCOL, "optimizer.service": ("jobs_pb2",)}
DEFAULT_POOL = "_descriptor_pool.Default()"
PRIVATE_POOL = "_descriptor_pool.DescriptorPool()"
# Typed stubs as protoc writes them leave generic types open, which strict checking refuses.
STUB_HEADER = "# mypy: ignore-errors\n"
# protoc takes the folder of the .proto files for the top of the import path.
IMPORT = re.compile(r"^import (\w+_pb2) as (\w+)$", re.MULTILINE)


def generate() -> dict[str, str]:
    """The generated modules: text by file name."""
    with tempfile.TemporaryDirectory() as folder:
        include = importlib.resources.files("grpc_tools") / "_proto"
        code = protoc.main(
            [
                "protoc",
                f"-I{HERE}",
                f"-I{include}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                *SOURCES,
            ]
        )
        if code != 0:
            raise SystemExit(f"protoc failed with exit code {code}")
        return {path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir())}


def for_package(package: str, name: str, text: str) -> str:
    """The text of the generated file `name` as `package` needs it: its pool, its full names."""
    stem = name.partition(".")[0]
    text = text.replace(DEFAULT_POOL, _pool(text)).replace(f"'{stem}'", f"'{package}.{stem}'")
    header = STUB_HEADER if name.endswith(".pyi") else ""
    return header + IMPORT.sub(rf"from {package} import \1 as \2", text)


def _pool(text: str) -> str:
    """The pool of a generated module: that of the first module it imports, or a new one."""
    imported = IMPORT.search(text)
    return f"{imported[2]}.DESCRIPTOR.pool" if imported else PRIVATE_POOL


def _check_expectations(generated: dict[str, str]) -> None:
    """Fail where protoc generates other code than `for_package` knows how to change."""
    for name, text in generated.items():
        if name.endswith(".py") and text.count(DEFAULT_POOL) != 1:
            raise SystemExit(f"{name}: not one {DEFAULT_POOL}, protoc generates other code now")
    if _pool(generated["model_config_pb2.py"]) != PRIVATE_POOL:
        raise SystemExit("model_config_pb2.py: imports others now, which module makes the pool?")
    if not IMPORT.search(generated["oip_pb2.py"]):
        raise SystemExit("oip_pb2.py: no import of model_config_pb2 in the form that is replaced")


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the modules of the .proto files.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    generated = generate()
    _check_expectations(generated)
    stale = []
    for package, modules in PACKAGES.items():
        for name, text in generated.items():
            if name.partition(".")[0] not in modules:
                continue
            path = HERE.parent.joinpath(*package.split("."), name)
            wanted = for_package(package, name, text)
            if check and (not path.exists() or path.read_text("utf-8") != wanted):
                stale.append(str(path))
            elif not check:
                path.write_text(wanted, "utf-8")
    if stale:
        sys.stderr.write(f"not what the .proto files say: {', '.join(stale)}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
