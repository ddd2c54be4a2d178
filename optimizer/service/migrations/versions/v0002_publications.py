"""Publications to serving repositories, and jobs of another kind: load tests of them.

Going back loses both, since the older code knows neither.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "publications",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("repository", sa.String(128), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.String(20), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("updated_s", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_publications"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_publications_job_id"),
        sa.UniqueConstraint(
            "repository", "model", "version", name="uq_publications_repository_model_version"
        ),
    )
    op.create_index("ix_publications_job_id", "publications", ["job_id"])
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(
            sa.Column("kind", sa.String(16), nullable=False, server_default="optimization")
        )
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("kind", server_default=None)


def downgrade() -> None:
    jobs = sa.table("jobs", sa.column("id"), sa.column("kind"))
    gone = sa.select(jobs.c.id).where(jobs.c.kind != "optimization")
    for name in ("events", "logs"):
        table = sa.table(name, sa.column("job_id"))
        op.execute(table.delete().where(table.c.job_id.in_(gone)))
    op.execute(jobs.delete().where(jobs.c.kind != "optimization"))
    op.drop_table("publications")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("kind")
