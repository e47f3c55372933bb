"""How far the images of a group's VMs lie apart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column: what older versions held was held at one instant, or labelled."""
    with op.batch_alter_table("timemarks") as timemarks:
        timemarks.add_column(sa.Column("skew_ms", sa.Float, nullable=False, server_default="0"))
    with op.batch_alter_table("timemarks") as timemarks:
        timemarks.alter_column("skew_ms", server_default=None)
