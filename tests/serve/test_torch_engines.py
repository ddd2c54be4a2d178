"""The engines on torch: what eager torch computes, and what both refuse to open."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.artifact import Batching, Manifest, write_version
from serve.engines import RUNS_CODE, EngineSpec, engine_module, load_engine
from serve.engines.torch import TorchEngine
from serve.engines.torch_archive import SIGNATURE_FILE
from serve.errors import ArtifactInvalid
from serve.tensor import Array
from tests.serve.running_server import PATIENCE_S, command, fetch, running
from tests.serve.torch_programs import SIGNATURE, by_hand, write_program

ROOT = Path(__file__).parents[2]
FILE = "model.pt2"
SPEC = EngineSpec("torch", FILE)
every_engine = pytest.mark.parametrize("engine", sorted(RUNS_CODE))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def loaded(program: Path) -> TorchEngine:
    engine = load_engine(program.parent, SPEC)
    assert isinstance(engine, TorchEngine)
    return engine


def inputs(n: int) -> dict[str, Array]:
    random = np.random.default_rng(n)
    a = random.normal(size=(n, 4)).astype(np.float32)
    return {"a": a, "b": random.integers(-9, 9, size=(n, 4))}


def copied(program: Path, directory: Path) -> Path:
    for name in (FILE, SIGNATURE_FILE):
        (directory / name).write_bytes((program.parent / name).read_bytes())
    return directory / FILE


# --- eager torch


def test_torch_gives_the_same_numbers_when_batch_sizes_change(loaded: TorchEngine) -> None:
    for n in (1, 2, 3, 8, 1, 5):
        given = inputs(n)
        outputs = loaded.run(given)
        np.testing.assert_allclose(outputs["sum"], by_hand(given["a"], given["b"]), atol=1e-5)
        np.testing.assert_array_equal(outputs["same"], given["a"])


def test_torch_results_stay_when_the_inputs_they_came_from_change(loaded: TorchEngine) -> None:
    given = inputs(2)
    outputs = loaded.run(given)
    kept = outputs["same"].copy()
    given["a"][:] = 7
    np.testing.assert_array_equal(outputs["same"], kept)


def test_torch_takes_inputs_when_they_are_read_only(loaded: TorchEngine) -> None:
    given = inputs(3)
    for array in given.values():
        array.setflags(write=False)
    want = by_hand(given["a"], given["b"])
    np.testing.assert_allclose(loaded.run(given)["sum"], want, atol=1e-5)


def test_torch_names_its_signature_when_loaded(loaded: TorchEngine) -> None:
    assert loaded.signature == SIGNATURE


def test_torch_profile_names_the_operators_when_a_program_has_run(program: Path) -> None:
    kernels = engine_module("torch").profile(program.parent, SPEC, inputs(2), 3)
    assert [kernel.operator for kernel in kernels] == ["matmul", "add"]
    assert {kernel.precision for kernel in kernels} == {"fp32"}
    assert all(kernel.duration_s > 0 for kernel in kernels)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"options": {"colour": "red"}}, r"options\.colour", id="an option is unknown"),
        pytest.param({"options": {"device": "tpu"}}, r"options\.device", id="a device is unknown"),
        pytest.param({"precision": "int8"}, "precision", id="a precision isn't torch's"),
    ],
)
@every_engine
def test_engine_refuses_when(
    engine: str, changes: dict[str, object], field: str, program: Path
) -> None:
    with pytest.raises(ArtifactInvalid, match=f"{field}.*want one of"):
        load_engine(program.parent, replace(SPEC, name=engine, **changes))  # type: ignore[arg-type]


def test_engine_refuses_a_gpu_when_there_is_none(program: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(ArtifactInvalid, match="needs an NVIDIA GPU"):
        load_engine(program.parent, replace(SPEC, options={"device": "cuda"}))


@pytest.mark.gpu
def test_torch_gives_the_same_numbers_when_it_runs_on_a_gpu(program: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    engine = load_engine(program.parent, replace(SPEC, options={"device": "cuda"}))
    given = inputs(3)
    want = by_hand(given["a"], given["b"])
    np.testing.assert_allclose(engine.run(given)["sum"], want, atol=1e-3)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "it is empty": lambda _: b"",
    "it is no archive": lambda _: b"not a model",
    "its first bytes are missing": lambda content: content[100:],
    "half of it is missing": lambda content: content[: len(content) // 2],
    "its directory is missing": lambda content: content[: content.rindex(b"PK\1\2")],
    "its last byte is missing": lambda content: content[:-1],
    "a byte of its weights is another": lambda content: flipped(content, b"\0\0\x80\x3d"),
    "a byte of its program is another": lambda content: flipped(content, b"graph_module"),
}


def flipped(content: bytes, place: bytes) -> bytes:
    at = content.index(place)
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@every_engine
def test_engine_refuses_an_archive_when(
    engine: str, damage: str, program: Path, tmp_path: Path
) -> None:
    path = copied(program, tmp_path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ArtifactInvalid, match=r"model\.pt2: can't load it"):
        load_engine(tmp_path, replace(SPEC, name=engine))


def test_torch_refuses_an_archive_when_it_holds_compiled_code(
    program: Path, tmp_path: Path
) -> None:
    path = copied(program, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/aotinductor/model/code.so", b"\x7fELF")
    with pytest.raises(ArtifactInvalid, match="holds compiled code"):
        load_engine(tmp_path, SPEC)


def test_aotinductor_refuses_an_archive_when_it_holds_a_program(program: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="want code alone"):
        load_engine(program.parent, EngineSpec("aotinductor", FILE))


def test_engine_refuses_an_archive_when_an_entry_leads_out_of_it(
    program: Path, tmp_path: Path
) -> None:
    path = copied(program, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/../../escaped", b"x")
    with pytest.raises(ArtifactInvalid, match="leads out"):
        load_engine(tmp_path, SPEC)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "No such file", id="it is missing"),
        pytest.param(b"{", "validation error", id="it is cut off"),
        pytest.param(
            b'{"inputs": [{"name": "a", "datatype": "BYTES", "shape": [-1]}], "outputs": []}',
            "got BYTES, want one of",
            id="a datatype isn't torch's",
        ),
    ],
)
def test_engine_refuses_a_signature_when(
    content: bytes | None, said: str, program: Path, tmp_path: Path
) -> None:
    copied(program, tmp_path)
    (tmp_path / SIGNATURE_FILE).unlink()
    if content is not None:
        (tmp_path / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(ArtifactInvalid, match=rf"signature\.json.*{said}"):
        load_engine(tmp_path, SPEC)


# --- without torch, and without trust


def test_engines_on_torch_say_what_to_install_when_torch_is_missing(program: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from pathlib import Path
from serve.engines import RUNS_CODE, EngineSpec, EngineUnavailable, load_engine
for name in sorted(RUNS_CODE):
    try:
        load_engine(Path({str(program.parent)!r}), EngineSpec(name, {FILE!r}))
    except EngineUnavailable as error:
        print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert ended.stdout.count("pip install 'trimserve[torch]'") == len(RUNS_CODE)


def test_server_loads_a_version_that_can_carry_code_only_when_it_is_told_to(
    program: Path, tmp_path: Path
) -> None:
    files = {name: program.parent / name for name in (FILE, SIGNATURE_FILE)}
    manifest = Manifest("pair", "1", SIGNATURE, SPEC, Batching(8))
    write_version(tmp_path / "models", manifest, files)
    where = ("--repository", str(tmp_path / "models"))
    ended = subprocess.run(
        command(*where), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == 2
    assert "--trust-code" in ended.stderr
    with running(tmp_path / "trusting.log", *where, "--trust-code") as server:
        given = inputs(2)
        body = {
            "inputs": [
                {"name": name, "datatype": datatype, "shape": [2, 4], "data": given[name].tolist()}
                for name, datatype in (("a", "FP32"), ("b", "INT64"))
            ]
        }
        answer = fetch(server.http_port, "POST", "/v2/models/pair/infer", body)
        assert answer.status == 200, answer.body
        want = by_hand(given["a"], given["b"]).ravel()
        np.testing.assert_allclose(answer.json["outputs"][0]["data"], want, atol=1e-5)
