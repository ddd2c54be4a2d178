"""Transforms: what a manifest declares between clients' tensors and the engine's.

Before a request is queued, encoded images and texts become the engine's inputs; after it ran,
scores become labels. A loaded transform may be called from any number of threads, starts none of
its own, and gives the same results in each. It doesn't know queues, lengths that batches share
(`serve.padding`), or manifests.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pydantic

from serve.engines import Signature
from serve.errors import ArtifactInvalid
from serve.tensor import Array, TensorSpec
from serve.transform.checks import Check, Problem, first_problem
from serve.transform.images import ImageInput, ImageStep, load_images
from serve.transform.labels import LabelOutput, LabelStep, load_labels
from serve.transform.rows import rows_of
from serve.transform.text import TextInput, TextStep, load_text

__all__ = [
    "ImageInput",
    "LabelOutput",
    "TextInput",
    "Transform",
    "TransformSpec",
    "check_spec",
    "files_of",
    "load_transform",
    "public_signature",
]

InputSpec = Annotated[ImageInput | TextInput, pydantic.Discriminator("kind")]


@dataclass(frozen=True, kw_only=True)
class TransformSpec:
    """Every public input that isn't the engine's own, and every public output that isn't."""

    inputs: tuple[InputSpec, ...] = ()
    outputs: tuple[LabelOutput, ...] = ()


@dataclass(frozen=True, eq=False)
class Transform:
    """A loaded declaration. `signature` is the public one: what clients send and get."""

    signature: Signature
    engine_signature: Signature
    inputs: tuple[ImageStep | TextStep, ...]
    outputs: tuple[LabelStep, ...]

    def before(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The engine's inputs for a request's public ones; those that are the engine's own are
        passed on as they are.

        Raises InvalidRequest that names the input and, of bad bytes, the row.
        """
        declared = {step.spec.name for step in self.inputs}
        tensors = {name: array for name, array in inputs.items() if name not in declared}
        for step in self.inputs:
            tensors |= step.tensors(rows_of(step.spec.name, inputs))
        return tensors

    def after(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The public outputs that can be had from `outputs`, some or all of the engine's.

        Raises ArtifactInvalid where the engine gives another number of scores than there are
        labels, which only an output without a fixed last axis can.
        """
        dropped = {step.spec.tensor for step in self.outputs if not step.spec.keep}
        public = {name: array for name, array in outputs.items() if name not in dropped}
        for step in self.outputs:
            if step.spec.tensor in outputs:
                public |= step.outputs(outputs[step.spec.tensor])
        return public

    def labels(self, output: str) -> tuple[str, ...]:
        """The labels of the classes of the engine's `output`; () where none are declared."""
        found = (step.labels for step in self.outputs if step.spec.tensor == output)
        return next(found, ())

    @property
    def fill_values(self) -> dict[str, int]:
        """What each of the engine's inputs made of text is filled up with behind a row's tokens.
        Where `serve.padding` fills it up further, it must do so with the same value."""
        texts = (step for step in self.inputs if isinstance(step, TextStep))
        return {name: value for step in texts for name, value in step.fill_values.items()}


def check_spec(spec: TransformSpec, where: str) -> None:
    """Check what can be without files and signature. Raises ArtifactInvalid that names the field
    of the manifest at `where`."""
    for number, declared in enumerate(spec.inputs):
        _raise_on(where, f"transform.inputs.{number}", declared.problem())
    for number, output in enumerate(spec.outputs):
        _raise_on(where, f"transform.outputs.{number}", output.problem())
    _raise_on(where, "transform", first_problem(_names_by_themselves(spec)))


def files_of(spec: TransformSpec) -> tuple[str, ...]:
    """The files of the version's folder that `spec` names."""
    return tuple(name for one in (*spec.inputs, *spec.outputs) for name in one.files)


def load_transform(directory: Path, spec: TransformSpec, engine_signature: Signature) -> Transform:
    """Make ready what `spec` declares, with the files in the version's `directory`.

    Raises ArtifactInvalid that names the field or file where something is out of bounds or doesn't
    fit the engine, EngineUnavailable where a library is missing.
    """
    where = str(directory)
    check_spec(spec, where)
    if not engine_signature.batched:
        raise ArtifactInvalid(where, "transform: want an engine whose axis 0 is the batch")
    inputs = {one.name: one for one in engine_signature.inputs}
    outputs = {one.name: one for one in engine_signature.outputs}
    for number, declared in enumerate(spec.inputs):
        _raise_on(where, f"transform.inputs.{number}", declared.misfit(inputs))
    for number, output in enumerate(spec.outputs):
        _raise_on(where, f"transform.outputs.{number}", output.misfit(outputs))
    signature = public_signature(spec, engine_signature)
    _raise_on(where, "transform", first_problem(_public_names(signature)))
    return Transform(
        signature,
        engine_signature,
        tuple(_loaded(directory, declared, inputs) for declared in spec.inputs),
        tuple(load_labels(directory, output, outputs) for output in spec.outputs),
    )


def public_signature(spec: TransformSpec, engine: Signature) -> Signature:
    """What clients send and get, for a declaration that fits `engine`: a declared input stands
    where the first that it makes stood, a declared output behind the one that it is made of."""
    by_first = {_first_made(declared, engine): declared for declared in spec.inputs}
    made = {name for declared in spec.inputs for name in declared.tensors}
    inputs = (
        TensorSpec(by_first[one.name].name, "BYTES", (-1, 1)) if one.name in by_first else one
        for one in engine.inputs
        if one.name in by_first or one.name not in made
    )
    outputs = (one for output in engine.outputs for one in _public_outputs(output, spec.outputs))
    return replace(engine, inputs=tuple(inputs), outputs=tuple(outputs))


def _first_made(declared: ImageInput | TextInput, engine: Signature) -> str:
    return next(one.name for one in engine.inputs if one.name in declared.tensors)


def _public_outputs(output: TensorSpec, declared: Sequence[LabelOutput]) -> tuple[TensorSpec, ...]:
    """What the engine's `output` is to clients: itself, what is made of it, or both."""
    for one in declared:
        if one.tensor == output.name:
            return (output, *one.public) if one.keep else one.public
    return (output,)


def _names_by_themselves(spec: TransformSpec) -> Iterator[Check]:
    """An engine's tensor is made once, labelled once; public names are there and distinct."""
    once = "each tensor of the engine once"
    made = [name for declared in spec.inputs for name in declared.tensors]
    yield "inputs", made, len(set(made)) == len(made), once
    labelled = [output.tensor for output in spec.outputs]
    yield "outputs", labelled, len(set(labelled)) == len(labelled), once
    names = [declared.name for declared in spec.inputs]
    yield "inputs", names, all(names) and len(set(names)) == len(names), _DISTINCT
    names = [one.name for output in spec.outputs for one in output.public]
    yield "outputs", names, all(names) and len(set(names)) == len(names), _DISTINCT


def _public_names(signature: Signature) -> Iterator[Check]:
    """With those that are the engine's own."""
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        names = [one.name for one in tensors]
        yield side, names, len(set(names)) == len(names), _DISTINCT


_DISTINCT = "public names that are there and distinct"


def _loaded(
    directory: Path, declared: ImageInput | TextInput, inputs: Mapping[str, TensorSpec]
) -> ImageStep | TextStep:
    if isinstance(declared, ImageInput):
        return load_images(declared, inputs)
    return load_text(directory, declared, inputs)


def _raise_on(where: str, field: str, problem: Problem | None) -> None:
    if problem is not None:
        raise ArtifactInvalid(where, f"{field}.{problem[0]}: {problem[1]}")
