"""What jobs made, in a folder and in an object store."""

from pathlib import Path

import pytest

from optimizer.service.blobs import Blobs


@pytest.fixture(params=["folder", "object store"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    in_memory = f"memory://{tmp_path.name}"
    return Blobs(str(tmp_path / "blobs") if request.param == "folder" else in_memory)


def test_only_what_counts_of_a_job_is_kept(blobs: Blobs, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "versions").mkdir(parents=True)
    (made / "versions" / "model.onnx").write_bytes(b"model")
    for job_id, claim in (("job", "lost"), ("job", "counts"), ("job", "later"), ("other", "lost")):
        blobs.store(job_id, claim, made)
    for _ in range(2):
        blobs.keep_only("job", "counts")
        assert list(blobs.files("job", "counts", "versions")) == ["model.onnx"]
        assert blobs.files("job", "lost", "versions") == {}
        assert blobs.files("job", "later", "versions") == {}
        assert list(blobs.files("other", "lost", "versions")) == ["model.onnx"]
    blobs.delete_job("job")
    assert blobs.files("job", "counts", "versions") == {}
