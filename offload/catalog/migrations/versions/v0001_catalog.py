"""TimeMarks, views, backups, parents, verifications."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the first tables."""
    _timemarks()
    _views()
    _backups()
    op.create_table(
        "parents",
        sa.Column("store", sa.Text, primary_key=True),
        sa.Column("volume", sa.Text, primary_key=True),
        _reference("timemark", "timemarks"),
        _reference("backup", "backups"),
    )
    op.create_table(
        "verifications",
        sa.Column("id", sa.Integer, primary_key=True),
        _reference("backup", "backups"),
        _time("at"),
        _text("how"),
        sa.Column("problems", sa.Integer, nullable=False),
    )
    op.create_index("verifications_backup", "verifications", ["backup", "at"])


def _timemarks() -> None:
    op.create_table(
        "timemarks",
        sa.Column("id", sa.Text, primary_key=True),
        _text("group_name"),
        _time("created_at"),
        _text("consistency"),
        _text("instant"),
        sa.Column("freeze_ms", sa.Float, nullable=False),
        _text("purpose"),
        sa.Column("keep", sa.Boolean, nullable=False),
        _json("snapshots"),
        _json("reports"),
        _json("warnings"),
    )
    op.create_index("timemarks_group_time", "timemarks", ["group_name", "created_at"])


def _views() -> None:
    op.create_table(
        "views",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        _text("origin"),
        _text("target"),
        _text("uri"),
        sa.Column("writable", sa.Boolean, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sector_size", sa.Integer, nullable=False),
        _time("created_at"),
        _json("source"),
        _text("state"),
        _json("server"),
    )


def _backups() -> None:
    op.create_table(
        "backups",
        sa.Column("id", sa.Text, primary_key=True),
        _text("store"),
        _text("group_name"),
        _time("created_at"),
        _time("finished_at"),
        _text("timemark"),
        _text("consistency"),
        _text("instant"),
        _json("images"),
        sa.Column("parent", sa.Text),
        _text("host"),
        _json("alarms"),
    )
    op.create_index("backups_store_time", "backups", ["store", "created_at"])


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False)


def _time(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=False)


def _reference(name: str, table: str) -> sa.Column[str]:
    return sa.Column(
        name, sa.Text, sa.ForeignKey(f"{table}.id", ondelete="CASCADE"), nullable=False
    )
