"""Checks of a declaration: the first field that is out of bounds, and what is wrong with it.

It knows neither manifests nor signatures; whoever declares says what to check.
"""

from collections.abc import Iterable

Check = tuple[str, object, bool, str]
"""Field, what was given, whether that is allowed, and what is."""
Problem = tuple[str, str]
"""Field, and what is wrong with it."""


def first_problem(checks: Iterable[Check]) -> Problem | None:
    """The first check that fails; those behind it aren't evaluated where `checks` is lazy."""
    for field, got, fits, want in checks:
        if not fits:
            return field, f"got {got!r}, want {want}"
    return None
