"""Write the modules of `oip.proto` into the packages that speak it.

Run it with grpcio-tools installed, from anywhere: `python proto/generate.py`. `--check` writes
nothing and exits with 1 where a written module differs from a freshly generated one.

The generated code registers its symbols in protobuf's process-wide pool, where every other
implementation of the protocol (tritonclient's too) registers the same names with its own file,
and the second one to be imported fails. So each module gets a pool of its own.
"""

import argparse
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGES = ("loadtest", "serve")
DEFAULT_POOL = "_descriptor_pool.Default()"
PRIVATE_POOL = "_descriptor_pool.DescriptorPool()"


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
                "oip.proto",
            ]
        )
        if code != 0:
            raise SystemExit(f"protoc failed with exit code {code}")
        return {path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir())}


def for_package(package: str, text: str) -> str:
    """The text of a generated module as `package` needs it: own pool, full module name."""
    return text.replace(DEFAULT_POOL, PRIVATE_POOL).replace("'oip_pb2'", f"'{package}.oip_pb2'")


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the modules of oip.proto.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    generated = generate()
    if DEFAULT_POOL not in generated["oip_pb2.py"]:
        raise SystemExit(f"oip_pb2.py: no {DEFAULT_POOL}, protoc generates other code now")
    stale = []
    for package in PACKAGES:
        for name, text in generated.items():
            path = HERE.parent / package / name
            wanted = for_package(package, text)
            if check and (not path.exists() or path.read_text("utf-8") != wanted):
                stale.append(str(path))
            elif not check:
                path.write_text(wanted, "utf-8")
    if stale:
        sys.stderr.write(f"not what oip.proto says: {', '.join(stale)}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
