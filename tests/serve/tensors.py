"""Random tensors of every datatype, for round trips over the wire's encodings."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.tensor import NUMPY_DTYPES, Tensor

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
BYTES = st.binary(max_size=12)
TEXT = st.text(max_size=8).map(lambda text: text.encode())


@st.composite
def tensors(
    draw: st.DrawFn,
    datatypes: tuple[str, ...] = tuple(NUMPY_DTYPES),
    finite: bool = False,
    elements: st.SearchStrategy[bytes] = BYTES,
) -> Tensor:
    """A tensor named x. `elements` are those of BYTES; `finite` leaves out NaN and infinities."""
    datatype = draw(st.sampled_from(datatypes))
    dtype = NUMPY_DTYPES[datatype]
    shape = draw(SHAPES)
    if datatype == "BYTES":
        array = np.empty(shape, object)
        for index in np.ndindex(shape):
            array[index] = draw(elements)
        return Tensor("x", datatype, array)
    if datatype == "BF16":  # any bits, which numpy alone has no strategy for
        return Tensor("x", datatype, draw(hnp.arrays(np.uint16, shape)).view(dtype))
    options = {"allow_nan": False, "allow_infinity": False} if finite and dtype.kind == "f" else {}
    values = hnp.from_dtype(dtype, **options)
    return Tensor("x", datatype, draw(hnp.arrays(dtype, shape, elements=values)))


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit: name, datatype, shape, values, the sign of zero and NaN included."""
    assert (got.name, got.datatype, got.shape) == (want.name, want.datatype, want.shape)
    assert got.array.dtype == want.array.dtype
    if want.datatype == "BYTES":
        assert got.array.tolist() == want.array.tolist()
    else:
        assert got.array.tobytes() == np.ascontiguousarray(want.array).tobytes()
