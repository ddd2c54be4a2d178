"""YAML for people to read: what is there twice is written twice, keys keep their order."""

import yaml


class _Plain(yaml.SafeDumper):
    """Without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


def plain_yaml(document: object) -> str:
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, width=1_000_000)
