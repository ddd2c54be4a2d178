"""Options that several of the service's commands have."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


Data = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder of everything that has no place of its own.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        envvar="TRIMSERVE_SERVICE_DATABASE",
        help="Jobs: a SQLite file (DATA/jobs.sqlite), or postgresql://USER@HOST/DATABASE.",
    ),
]
BlobsOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URL", help="Uploads and results: a folder (DATA/blobs), or s3://BUCKET/PREFIX."
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        envvar="TRIMSERVE_STORE",
        help="Store of all studies, as of `trimserve optimize` (DATA/store.sqlite).",
    ),
]
ArtifactsOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the store's artifacts.")
]
RepositoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--repository",
        metavar="NAME=DIR|URL",
        help="A serving repository that jobs can be published to, a folder or s3://BUCKET/PREFIX; "
        "again for more.",
    ),
]
AllowStore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL",
        help="What addresses in specs may begin with: s3://BUCKET/PREFIX, https://HOST/PATH, "
        "file:///DIR; again for more.",
    ),
]
AllowFactory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Functions that specs may name, * and ? allowed; again for more.",
    ),
]
AllowAgent = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="Measuring agents that specs may name; again for more."),
]
AllowPt2 = Annotated[
    bool,
    typer.Option(help="Take .pt2 archives, which can carry code that the job's process runs."),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(min=0.1, metavar="GB", help="Of a job with all its processes; then it's ended."),
]
JobDisk = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="GB",
        help="Of a job: its files, and what it adds to the store of studies; then it's ended.",
    ),
]
StoredQuota = Annotated[
    float | None,
    typer.Option(min=0.001, metavar="GB", help="Files that all jobs of one owner keep."),
]
Format = Annotated[LogFormat, typer.Option(help="auto: text on a terminal, else JSON lines.")]
