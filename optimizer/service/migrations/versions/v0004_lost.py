"""How far a job has come, and the workers lost since; the last batch of events that was told."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_COLUMNS = ("reached", "lost", "told")


def upgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        for name in _COLUMNS:
            table.add_column(sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    # Until now every claim of a job that was taken back counted.
    op.execute(
        "UPDATE jobs SET lost = CASE WHEN state = 'queued' THEN attempt ELSE attempt - 1 END "
        "WHERE attempt > 0"
    )
    with op.batch_alter_table("jobs") as table:
        for name in _COLUMNS:
            table.alter_column(name, server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        for name in reversed(_COLUMNS):
            table.drop_column(name)
