"""Which backups are kept: pure rules over times, no I/O.

Every counting rule keeps, for each of its newest N periods that have a backup, the *newest* backup
of that period (UTC; weeks are ISO weeks). `within` keeps everything younger than a span, `tags`
what has one of them. A backup is kept if any rule keeps it. The newest backup of a group is always
kept, and so is a held one.

Two things guard the counting rules against backups that are not what they seem. `min_age_s` is a
floor under them: by count alone, nothing younger goes, so that a flood of backups cannot push the
good ones out before somebody has had the time to see it. And a backup dated in the future (a clock
that is wrong) is kept, but counts nowhere: it cannot stand for a period, or for the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from offload.model import Backup


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """How many of each; spans in seconds. With no rule at all, everything is kept; `min_age_s` is
    a floor under rules, and none itself."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_s: float = 0.0
    tags: tuple[str, ...] = ()
    min_age_s: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether there is no rule at all."""
        return not (self.counting or self.within_s or self.tags)

    @property
    def counting(self) -> bool:
        """Whether there is a rule that counts."""
        return any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One backup, kept or not. `reasons` are empty exactly if it is not kept; then `missed` says
    what each rule would have needed."""

    backup: Backup
    reasons: tuple[str, ...]
    missed: tuple[str, ...] = ()

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
_UNITS = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


def judge(
    backups: Sequence[Backup], rules: KeepRules, now: datetime, held: Set[str] = frozenset()
) -> list[Verdict]:
    """A verdict for every backup, each group by itself, in the order given.

    `held`: ids of the backups with a legal hold. All reasons are named, not only the first.
    """
    found: dict[str, tuple[list[str], list[str]]] = {b.id: ([], []) for b in backups}
    for group in {b.group for b in backups}:
        mine = sorted(
            (b for b in backups if b.group == group),
            key=lambda b: (b.created_at, b.id),
            reverse=True,
        )
        for backup in mine:
            if backup.id in held:
                found[backup.id][0].append("held")
        _judge_group(mine, rules, now, found)
    return [
        Verdict(backup=b, reasons=tuple(why), missed=() if why else tuple(missed))
        for b, (why, missed) in ((b, found[b.id]) for b in backups)
    ]


def _judge_group(
    newest_first: Sequence[Backup],
    rules: KeepRules,
    now: datetime,
    found: dict[str, tuple[list[str], list[str]]],
) -> None:
    if rules.empty:
        for backup in newest_first:
            found[backup.id][0].append("no rules")
        return
    past = [backup for backup in newest_first if backup.created_at <= now]
    for backup in newest_first:
        if backup.created_at > now:
            found[backup.id][0].append("dated in the future")
    if past:
        found[past[0].id][0].append("newest")
    _count(past, rules, found)
    for backup in past:
        _judge_alone(backup, rules, now, *found[backup.id])


def _count(
    newest_first: Sequence[Backup],
    rules: KeepRules,
    found: dict[str, tuple[list[str], list[str]]],
) -> None:
    for number, backup in enumerate(newest_first, start=1):
        why, missed = found[backup.id]
        if number <= rules.last:
            why.append(f"last {number}")
        elif rules.last:
            missed.append(f"{number - 1} newer than it, last keeps {rules.last}")
    for name, period in _PERIODS.items():
        limit: int = getattr(rules, name)
        seen: dict[tuple[int, ...], str] = {}
        for backup in newest_first if limit else ():
            why, missed = found[backup.id]
            key = period(backup.created_at.astimezone(UTC))
            if key in seen:
                missed.append(f"{name}: {seen[key]} is newer in its {_UNITS[name]}")
            elif len(seen) == limit:
                missed.append(f"{name}: older than the newest {limit}")
            else:
                seen[key] = backup.id
                why.append(f"{name} {len(seen)}")


def _judge_alone(
    backup: Backup, rules: KeepRules, now: datetime, why: list[str], missed: list[str]
) -> None:
    """What a backup's own age and tags say."""
    age = now - backup.created_at
    if age < timedelta(seconds=rules.within_s):
        why.append("within")
    elif rules.within_s:
        missed.append("older than within")
    if rules.counting and age < timedelta(seconds=rules.min_age_s):
        why.append("younger than min_age")
    tagged = [tag for tag in rules.tags if tag in backup.tags]
    why += [f"tag {tag}" for tag in tagged]
    if rules.tags and not tagged:
        missed.append("no tag that is kept")
