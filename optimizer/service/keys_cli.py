"""`trimserve service key`: makes, lists and revokes API keys."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.service.exits import check_installed, database_at, refusals, usage
from optimizer.service.options import Data, DatabaseOption

if TYPE_CHECKING:
    from optimizer.service.auth import Keys

app = typer.Typer(name="key", help="API keys.", no_args_is_help=True)


@app.command("make")
def make_key(
    name: Annotated[str, typer.Argument(help="Whose it is, as the audit names it.")],
    scope: Annotated[
        list[str], typer.Option(help="read, submit, publish or admin; again for more.")
    ],
    database: DatabaseOption = None,
    data: Data = Path(".trimserve", "service"),
    days: Annotated[float | None, typer.Option(min=0.01, help="How long it is good.")] = None,
) -> None:
    """Make an API key. Its text goes to standard output, this once."""
    check_installed()
    from optimizer.service.auth import Scope

    allowed = [one.value for one in Scope]
    wrong = [one for one in scope if one not in allowed]
    if wrong:
        usage(f"--scope: got {wrong[0]!r}, want {', '.join(allowed)}")
    scopes = {Scope(one) for one in scope}
    if Scope.SUBMIT in scopes or Scope.PUBLISH in scopes:
        scopes.add(Scope.READ)
    with _opened(database, data) as keys:
        key, text = keys.make(name, scopes, None if days is None else days * 86_400)
    typer.echo(f"key {key.id} of {name}: {', '.join(sorted(scopes))}", err=True)
    typer.echo(text)


@app.command("list")
def list_keys(database: DatabaseOption = None, data: Data = Path(".trimserve", "service")) -> None:
    """The keys, without their texts, which nobody knows."""
    with _opened(database, data) as keys:
        found = keys.all()
    for key in found:
        state = "revoked" if key.revoked_s is not None else "good"
        if state == "good" and key.expires_s is not None:
            state = f"until {time.strftime('%Y-%m-%d', time.gmtime(key.expires_s))}"
        typer.echo(f"{key.id}  {key.name}  {','.join(sorted(key.scopes))}  {state}")


@app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `list`.")],
    database: DatabaseOption = None,
    data: Data = Path(".trimserve", "service"),
) -> None:
    """A key that is good no more, at once."""
    with _opened(database, data) as keys:
        is_done = keys.revoke(key_id)
    if not is_done:
        usage(f"there is no good key {key_id}")


@contextmanager
def _opened(database: str | None, data: Path) -> "Iterator[Keys]":
    """The keys in the database, whose tables are brought up to date."""
    check_installed()
    with refusals():
        from optimizer.service.auth import Keys
        from optimizer.service.database import Database

        opened = Database(database_at(database, data))
        opened.migrate()
        yield Keys(opened)
        opened.close()
