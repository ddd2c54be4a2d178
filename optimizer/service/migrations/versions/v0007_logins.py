"""Sessions of who has logged in at the OpenID provider, and such logins under way."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("sessions") as table:
        table.alter_column("key_id", existing_type=sa.String(16), nullable=True)
        table.add_column(sa.Column("subject", sa.String(256)))
        table.add_column(sa.Column("scopes", sa.String(128)))
    op.create_table(
        "logins",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("state", sa.String(128), nullable=False),
        sa.Column("nonce", sa.String(128), nullable=False),
        sa.Column("verifier", sa.String(128), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("expires_s", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_logins"),
    )
    op.create_index("ix_logins_expires_s", "logins", ["expires_s"])


def downgrade() -> None:
    op.drop_table("logins")
    op.execute("DELETE FROM sessions WHERE key_id IS NULL")
    with op.batch_alter_table("sessions") as table:
        table.drop_column("scopes")
        table.drop_column("subject")
        table.alter_column("key_id", existing_type=sa.String(16), nullable=False)
