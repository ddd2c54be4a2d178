"""Triton's configuration of a published version."""

from dataclasses import replace

from optimizer.publish import triton_config
from serve.artifact import Batching, Manifest
from serve.engines import EngineSpec, Signature
from serve.tensor import TensorSpec

MANIFEST = Manifest(
    model="digits",
    version="3",
    signature=Signature(
        (TensorSpec("image", "FP32", (-1, 1, 8, 8)),), (TensorSpec("logits", "FP32", (-1, 10)),)
    ),
    engine=EngineSpec("onnxruntime", "model.onnx", "int8", threads=1, instances=2),
    batching=Batching(max_batch_size=16, max_queue_delay_s=0.0015),
)


def test_triton_config_says_how_the_version_is_served() -> None:
    assert triton_config(MANIFEST).splitlines() == [
        'name: "digits"',
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        "max_batch_size: 16",
        'input [ { name: "image" data_type: TYPE_FP32 dims: [1, 8, 8] } ]',
        'output [ { name: "logits" data_type: TYPE_FP32 dims: [10] } ]',
        "instance_group [ { count: 2 kind: KIND_CPU } ]",
        "version_policy: { specific { versions: [ 3 ] } }",
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }',
        "dynamic_batching { max_queue_delay_microseconds: 1500 }",
    ]


def test_triton_config_counts_the_first_axis_when_there_is_no_batch() -> None:
    signature = Signature(
        (TensorSpec("text", "BYTES", (4,)),), (TensorSpec("score", "FP32", ()),), batched=False
    )
    config = triton_config(replace(MANIFEST, signature=signature, batching=Batching()))
    assert "max_batch_size: 0" in config
    assert 'name: "text" data_type: TYPE_STRING dims: [4]' in config
    assert 'name: "score" data_type: TYPE_FP32 dims: [1]' in config
    assert "dynamic_batching" not in config
