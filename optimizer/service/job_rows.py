"""Jobs as rows of the table, and back."""

import json
from typing import Any

from sqlalchemy import Row, update

from optimizer.service import schema
from optimizer.service.jobs import Job, Kind, Lease, State

COLUMNS = [column for column in schema.jobs.columns if column.name not in ("spec", "progress")]
"""Those of a `Job`: the others are documents, read by themselves."""


def of(job_id: str) -> Any:
    """An update of the job's row."""
    return update(schema.jobs).where(schema.jobs.c.id == job_id)


def row_of(job: Job) -> dict[str, Any]:
    lease = job.lease
    fields = {name: getattr(job, name) for name in job.__dataclass_fields__ if name != "lease"}
    return fields | {
        "labels": json.dumps(dict(job.labels), sort_keys=True, separators=(",", ":")),
        "worker": lease.worker if lease else None,
        "token": lease.token if lease else None,
        "lease_until_s": lease.until_s if lease else None,
    }


def job_of(row: Row[Any]) -> Job:
    held = dict(row._mapping)
    worker, token = held.pop("worker"), held.pop("token")
    until_s = held.pop("lease_until_s")
    lease = Lease(worker, token, until_s) if token is not None else None
    return Job(
        **{
            **held,
            "kind": Kind(held["kind"]),
            "state": State(held["state"]),
            "labels": json.loads(held["labels"]),
            "lease": lease,
        }
    )
