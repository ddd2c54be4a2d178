"""HTTP's content codings: gzip and deflate of bodies, in and out.

Expansion is bounded: a few kilobytes can unfold to gigabytes. It knows bytes and the values of
two headers, not how requests and responses travel.
"""

import io
import re
import zlib
from collections.abc import Iterator, Sequence

from serve.errors import InvalidRequest, PayloadTooLarge, UnsupportedEncoding

# coding -> zlib's window bits for its format; "deflate" is zlib's own (RFC 9110, section 8.4.1.2)
CODINGS: dict[str, int] = {"gzip": 31, "deflate": 15}
# A smaller body fits into one TCP segment as it is: compressing it saves no packet.
MIN_COMPRESSED_BYTES = 1460
MAX_GZIP_MEMBERS = 1024
MAX_ACCEPT_ENCODING_LENGTH = 1024
LEVEL = 1  # tensors hardly shrink further, at several times the cost
_ALIASES = {"x-gzip": "gzip"}  # RFC 9110, section 8.4.1.3
_RAW_DEFLATE = -15
_CHUNK_BYTES = 256 * 1024  # unfolded at a time
_PIECE_BYTES = 64 * 1024  # fed at a time: zlib copies what it leaves over
# One element of Accept-Encoding (RFC 9110, sections 12.4.2 and 12.5.3): coding, perhaps a weight.
_PREFERENCE = re.compile(
    r"([!#$%&'*+.^_`|~0-9a-z-]+)(?:[ \t]*;[ \t]*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?"
)


def decompress(body: bytes | Sequence[bytes], encoding: str, max_bytes: int) -> bytes:
    """Unfold `body`, whole or in chunks, by the value of Content-Encoding.

    Raises UnsupportedEncoding for anything but one known coding, PayloadTooLarge past `max_bytes`,
    InvalidRequest for what is damaged, cut short or followed by something else.
    """
    name = encoding.strip().lower()
    coding = _ALIASES.get(name, name)
    if coding not in CODINGS:
        raise UnsupportedEncoding(encoding, tuple(CODINGS))
    chunks = [body] if isinstance(body, bytes) else body
    window_bits, max_members = CODINGS[coding], MAX_GZIP_MEMBERS
    if coding == "deflate":
        max_members = 1
        if not _has_zlib_header(chunks):
            window_bits = _RAW_DEFLATE
    try:
        return _unfolded(chunks, window_bits, max_members, max_bytes)
    except zlib.error:
        raise InvalidRequest("body", f"bytes that aren't {coding}", _want(coding)) from None
    except EOFError as error:
        raise InvalidRequest("body", str(error), _want(coding)) from None


def choose_encoding(accept_encoding: str | None) -> str | None:
    """The coding to answer in, by the value of Accept-Encoding; None for none.

    The client's weights decide, of equal ones gzip. A malformed value means none, and so does one
    that refuses even that: an answer that can't be read says more than an error.
    """
    weights = _weights(accept_encoding or "")
    others = weights.get("*", 0.0)
    best = max(CODINGS, key=lambda coding: weights.get(coding, others))
    weight = weights.get(best, others)
    return best if weight > 0 and weight >= weights.get("identity", others) else None


def compress(parts: Sequence[bytes], encoding: str) -> bytes:
    """The parts behind each other in `encoding`, one of `CODINGS`."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, CODINGS[encoding])
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])


def _has_zlib_header(chunks: Sequence[bytes]) -> bool:
    """Whether this is deflate as RFC 9110 has it. Some clients send it raw, in which these bits
    would be the padding of a stored block, which is written as zeros."""
    head = bytearray()
    for chunk in chunks:
        head += chunk[: 2 - len(head)]
        if len(head) == 2:
            return head[0] & 0x0F == 8 and head[0] >> 4 <= 7 and (head[0] << 8 | head[1]) % 31 == 0
    return True


def _unfolded(chunks: Sequence[bytes], window_bits: int, max_members: int, max_bytes: int) -> bytes:
    """Raises EOFError where the end isn't where it should be."""
    # It grows in place and hands out its buffer: nothing is held twice.
    unfolded = io.BytesIO()
    stream = zlib.decompressobj(window_bits)
    n_members = 1
    for piece in _pieces(chunks):
        rest: bytes | memoryview = piece
        while rest:
            if stream.eof:
                if n_members == max_members:
                    raise EOFError("bytes behind the end")
                n_members += 1
                stream = zlib.decompressobj(window_bits)
            rest = _fed(stream, rest, unfolded, max_bytes)
    if not stream.eof:
        raise EOFError("a body that is cut short")
    return unfolded.getvalue()


def _fed(
    stream: "zlib._Decompress", piece: bytes | memoryview, unfolded: io.BytesIO, max_bytes: int
) -> bytes:
    """Unfold `piece`; returns what lies behind the end of the stream, if that is in it."""
    while True:
        chunk = stream.decompress(piece, _CHUNK_BYTES)
        unfolded.write(chunk)
        if unfolded.tell() > max_bytes:
            raise PayloadTooLarge(unfolded.tell(), max_bytes)
        if stream.eof:
            return stream.unused_data
        if len(chunk) < _CHUNK_BYTES:  # a full one may not have been all of it
            return b""
        piece = stream.unconsumed_tail


def _pieces(chunks: Sequence[bytes]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


def _want(coding: str) -> str:
    if coding == "gzip":
        return f"whole gzip data of at most {MAX_GZIP_MEMBERS} members and nothing behind them"
    return "one whole deflate stream and nothing behind it"


def _weights(accept_encoding: str) -> dict[str, float]:
    """Weights by coding, the highest where one comes twice; empty where a part is malformed."""
    weights: dict[str, float] = {}
    if len(accept_encoding) > MAX_ACCEPT_ENCODING_LENGTH:
        return weights
    for part in accept_encoding.lower().split(","):
        element = part.strip(" \t")
        if not element:  # empty elements of a list are allowed
            continue
        match = _PREFERENCE.fullmatch(element)
        if match is None:
            return {}
        coding = _ALIASES.get(match[1], match[1])
        weights[coding] = max(weights.get(coding, 0.0), float(match[2] or 1))
    return weights
