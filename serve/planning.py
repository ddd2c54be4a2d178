"""Plans: which versions a model should have, by what the repository holds and what is wanted.

Pure decisions over listings; nothing is loaded here, and nothing known of what is.
"""

import logging
from dataclasses import dataclass

from serve.errors import ArtifactInvalid, InvalidRequest
from serve.model_config import parse_config, parse_config_json, policy_of
from serve.model_config_pb2 import ModelConfig
from serve.storage.listing import ModelListing, VersionListing
from serve.version_policy import VersionPolicy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A model to load: which of its versions, and as what.

    `config` stands in for the folder's config.pbtxt; `digest` picks the one version of that
    content, whatever the policy says.
    """

    name: str
    config: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Plan:
    """What a model should be: the versions to have, and what each of them is made from."""

    listing: ModelListing
    config: ModelConfig | None
    versions: tuple[VersionListing, ...]
    override: str = ""

    def key(self, version: VersionListing) -> str:
        """Changes where loading the version again would give something else."""
        shared = "" if version.has_manifest else self.listing.side_fingerprint
        return "\n".join((version.fingerprint, shared, self.override))


def planned(listing: ModelListing, wanted: Wanted, default: VersionPolicy) -> Plan:
    """The versions of `listing` to have, by its configuration's policy or else the default one.

    Raises ArtifactInvalid where the configuration is broken or there is no version to have, and
    InvalidRequest where it is the client's and can't be followed.
    """
    if listing.problem:
        raise ArtifactInvalid(listing.name, listing.problem)
    config = _config(listing, wanted)
    where = f"{listing.name}/config.pbtxt"
    given = policy_of(config, where) if config is not None else None
    policy = given or default
    names = [version.version for version in listing.versions]
    selected = policy.select(names)
    for missing in policy.missing(names):
        _log.warning("version %s isn't there", missing, extra={"model": wanted.name})
    if not selected:
        raise ArtifactInvalid(listing.name, f"no version to serve, there are {names}")
    versions = tuple(one for one in listing.versions if one.version in selected)
    return Plan(listing, config, versions, wanted.config)


def _config(listing: ModelListing, wanted: Wanted) -> ModelConfig | None:
    """The client's configuration, or else the folder's, which only Triton's layout follows."""
    is_manifest = all(version.has_manifest for version in listing.versions)
    if not wanted.config:
        if listing.config is None or is_manifest:
            return None
        return parse_config(listing.config, f"{listing.name}/config.pbtxt")
    try:
        config = parse_config_json(wanted.config, "parameters.config")
    except ArtifactInvalid as error:
        raise InvalidRequest("parameters.config", "a configuration", str(error)) from error
    if config.name not in ("", listing.name):
        want = f"{listing.name!r}, or none"
        raise InvalidRequest("parameters.config.name", config.name, want)
    _check_override(config, is_manifest)
    return config


def _check_override(config: ModelConfig, is_manifest: bool) -> None:
    """A version with a manifest is described by it; a load call may choose among them only."""
    given = {field.name for field, _ in config.ListFields()} - {"name", "version_policy"}
    if is_manifest and given:
        raise InvalidRequest(
            "parameters.config",
            ", ".join(sorted(given)),
            "version_policy only, for versions described by their manifest.json",
        )
