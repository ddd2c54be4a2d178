"""The commands `trimserve explain` and `trimserve compare`: what is on record of variants.

They read; nothing is built, measured or written. What they need is imported when they run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from optimizer.subject import Records, Subject

EXIT_USAGE = 2
_DEFAULT_REPOSITORY = Path("models")
_DEFAULT_STORE = str(Path(".trimserve", "store.sqlite"))

EXPLAIN_HELP = """\
Print where a variant comes from, what is known of it, and the command that makes it again.

VARIANT is `MODEL/VERSION` or `MODEL` (its newest version) in the repository, or the id of a
variant in the store, or the start of one. A version is explained by its manifest alone; a store
that knows it adds ids, artifacts and build times of each step.

**Exit code**: 0 printed, 2 where nothing, or more than one thing, has the name.

**Examples**

`trimserve explain digits/3 --repository models`

`trimserve explain 97dda36d --store .trimserve/store.sqlite --json`
"""
COMPARE_HELP = """\
Print two versions or variants side by side; what differs stands out.

A and B are named as for `trimserve explain`. Where the store has the answers of both to the same
samples, their accuracy is compared sample by sample.

**Exit code**: 0 printed, 2 where nothing, or more than one thing, has a name.

**Example**

`trimserve compare digits/2 digits/3 --repository models`
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

Repository = Annotated[
    Path, typer.Option(metavar="DIR", help="Model repository that versions are looked up in.")
]
StorePath = Annotated[
    str,
    typer.Option(metavar="FILE|URL", help="Store of variants and measurements, if there is one."),
]
Artifacts = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of its artifacts, where it isn't beside the file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("explain", help=EXPLAIN_HELP, no_args_is_help=True)
def explain_command(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="Version or variant.")],
    repository: Repository = _DEFAULT_REPOSITORY,
    store: StorePath = _DEFAULT_STORE,
    artifacts: Artifacts = None,
    as_json: AsJson = False,
) -> None:
    from optimizer.explain import document, print_explanation

    [subject] = _subjects([variant], repository, store, artifacts)
    if as_json:
        _print_json(document(subject))
    else:
        print_explanation(subject, Console())


@app.command("compare", help=COMPARE_HELP, no_args_is_help=True)
def compare_command(
    a: Annotated[str, typer.Argument(metavar="A", help="Version or variant.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    repository: Repository = _DEFAULT_REPOSITORY,
    store: StorePath = _DEFAULT_STORE,
    artifacts: Artifacts = None,
    as_json: AsJson = False,
) -> None:
    from optimizer.comparison import document, print_comparison

    first, second = _subjects([a, b], repository, store, artifacts)
    if as_json:
        _print_json(document(first, second))
    else:
        print_comparison(first, second, Console())


def _subjects(
    names: list[str], repository: Path, store: str, artifacts: Path | None
) -> "list[Subject]":
    from optimizer.store import StoreInvalid
    from optimizer.subject import SubjectNotFound, find_subject
    from serve.errors import ArtifactInvalid

    try:
        with _opened(store, artifacts) as records:
            return [find_subject(name, repository, records, store) for name in names]
    except (ArtifactInvalid, StoreInvalid, SubjectNotFound) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from error


@contextmanager
def _opened(store: str, artifacts: Path | None) -> "Iterator[Records | None]":
    """The store, or None where there is none: opening would make one."""
    is_url = "://" in store
    if not is_url and not Path(store).is_file():
        if store != _DEFAULT_STORE:
            typer.echo(f"error: --store: there is no file {store}", err=True)
            raise typer.Exit(EXIT_USAGE)
        yield None
        return
    from optimizer.store import Store

    with Store(store if is_url else Path(store), artifacts) as opened:
        yield opened


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
