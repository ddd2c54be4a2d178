"""How the service's commands end where the user has something to mend: one line, exit code 2."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

EXIT_USAGE = 2
_NEEDED = ("alembic", "authlib", "jinja2", "jwt", "psutil", "requests", "sqlalchemy", "urllib3")


def usage(message: str) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(EXIT_USAGE)


def check_installed() -> None:
    missing = [name for name in _NEEDED if not importlib.util.find_spec(name)]
    if missing:
        usage(f"{', '.join(missing)} missing: pip install 'trimserve[service]'")


def made_folder(option: str, folder: Path) -> Path:
    """The folder that `option` names, made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        usage(f"{option}: got {folder} ({error.strerror}), want a folder, or a place for a new one")
    return folder


def database_at(database: str | None, data: Path) -> str:
    """Where the database is: `data` is its folder where nothing else is said."""
    return database or str(made_folder("--data", data) / "jobs.sqlite")


@contextmanager
def refusals(stores: str = "--blobs") -> Iterator[None]:
    """What can't be used, by the option that names it; `stores` names those of object stores."""
    from optimizer.service.database import DatabaseUnavailable, RevisionUnknown
    from optimizer.service.object_store import StoreUnavailable
    from optimizer.service.telemetry import TelemetryUnusable
    from optimizer.store.location import StoreInvalid

    try:
        yield
    except StoreInvalid as error:
        usage(f"--database: {error}")
    except DatabaseUnavailable as error:
        usage(f"--database: {error.shown}: {error.problem}")
    except RevisionUnknown as error:
        usage(f"--revision: {error}")
    except StoreUnavailable as error:
        usage(f"{stores}: {error}")
    except TelemetryUnusable as error:
        usage(str(error))
