"""The tables of the catalog, as the code of this version sees them.

The migrations make them; a test compares the two. Plain SQL types, so that PostgreSQL serves a
fleet with the same statements.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time; SQLite keeps no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """To UTC. A ValueError for a time without a zone: it would be stored as a guess."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData()

timemarks = Table(
    "timemarks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("group_name", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("consistency", Text, nullable=False),
    Column("instant", Text, nullable=False),
    Column("freeze_ms", Float, nullable=False),
    Column("skew_ms", Float, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("keep", Boolean, nullable=False),
    Column("snapshots", JSON, nullable=False),
    Column("reports", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("machines", JSON, nullable=False),
    Index("timemarks_group_time", "group_name", "created_at"),
)

views = Table(
    "views",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("origin", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("uri", Text, nullable=False),
    Column("writable", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sector_size", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("source", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("server", JSON, nullable=False),
    Column("exposure", JSON, nullable=False),
    Column("overlay_limit_bytes", BigInteger, nullable=False),
)

connections = Table(
    "connections",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("view", Text, nullable=False),
    Column("uri", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("read_only", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sector_size", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("device", Text, nullable=False),
    Column("record", JSON, nullable=False),
)

backups = Table(
    "backups",
    metadata,
    Column("id", Text, primary_key=True),
    Column("store", Text, nullable=False),
    Column("group_name", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime, nullable=False),
    Column("timemark", Text, nullable=False),  # may be gone by now, so no foreign key
    Column("consistency", Text, nullable=False),
    Column("instant", Text, nullable=False),
    Column("images", JSON, nullable=False),
    Column("parent", Text),  # the same
    Column("host", Text, nullable=False),
    Column("alarms", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("vms", JSON, nullable=False),
    Index("backups_store_time", "store", "created_at"),
)

# Which TimeMark the next incremental of a volume is compared with, and the backup made of it. A
# link is worth nothing without both, so it goes with either.
parents = Table(
    "parents",
    metadata,
    Column("store", Text, primary_key=True),
    Column("volume", Text, primary_key=True),
    Column("timemark", ForeignKey("timemarks.id", ondelete="CASCADE"), nullable=False),
    Column("backup", ForeignKey("backups.id", ondelete="CASCADE"), nullable=False),
)

# What the stores say, so that a list can show it: prune asks the store itself.
legal_holds = Table(
    "legal_holds",
    metadata,
    Column("backup", ForeignKey("backups.id", ondelete="CASCADE"), primary_key=True),
    Column("placed_at", UtcDateTime, nullable=False),
    Column("host", Text, nullable=False),
    Column("reason", Text, nullable=False),
)

verifications = Table(
    "verifications",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("backup", ForeignKey("backups.id", ondelete="CASCADE"), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("how", Text, nullable=False),
    Column("problems", Integer, nullable=False),
    Index("verifications_backup", "backup", "at"),
)

# What one `mount --placeholder` made on one backup host.
islands = Table(
    "islands",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("host", Text, nullable=False),
    Column("group_name", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("views", JSON, nullable=False),
    Column("placeholders", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("record", JSON, nullable=False),
)

# What hypervisors had when they were last asked; `kind` vm, datastore or host.
inventories = Table(
    "inventories",
    metadata,
    Column("hypervisor", Text, primary_key=True),
    Column("taken_at", UtcDateTime, nullable=False),
    Column("tags_problem", Text, nullable=False),
)

inventory_entries = Table(
    "inventory_entries",
    metadata,
    Column(
        "hypervisor", ForeignKey("inventories.hypervisor", ondelete="CASCADE"), primary_key=True
    ),
    Column("kind", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("entry", JSON, nullable=False),
    Index("inventory_names", "hypervisor", "name"),
)
