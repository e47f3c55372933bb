"""Tags of backups, and legal holds on them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add both: what older versions wrote has no tags."""
    # In place, the default stays: a table made anew takes parents and verifications along.
    op.add_column("backups", sa.Column("tags", sa.JSON, nullable=False, server_default="[]"))
    op.create_table(
        "legal_holds",
        sa.Column(
            "backup",
            sa.Text,
            sa.ForeignKey("backups.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("placed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
