"""Version policies: which of a model's versions are served.

Pure: it is told which versions there are, and knows neither a repository nor a configuration.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LATEST = 10_000
MAX_SPECIFIC = 1_000
_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_FORMS = "all, latest:N (for example latest:2) or specific:V,W (for example specific:1,3)"


@dataclass(frozen=True)
class VersionPolicy:
    """The versions of `specific` where there are any; else so many of the highest as `latest`
    says, all of them for None. Raises ValueError for what isn't a policy."""

    latest: int | None = 1
    specific: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.latest is not None and not 1 <= self.latest <= MAX_LATEST:
            raise ValueError(f"latest: got {self.latest}, want 1 to {MAX_LATEST} versions")
        if len(self.specific) > MAX_SPECIFIC:
            raise ValueError(
                f"specific: got {len(self.specific)} versions, want at most {MAX_SPECIFIC}"
            )
        for version in self.specific:
            if not _VERSION.fullmatch(version):
                raise ValueError(
                    f"specific: got version {version[:32]!r}, want whole numbers from 1"
                )

    def select(self, available: Sequence[str]) -> tuple[str, ...]:
        """Those of the `available` versions that are served, from the lowest to the highest."""
        ordered = sorted(set(available), key=int)
        if self.specific:
            return tuple(version for version in ordered if version in self.specific)
        return tuple(ordered if self.latest is None else ordered[-self.latest :])

    def missing(self, available: Sequence[str]) -> tuple[str, ...]:
        """The specific versions that aren't `available`, from the lowest to the highest."""
        return tuple(sorted(set(self.specific) - set(available), key=int))


def parse_policy(text: str) -> VersionPolicy:
    """The policy that a command line names; raises ValueError, which says what is allowed."""
    kind, _, rest = text.partition(":")
    try:
        if text == "all":
            return VersionPolicy(latest=None)
        if kind == "latest" and _VERSION.fullmatch(rest):
            return VersionPolicy(latest=int(rest))
        if kind == "specific" and rest:
            return VersionPolicy(None, tuple(dict.fromkeys(rest.split(","))))
    except ValueError as error:
        raise ValueError(f"version policy: {error}; the forms are {_FORMS}") from error
    raise ValueError(f"version policy: got {text[:64]!r}, want {_FORMS}")
