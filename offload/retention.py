"""Which backups are kept: pure rules over times, no I/O.

Every counting rule keeps, for each of its newest N periods that have a backup, the *newest* backup
of that period (UTC; weeks are ISO weeks). `within` keeps everything younger than a span. A backup
is kept if any rule keeps it. The newest backup of a group is always kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from offload.model import Backup


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """How many of each; `within_s` in seconds. All zero: no rule, everything is kept."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_s: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether there is no rule at all."""
        return (
            not any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly))
            and not self.within_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One backup, kept or not. `reasons` are empty exactly if it is not kept."""

    backup: Backup
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether any rule keeps it."""
        return bool(self.reasons)


_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda t: (t.year, t.month, t.day, t.hour),
    "daily": lambda t: (t.year, t.month, t.day),
    "weekly": lambda t: t.isocalendar()[:2],
    "monthly": lambda t: (t.year, t.month),
    "yearly": lambda t: (t.year,),
}


def judge(backups: Sequence[Backup], rules: KeepRules, now: datetime) -> list[Verdict]:
    """A verdict for every backup, each group by itself, in the order given."""
    reasons: dict[str, list[str]] = {b.id: [] for b in backups}
    for group in {b.group for b in backups}:
        mine = sorted(
            (b for b in backups if b.group == group),
            key=lambda b: (b.created_at, b.id),
            reverse=True,
        )
        _judge_group(mine, rules, now, reasons)
    return [Verdict(backup=b, reasons=tuple(reasons[b.id])) for b in backups]


def _judge_group(
    newest_first: Sequence[Backup], rules: KeepRules, now: datetime, reasons: dict[str, list[str]]
) -> None:
    if rules.empty:
        for backup in newest_first:
            reasons[backup.id].append("no rules")
        return
    reasons[newest_first[0].id].append("newest")
    for number, backup in enumerate(newest_first[: rules.last], start=1):
        reasons[backup.id].append(f"last {number}")
    for name, period in _PERIODS.items():
        seen: set[tuple[int, ...]] = set()
        for backup in newest_first:
            if len(seen) == getattr(rules, name):
                break
            key = period(backup.created_at.astimezone(UTC))
            if key not in seen:
                seen.add(key)
                reasons[backup.id].append(f"{name} {len(seen)}")
    for backup in newest_first:
        if now - backup.created_at < timedelta(seconds=rules.within_s):
            reasons[backup.id].append("within")
