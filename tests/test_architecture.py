"""Which way modules may look, from their syntax trees, and what importing them must not do.

The rules are those of docs/design.md. Imports inside functions count: a lazy import is an arrow
like any other.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("serve", "loadtest", "optimizer")
# The modules of serve from the lowest to the highest: each looks only at lower ones, or at its
# equals (of which a test excludes cycles).
SERVE_LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"serve", "serve.errors", "serve.tensor", "serve.messages", "serve.machine",
               "serve.logs", "serve.settings", "serve.oip_pb2", "serve.model_config_pb2",
               "serve.version_policy", "serve.model_config", "serve.padding",
               "serve.classification", "serve.response_cache"}),
    frozenset({"serve.engines", "serve.transform", "serve.artifact", "serve.storage"}),
    frozenset({"serve.batch_policy"}),
    frozenset({"serve.batcher", "serve.shared_memory"}),
    frozenset({"serve.warmup", "serve.derivation", "serve.model", "serve.loading",
               "serve.statistics", "serve.metrics", "serve.triton"}),
    frozenset({"serve.repository", "serve.execution", "serve.planning", "serve.loader"}),
    frozenset({"serve.control", "serve.reuse"}),
    frozenset({"serve.service"}),
    frozenset({"serve.transport"}),
    frozenset({"serve.server"}),
    frozenset({"serve.cli"}),
)  # fmt: skip
OPTIMIZER_MAY_USE = frozenset(
    f"serve.{name}"
    for name in (
        "artifact", "engines", "transform", "batch_policy", "machine", "tensor", "errors", "logs"
    )
)  # fmt: skip
SHARED = frozenset({"loadtest.slo", "loadtest.document"})
WEB = frozenset({"grpc", "grpc_health", "grpc_reflection", "fastapi", "starlette", "uvicorn"})


# --- reading the sources


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name, generated code excluded."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.endswith("_pb2.py"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def names_in(source: str, module: str = "", is_package: bool = False) -> Iterator[str]:
    """Everything that `source` imports, as dotted names: modules, and names in modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join([*parents[:kept], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module", "import_module", "__import__"
        ):  # fmt: skip
            yield from (
                argument.value
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


@cache
def imports(module: str) -> frozenset[str]:
    """What `module` imports, each cut back to a module of ours where it is one."""
    path = modules()[module]
    generated = {f"{p}.{m}" for p in ("serve", "loadtest") for m in ("oip_pb2", "model_config_pb2")}
    known = {*modules(), *generated}
    found = set()
    for name in names_in(path.read_text(), module, path.name == "__init__.py"):
        cut = name
        while cut not in known and "." in cut:
            cut = cut.rpartition(".")[0]
        found.add(cut if cut in known else name)
    return frozenset(found)


def within(package: str) -> list[str]:
    return sorted(m for m in modules() if m == package or m.startswith(f"{package}."))


def reaching(names: Iterable[str], packages: Iterable[str]) -> list[str]:
    """Those of `names` that are one of `packages` or inside it."""
    roots = tuple(packages)
    return sorted(n for n in names if any(n == r or n.startswith(f"{r}.") for r in roots))


def rank(module: str) -> int:
    """The layer of a module of serve; submodules are in their package's."""
    for index, layer in enumerate(SERVE_LAYERS):
        if module in layer or any(module.startswith(f"{m}.") for m in layer - {"serve"}):
            return index
    raise AssertionError(f"{module} is in no layer of SERVE_LAYERS: give it one")


# --- the reader itself


@pytest.mark.parametrize(
    ("source", "names"),
    [
        pytest.param("import a.b, c", ["a.b", "c"], id="modules"),
        pytest.param("from a.b import c as d", ["a.b.c"], id="names"),
        pytest.param("def f():\n    import a", ["a"], id="inside functions"),
        pytest.param("from . import x\nfrom ..y import z", ["p.q.x", "p.y.z"], id="relative"),
        pytest.param("import importlib\nimportlib.import_module('a.b')", ["importlib", "a.b"],
                     id="by name at run time"),
        pytest.param("if TYPE_CHECKING:\n    import a", ["a"], id="for types only"),
    ],
)  # fmt: skip
def test_imports_are_seen_when_they_are(source: str, names: list[str]) -> None:
    assert list(names_in(source, "p.q.r")) == names


# --- between the packages


@pytest.mark.parametrize("module", within("serve"))
def test_serve_looks_only_at_the_slo_when_it_looks_out(module: str) -> None:
    outside = reaching(imports(module), ("optimizer", "loadtest", "trimserve"))
    assert set(outside) <= SHARED


@pytest.mark.parametrize("module", within("loadtest"))
def test_loadtest_speaks_only_the_wire_when_it_looks_out(module: str) -> None:
    assert not reaching(imports(module), ("serve", "optimizer", "trimserve", "torch"))


@pytest.mark.parametrize("module", within("optimizer"))
def test_optimizer_uses_only_what_it_may_when_it_looks_at_the_others(module: str) -> None:
    outside = reaching(imports(module), ("serve", "loadtest", "trimserve"))
    allowed = [*reaching(outside, OPTIMIZER_MAY_USE), *SHARED]
    assert set(outside) <= set(allowed)


@pytest.mark.parametrize("module", sorted(SHARED))
def test_shared_modules_are_pure_when_all_three_import_them(module: str) -> None:
    allowed = {*SHARED, "pydantic", "yaml", "typing"}
    others = {name.split(".")[0] for name in imports(module) - SHARED} - sys.stdlib_module_names
    assert others <= allowed


# --- inside serve


@pytest.mark.parametrize("module", within("serve"))
def test_serve_never_looks_up_when_a_module_imports_another(module: str) -> None:
    above = [other for other in reaching(imports(module), ["serve"]) if rank(other) > rank(module)]
    assert not above


def test_serve_has_no_cycle_when_its_imports_are_followed() -> None:
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join((*path, module))}"
        if module not in done and module in modules():
            for other in reaching(imports(module), ["serve"]):
                follow(other, (*path, module))
            done.add(module)

    for module in within("serve"):
        follow(module, ())


@pytest.mark.parametrize(
    "module", [m for m in within("serve") if rank(m) < rank("serve.transport")]
)
def test_serve_knows_no_http_or_grpc_when_below_transport(module: str) -> None:
    assert not reaching(imports(module), WEB)


@pytest.mark.parametrize("module", [m for m in within("serve") if rank(m) < rank("serve.batcher")])
def test_serve_knows_no_event_loop_when_below_the_batcher(module: str) -> None:
    assert not reaching(imports(module), ("asyncio", "threading", "uvloop"))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_serve_imports_a_runtime_only_in_its_engine_when_it_does(runtime: str) -> None:
    users = [m for m in within("serve") if reaching(imports(m), [runtime])]
    assert users == [f"serve.engines.{runtime}"]


def test_serve_imports_torch_only_in_the_engines_on_it_when_it_does() -> None:
    users = [m for m in within("serve") if reaching(imports(m), ["torch"])]
    engines = ("torch", "aotinductor", "torch_archive")
    assert set(users) <= {f"serve.engines.{name}" for name in engines}


def test_policy_has_no_clock_when_it_decides() -> None:
    allowed = {"bisect", "collections", "dataclasses", "itertools", "math", "typing"}
    assert {name.split(".")[0] for name in imports("serve.batch_policy")} <= allowed


@pytest.mark.parametrize("module", within("serve"))
def test_serve_unpickles_nothing_when_it_reads(module: str) -> None:
    assert not reaching(imports(module), ("pickle", "cloudpickle", "dill", "joblib", "marshal"))


# --- inside optimizer


@pytest.mark.parametrize("module", within("optimizer.techniques"))
def test_techniques_know_neither_each_other_nor_the_search_when_they_import(module: str) -> None:
    base = "optimizer.techniques"
    # `export` is the stage that several techniques start from, not a technique of the table.
    allowed = {base, f"{base}.export", module}
    others = set(reaching(imports(module), [base, "optimizer.search"]))
    if module == base:  # the table of techniques names them
        assert not reaching(others, ["optimizer.search"])
    else:
        assert others <= allowed


@pytest.mark.parametrize("module", within("optimizer.search"))
def test_search_knows_no_torch_when_it_imports(module: str) -> None:
    assert not reaching(imports(module), ["torch"])


# --- what importing does


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_serve_can_be_imported_when_torch_optimizer_and_locust_cannot() -> None:
    ended = run_python(
        f"""
import importlib, sys
for name in ("torch", "optimizer", "locust", "gevent", "onnx", "sklearn"):
    sys.modules[name] = None  # importing it raises ImportError
for module in {within("serve")!r}:
    importlib.import_module(module)
"""
    )
    assert ended.returncode == 0, ended.stderr


def test_rules_can_be_imported_when_only_the_base_is_installed() -> None:
    ended = run_python(
        f"""
import importlib, sys
for name in ("torch", "optimizer", "locust", "gevent", "grpc", "numpy", "onnxruntime"):
    sys.modules[name] = None
for module in {sorted(SHARED)!r}:
    importlib.import_module(module)
"""
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("package", ["serve", "loadtest", "optimizer"])
def test_importing_changes_nothing_in_the_process_when_a_package_is(package: str) -> None:
    """No thread, signal handler, log handler, event loop, or output; Locust's own module patches
    the process on import, so the modules that need it run in a process of their own."""
    patched = [m for m in within(package) if reaching(imports(m), ("locust", "gevent"))]
    names = [m for m in within(package) if m not in patched and not m.endswith("__main__")]
    for module in patched:  # nor may anyone else import those
        users = [m for m in names if module in imports(m)]
        assert not users, f"{users} import {module}, which imports Locust"
    ended = run_python(
        f"""
import importlib, logging, os, signal, sys, threading
handlers = {{number: signal.getsignal(number) for number in signal.valid_signals()}}
environment, folder, interval = dict(os.environ), os.getcwd(), sys.getswitchinterval()
for module in {names!r}:
    importlib.import_module(module)
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
now = {{number: signal.getsignal(number) for number in signal.valid_signals()}}
assert now == handlers, now
assert not logging.root.handlers, logging.root.handlers
assert logging.root.level == logging.WARNING
assert (os.getcwd(), sys.getswitchinterval()) == (folder, interval)
ours = [n for n in logging.Logger.manager.loggerDict if n.split(".")[0] in {PACKAGES!r}]
assert not [n for n in ours if logging.getLogger(n).handlers]
assert "locust" not in sys.modules and "gevent.monkey" not in sys.modules
"""
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
