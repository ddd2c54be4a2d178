"""Specs that come over the wire: what is refused, and what becomes of the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.document import DocumentInvalid
from optimizer.service.addresses import AddressRefused, Stores
from optimizer.service.app import Settings
from optimizer.service.submitted import materialize, read_submitted
from optimizer.spec import read_spec
from tests.optimizer.service.conftest import a_spec

UPLOAD = "upload:0123456789abcdef"


def read(spec: Any, settings: Settings) -> Any:
    return read_submitted(spec, settings.policy, lambda _: "m.onnx")


def test_a_spec_is_read_as_json_and_as_yaml(settings: Settings) -> None:
    spec = a_spec(UPLOAD, "s3://models/ok/d.npz")
    for given in (spec, yaml.safe_dump(spec)):
        found = read(given, settings)
        assert found.name == "tiny"
        assert found.references == (UPLOAD, "s3://models/ok/d.npz")
        assert found.document == spec


Change = Callable[[dict[str, Any]], object]
REFUSED: list[tuple[str, Change, str]] = [
    ("path", lambda s: s["model"].update(onnx="/etc/passwd"), "want upload:ID"),
    ("traversal", lambda s: s["model"].update(onnx="../../x.onnx"), "want upload:ID"),
    ("variable", lambda s: s["model"].update(onnx="${HOME}/x.onnx"), "want upload:ID"),
    ("store", lambda s: s["model"].update(onnx="s3://other/x.onnx"), "want an allowed address"),
    ("prefix", lambda s: s["model"].update(onnx="s3://models/okay/x"), "want an allowed address"),
    ("dots", lambda s: s["model"].update(onnx="s3://models/ok/../x"), "want a path without"),
    ("encoded", lambda s: s["model"].update(onnx="s3://models/ok/%2e%2e/x"), "want a path without"),
    ("metadata", lambda s: s["model"].update(onnx="http://169.254.169.254/x"), "an allowed"),
    ("loopback", lambda s: s["model"].update(onnx="http://localhost:1/x"), "an allowed address"),
    ("user", lambda s: s["model"].update(onnx="https://u:p@data.example.com/x/y"), "a user"),
    ("factory", lambda s: s.update(model={"factory": "os:system", "weights": UPLOAD}),
     "want a function that the service allows (models:*)"),
    ("plugin", lambda s: s.update(techniques={"plugins": ["evil:Plugin"]}), "the service allows"),
    ("metric", lambda s: s.update(task={"kind": "custom", "metric": "os:a"}), "service allows"),
    ("pt2", lambda s: s.update(model={"exported": UPLOAD}), ".pt2"),
    ("agent", lambda s: s["target"].update(agent="http://10.0.0.1:80"), "target.agent"),
    ("budget", lambda s: s["budget"].update(wall_clock_s=601), "at most 600"),
    ("no model", lambda s: s.pop("model"), "model: missing"),
    ("unknown", lambda s: s.update(modle=1), "did you mean 'model'?"),
    ("slo", lambda s: s.update(slo="slo.yaml"), "slo"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[one[0] for one in REFUSED])
def test_what_isnt_allowed_is_refused_by_name(
    name: str, change: Change, message: str, settings: Settings
) -> None:
    spec = a_spec(UPLOAD, UPLOAD)
    change(spec)
    with pytest.raises(DocumentInvalid) as refused:
        read(spec, settings)
    assert message in str(refused.value)


@pytest.mark.parametrize("text", [
    "a: &x [1, 1]\nb: *x\n",
    "a: [" * 500,
    "a: 1\na: 2\n",
    "\0",
    "- 1\n",
    "",
])  # fmt: skip
def test_odd_yaml_is_refused(text: str, settings: Settings) -> None:
    with pytest.raises(DocumentInvalid):
        read(text, settings)


def test_billion_laughs_are_refused_before_they_are_told(settings: Settings) -> None:
    rows = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(DocumentInvalid, match="want no YAML aliases"):
        read("\n".join(rows), settings)


def test_a_materialized_spec_is_one_that_the_optimizer_reads(
    settings: Settings, tmp_path: Path
) -> None:
    for name in ("m.onnx", "d.npz"):
        (tmp_path / name).write_bytes(b"x")
    spec = a_spec(UPLOAD, "s3://models/ok/d.npz")
    files = {UPLOAD: tmp_path / "m.onnx", "s3://models/ok/d.npz": tmp_path / "d.npz"}
    found = read_spec(materialize(spec, files, tmp_path))
    assert found.slo.latency.threshold_ms == 50
    assert found.data.test.path == tmp_path / "d.npz"
    assert spec["slo"]["name"] == "tiny"


def test_links_dont_lead_out_of_an_allowed_folder(settings: Settings, tmp_path: Path) -> None:
    stores = settings.policy.stores
    inside = tmp_path / "allowed" / "d.npz"
    inside.write_bytes(b"x")
    assert stores.local(f"file://{inside}") == inside
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(AddressRefused, match="leads out"):
        stores.check(f"file://{tmp_path}/allowed/link")
    with pytest.raises(AddressRefused, match="existing"):
        stores.check(f"file://{tmp_path}/allowed/none")


def test_a_name_that_leads_to_this_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stores = Stores(["http://data.example.com/"])
    for peer in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1"):
        answer = [(0, 0, 0, "", (peer, 80))]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, answer=answer, **__: answer)
        with pytest.raises(AddressRefused, match="which isn't public"):
            stores.fetch("http://data.example.com/x", tmp_path / "x", 100)
    assert not (tmp_path / "x").exists() or not (tmp_path / "x").read_bytes()
