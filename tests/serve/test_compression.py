"""Content codings: what other programs compress is read, and nothing unfolds past its limit."""

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest, PayloadTooLarge, UnsupportedEncoding
from serve.transport.compression import (
    CODINGS,
    MAX_ACCEPT_ENCODING_LENGTH,
    MAX_GZIP_MEMBERS,
    choose_encoding,
    compress,
    decompress,
)

LIMIT = 1 << 20
BODY = b"the same words, " * 40


def raw_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


def in_pieces(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        pytest.param(gzip.compress(BODY), "gzip", id="gzip"),
        pytest.param(gzip.compress(BODY), "x-gzip", id="gzip by its old name"),
        pytest.param(gzip.compress(BODY), " GZip ", id="the name in other letters"),
        pytest.param(zlib.compress(BODY), "deflate", id="deflate in the format of zlib"),
        pytest.param(zlib.compress(BODY, 9), "deflate", id="deflate at another level"),
        pytest.param(raw_deflate(BODY), "deflate", id="deflate without a header"),
        pytest.param(gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]), "gzip", id="two members"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_decompress_unfolds_when_the_body_comes_in_chunks(
    body: bytes, encoding: str, size: int
) -> None:
    assert decompress(body, encoding, len(BODY)) == BODY
    assert decompress(in_pieces(body, size), encoding, len(BODY)) == BODY


@given(
    st.lists(st.binary(max_size=200), max_size=4),
    st.sampled_from(sorted(CODINGS)),
    st.integers(1, 64),
)
def test_compress_round_trips_when_the_parts_are_any(
    parts: list[bytes], encoding: str, size: int
) -> None:
    compressed = compress(parts, encoding)
    assert decompress(in_pieces(compressed, size), encoding, LIMIT) == b"".join(parts)


@given(st.binary(max_size=100))
def test_decompress_reads_raw_deflate_when_its_content_is_any(body: bytes) -> None:
    assert decompress(raw_deflate(body), "deflate", LIMIT) == body


@pytest.mark.parametrize(
    ("encoding", "read"),
    [
        pytest.param("gzip", gzip.decompress, id="gzip"),
        pytest.param("deflate", zlib.decompress, id="deflate, which is the format of zlib"),
    ],
)
def test_compress_is_read_by_others_when_they_know_the_coding(
    encoding: str, read: Callable[[bytes], bytes]
) -> None:
    compressed = compress([BODY, b"", BODY], encoding)
    assert read(compressed) == BODY + BODY
    assert len(compressed) < len(BODY)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        pytest.param(b"", "gzip", id="an empty body is no gzip"),
        pytest.param(b"", "deflate", id="an empty body is no deflate"),
        pytest.param(b"\x78", "deflate", id="one byte is no deflate"),
        pytest.param(BODY, "gzip", id="a body that isn't compressed as gzip"),
        pytest.param(b"\xff" * 20, "deflate", id="a body that isn't compressed as deflate"),
        pytest.param(gzip.compress(BODY)[:-1], "gzip", id="gzip without its last byte"),
        pytest.param(zlib.compress(BODY)[:-1], "deflate", id="deflate without its last byte"),
        pytest.param(raw_deflate(BODY)[:-1], "deflate", id="raw deflate without its last byte"),
        pytest.param(gzip.compress(BODY)[:-8] + bytes(8), "gzip", id="a wrong checksum"),
        pytest.param(gzip.compress(BODY) + b"more", "gzip", id="something behind gzip"),
        pytest.param(gzip.compress(BODY) + bytes(9), "gzip", id="zeros behind gzip"),
        pytest.param(zlib.compress(BODY) + b"more", "deflate", id="something behind deflate"),
        pytest.param(zlib.compress(BODY) * 2, "deflate", id="two deflate streams"),
        pytest.param(b"\x78\xbb" + bytes(20), "deflate", id="a dictionary is needed"),
        pytest.param(
            gzip.compress(b"") * (MAX_GZIP_MEMBERS + 1), "gzip", id="too many gzip members"
        ),
    ],
)
def test_decompress_refuses_when_the_body_is_not_what_it_says(body: bytes, encoding: str) -> None:
    for given_body in (body, in_pieces(body, 5)):
        with pytest.raises(InvalidRequest, match=encoding) as raised:
            decompress(given_body, encoding, LIMIT)
        assert raised.value.field == "body"


@pytest.mark.parametrize("encoding", ["br", "identity", "", "gzip, gzip", "deflate,gzip", "*"])
def test_decompress_refuses_when_the_coding_is_none_it_knows(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding) as raised:
        decompress(gzip.compress(BODY), encoding, LIMIT)
    assert raised.value.allowed == ("gzip", "deflate")


@pytest.mark.parametrize("encoding", sorted(CODINGS))
def test_decompress_allows_just_the_limit_when_a_body_has_it(encoding: str) -> None:
    body = compress([BODY], encoding)
    assert decompress(body, encoding, len(BODY)) == BODY
    with pytest.raises(PayloadTooLarge) as raised:
        decompress(body, encoding, len(BODY) - 1)
    assert raised.value.max_bytes == len(BODY) - 1


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(gzip.compress(bytes(64 << 20)), id="one member that unfolds a thousandfold"),
        pytest.param(gzip.compress(bytes(1 << 20)) * 64, id="many members that add up"),
    ],
)
def test_decompress_holds_little_when_a_body_unfolds_without_end(member: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            decompress(member, "gzip", 4 << 20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 6 << 20


def test_decompress_holds_the_result_once_when_it_is_large() -> None:
    body, size = gzip.compress(bytes(32 << 20)), 32 << 20
    tracemalloc.start()
    try:
        assert len(decompress(body, "gzip", size)) == size
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < size * 5 // 4


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        pytest.param(None, None, id="no header"),
        pytest.param("", None, id="an empty header"),
        pytest.param("gzip", "gzip", id="gzip"),
        pytest.param("deflate", "deflate", id="deflate"),
        pytest.param("GZIP", "gzip", id="in capitals"),
        pytest.param("x-gzip", "gzip", id="gzip by its old name"),
        pytest.param("deflate, gzip", "gzip", id="both, gzip behind"),
        pytest.param("gzip, deflate, br, zstd", "gzip", id="what browsers send"),
        pytest.param("br", None, id="only what isn't there"),
        pytest.param("br, deflate;q=0.1", "deflate", id="a better one that isn't there"),
        pytest.param("gzip;q=0.5, deflate;q=0.8", "deflate", id="deflate is preferred"),
        pytest.param("gzip ; q=0.5 ,deflate;Q=0.5", "gzip", id="equal weights with spaces"),
        pytest.param("gzip;q=0", None, id="gzip is refused"),
        pytest.param("gzip;q=0, deflate", "deflate", id="only gzip is refused"),
        pytest.param("gzip;q=0.000", None, id="gzip is refused with decimals"),
        pytest.param("*", "gzip", id="anything"),
        pytest.param("*;q=0", None, id="nothing"),
        pytest.param("gzip;q=0, *", "deflate", id="anything but gzip"),
        pytest.param("gzip;q=0.2, *;q=0.5", "deflate", id="anything rather than gzip"),
        pytest.param("identity", None, id="identity"),
        pytest.param("identity, gzip", "gzip", id="identity as well"),
        pytest.param("identity, gzip;q=0.5", None, id="identity is preferred"),
        pytest.param("identity;q=0.5, gzip", "gzip", id="gzip is preferred to identity"),
        pytest.param("identity;q=0", None, id="even identity is refused"),
        pytest.param(",, gzip ,", "gzip", id="empty elements"),
        pytest.param("gzip;q=0, gzip", "gzip", id="twice, with the higher weight"),
        pytest.param("gzip;q=1.000", "gzip", id="a weight of 1 with decimals"),
        pytest.param("gzip;q=1.5", None, id="a weight above 1"),
        pytest.param("gzip;q=0.1234", None, id="a weight of four decimals"),
        pytest.param("gzip;q=-1", None, id="a negative weight"),
        pytest.param("gzip;q=nan", None, id="a weight that is no number"),
        pytest.param("gzip;q=", None, id="no weight behind the sign"),
        pytest.param("gzip;level=1", None, id="another parameter"),
        pytest.param("gzip deflate", None, id="no comma between"),
        pytest.param("gzip, @", None, id="one element malformed"),
        pytest.param("gzip," * MAX_ACCEPT_ENCODING_LENGTH, None, id="too long"),
    ],
)
def test_encoding_is_chosen_by_weight_when_accepted(
    accepted: str | None, chosen: str | None
) -> None:
    assert choose_encoding(accepted) == chosen


@given(st.text(alphabet="gzipdeflat*;q=0.15, \tidentity-", max_size=60))
def test_encoding_is_always_one_that_exists_when_the_header_is_any(accepted: str) -> None:
    assert choose_encoding(accepted) in {None, *CODINGS}
