"""Numbers as a reader wants them: short, in units that fit, and a dash for what isn't known."""

import math
from collections.abc import Sequence


def milliseconds(seconds: float | None) -> str:
    """Three digits, without the unit; a dash for what isn't known, ∞ for infinity."""
    return number(None if seconds is None else seconds * 1e3)


def number(value: float | None, digits: int = 3) -> str:
    """Without an exponent where a reader can do without one."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        rounded = float(f"{value:.{digits}g}") if abs(value) < 10**digits else round(value)
        return f"{rounded:,.10f}".rstrip("0").rstrip(".")
    return f"{value:.{digits}g}"


def percent(share: float | None, decimals: int = 2) -> str:
    return "–" if share is None else f"{share * 100:.{decimals}f}%"


def bytes_(size: float | None) -> str:
    """In the largest decimal unit of which there is at least one."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size is not None and size >= scale:
            return f"{number(size / scale)} {unit}"
    return "–" if size is None else f"{size:.0f} bytes"


def quantity(value: float | None, unit: str) -> str:
    """A reason's value or limit with its unit."""
    if value is None:
        return "–"
    if unit == "s":
        return f"{milliseconds(value)} ms"
    if unit == "1":
        return percent(value)
    if unit == "bytes":
        return bytes_(value)
    return f"{number(value)} {unit.replace('1/s', 'requests/s')}".strip()


def points(share: float | None) -> str:
    """A share in percentage points, without the unit."""
    return "–" if share is None else f"{share * 100 + 0.0:.2f}"


def duration(seconds: float) -> str:
    """In the largest of seconds, minutes and hours of which there are at least two."""
    for unit, scale in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{number(seconds / scale, 2)} {unit}"
    return f"{number(seconds, 2)} s"


def shape(sizes: Sequence[int]) -> str:
    return "×".join(str(size) for size in sizes) or "–"
