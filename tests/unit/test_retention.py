"""Which backups are kept."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from offload.model import Backup, BackupId, Consistency, Instant
from offload.retention import KeepRules, judge

_NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
_COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def _backup(ident: str, at: datetime, group: str = "g") -> Backup:
    return Backup(
        id=BackupId(ident), store="s", group=group, created_at=at, finished_at=at,
        timemark="t", consistency=Consistency.CRASH, instant=Instant.ONE, images=(),
    )  # fmt: skip


def _nightly(count: int) -> list[Backup]:
    return [_backup(f"n{i:03}", _NOW - timedelta(days=i)) for i in range(count)]


def _kept(backups: list[Backup], rules: KeepRules) -> set[str]:
    return {v.backup.id for v in judge(backups, rules, _NOW) if v.kept}


_backups = st.lists(
    st.tuples(st.integers(0, 3 * 365 * 24 * 60), st.sampled_from("ab")), max_size=40
).map(
    lambda made: [
        _backup(f"b{i:03}", _NOW - timedelta(minutes=age), group)
        for i, (age, group) in enumerate(made)
    ]
)
_rules = st.builds(
    KeepRules,
    **{name: st.integers(0, 5) for name in _COUNTS},
    within_s=st.integers(0, 400 * 86400).map(float),
)


@given(_backups, _rules)
def test_judge_newest_of_every_group_is_always_kept(
    backups: list[Backup], rules: KeepRules
) -> None:
    kept = _kept(backups, rules)
    for group in {b.group for b in backups}:
        newest = max((b for b in backups if b.group == group), key=lambda b: (b.created_at, b.id))
        assert newest.id in kept


@given(_backups, _rules.filter(lambda r: not r.empty), _rules)
def test_judge_more_rules_never_drop_more(
    backups: list[Backup], rules: KeepRules, more: KeepRules
) -> None:
    wider = KeepRules(
        **{name: max(getattr(rules, name), getattr(more, name)) for name in _COUNTS},
        within_s=max(rules.within_s, more.within_s),
    )
    assert _kept(backups, rules) <= _kept(backups, wider)


@given(_backups, _rules)
def test_judge_gives_one_verdict_each_in_order_and_groups_do_not_touch(
    backups: list[Backup], rules: KeepRules
) -> None:
    assert [v.backup for v in judge(backups, rules, _NOW)] == backups
    alone = [_kept([b for b in backups if b.group == g], rules) for g in "ab"]
    assert _kept(backups, rules) == alone[0] | alone[1]


@given(_backups)
def test_judge_without_rules_keeps_everything(backups: list[Backup]) -> None:
    assert _kept(backups, KeepRules()) == {b.id for b in backups}


@given(_backups, st.integers(1, 5), st.sampled_from(_COUNTS[1:]))
def test_judge_period_rule_keeps_the_newest_of_each_of_the_newest_periods(
    backups: list[Backup], count: int, name: str
) -> None:
    form = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G %V", "monthly": "%Y-%m",
            "yearly": "%Y"}[name]  # fmt: skip
    wanted: set[str] = set()
    for group in {b.group for b in backups}:
        newest: dict[str, Backup] = {}
        for b in sorted(backups, key=lambda b: (b.created_at, b.id)):
            if b.group == group:
                newest[b.created_at.strftime(form)] = b
        wanted |= {newest[key].id for key in sorted(newest)[-count:]}
    assert _kept(backups, replace(KeepRules(), **{name: count})) == wanted


@given(_backups, st.integers(1, 1000))
def test_judge_within_keeps_what_is_younger_than_the_span(backups: list[Backup], days: int) -> None:
    kept = _kept(backups, KeepRules(within_s=days * 86400.0))
    assert {b.id for b in backups if _NOW - b.created_at < timedelta(days=days)} <= kept
    assert len(kept) <= sum(_NOW - b.created_at < timedelta(days=days) for b in backups) + 2


def test_judge_nightly_backups_counts_are_exact() -> None:
    backups = _nightly(400)
    assert _kept(backups, KeepRules(last=3)) == {"n000", "n001", "n002"}
    assert (
        len(_kept(backups, KeepRules(daily=7, weekly=4))) == 7 + 2
    )  # two weeks end within the seven days
    assert len(_kept(backups, KeepRules(monthly=12))) == 12
    assert len(_kept(backups, KeepRules(yearly=9))) == 2


def test_judge_periods_are_those_of_utc_whatever_the_zone_of_the_time() -> None:
    east = timezone(timedelta(hours=10))
    late = _backup("late", datetime(2026, 11, 20, 20, tzinfo=UTC).astimezone(east))
    early = _backup("early", datetime(2026, 11, 20, 1, tzinfo=UTC))
    today = _backup("today", _NOW)
    assert _kept([late, early, today], KeepRules(daily=2)) == {"late", "today"}


def test_judge_reasons_name_the_rules() -> None:
    found = {v.backup.id: v.reasons for v in judge(_nightly(3), KeepRules(last=2, daily=1), _NOW)}
    assert found == {"n000": ("newest", "last 1", "daily 1"), "n001": ("last 2",), "n002": ()}
