"""VMs: settings with TimeMarks, islands of placeholders, inventories of hypervisors."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add all three: what older versions made has no settings of VMs."""
    # In place, the default stays: a table made anew takes parents along.
    op.add_column("timemarks", sa.Column("machines", sa.JSON, nullable=False, server_default="[]"))
    op.add_column("backups", sa.Column("vms", sa.JSON, nullable=False, server_default="[]"))
    op.create_table(
        "islands",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("group_name", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("views", sa.JSON, nullable=False),
        sa.Column("placeholders", sa.JSON, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
    )
    op.create_table(
        "inventories",
        sa.Column("hypervisor", sa.Text, primary_key=True),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tags_problem", sa.Text, nullable=False),
    )
    op.create_table(
        "inventory_entries",
        sa.Column(
            "hypervisor",
            sa.Text,
            sa.ForeignKey("inventories.hypervisor", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("entry", sa.JSON, nullable=False),
    )
    op.create_index("inventory_names", "inventory_entries", ["hypervisor", "name"])
