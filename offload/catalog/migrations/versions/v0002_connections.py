"""To whom a view is exposed, how large its overlay may grow; views connected to this machine."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# What version 0001 could expose: unix sockets, and TCP on loopback without TLS.
_UNIX: dict[str, object] = {
    "transport": "unix",
    "address": "",
    "port": None,
    "initiators": [],
    "allow": [],
    "tls": "off",
    "insecure_network": False,
}


def upgrade() -> None:
    """Add the columns and the table."""
    with op.batch_alter_table("views") as views:
        views.add_column(
            sa.Column("exposure", sa.JSON, nullable=False, server_default=json.dumps(_UNIX))
        )
        views.add_column(
            sa.Column("overlay_limit_bytes", sa.BigInteger, nullable=False, server_default="0")
        )
    _expose_tcp()
    with op.batch_alter_table("views") as views:
        views.alter_column("exposure", server_default=None)
        views.alter_column("overlay_limit_bytes", server_default=None)
    op.create_table(
        "connections",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("view", sa.Text, nullable=False),
        sa.Column("uri", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("read_only", sa.Boolean, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sector_size", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
    )


def _expose_tcp() -> None:
    """Views on a TCP port are known by their record."""
    views = sa.table(
        "views", sa.column("id"), sa.column("server", sa.JSON), sa.column("exposure", sa.JSON)
    )
    database = op.get_bind()
    for ident, server in database.execute(sa.select(views.c.id, views.c.server)).all():
        if server.get("port"):
            exposure = {
                **_UNIX,
                "transport": "tcp",
                "address": server["address"],
                "port": int(server["port"]),
            }
            database.execute(sa.update(views).where(views.c.id == ident).values(exposure=exposure))
