"""How many bytes of files a job keeps. Of jobs of before that isn't known, and counts as none."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        table.add_column(
            sa.Column("stored_bytes", sa.BigInteger, nullable=False, server_default="0")
        )
    with op.batch_alter_table("jobs") as table:
        table.alter_column("stored_bytes", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        table.drop_column("stored_bytes")
