"""Which backups are kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from offload.model import Backup, BackupId, Consistency, Instant
from offload.retention import KeepRules, judge

_NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
_COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def _backup(ident: str, at: datetime, group: str = "g", tags: tuple[str, ...] = ()) -> Backup:
    return Backup(
        id=BackupId(ident), store="s", group=group, created_at=at, finished_at=at,
        timemark="t", consistency=Consistency.CRASH, instant=Instant.ONE, images=(),
        tags=tags,
    )  # fmt: skip


def _nightly(count: int) -> list[Backup]:
    return [_backup(f"n{i:03}", _NOW - timedelta(days=i)) for i in range(count)]


def _kept(backups: list[Backup], rules: KeepRules, held: frozenset[str] = frozenset()) -> set[str]:
    return {v.backup.id for v in judge(backups, rules, _NOW, held) if v.kept}


_FORMS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G %V", "monthly": "%Y-%m",
          "yearly": "%Y"}  # fmt: skip


def _model(backups: list[Backup], rules: KeepRules, held: frozenset[str]) -> set[str]:
    """The rules again, said as plainly as they can be: a backup at a time."""
    if rules.empty:
        return {b.id for b in backups}
    return {b.id for b in backups if b.id in held or _model_keeps(b, backups, rules)}


def _model_keeps(one: Backup, backups: list[Backup], rules: KeepRules) -> bool:
    if one.created_at > _NOW:
        return True
    peers = [b for b in backups if b.group == one.group and b.created_at <= _NOW]
    newer = [b for b in peers if (b.created_at, b.id) > (one.created_at, one.id)]
    if not newer or len(newer) < rules.last or set(rules.tags) & set(one.tags):
        return True
    for name, form in _FORMS.items():
        period = one.created_at.strftime(form)
        periods = {b.created_at.strftime(form) for b in newer}
        if period not in periods and len(periods) < getattr(rules, name):
            return True
    age_s = (_NOW - one.created_at).total_seconds()
    counts = any(getattr(rules, name) for name in _COUNTS)
    return age_s < rules.within_s or (counts and age_s < rules.min_age_s)


_backups = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3 * 365 * 24 * 60), st.integers(0, 3000)),
        st.sampled_from("ab"),
        st.sampled_from([(), ("t",), ("t", "u"), ("u",)]),
    ),
    max_size=40,
).map(
    lambda made: [
        _backup(f"b{i:03}", _NOW - timedelta(minutes=age), group, tags)
        for i, (age, group, tags) in enumerate(made)
    ]
)
_future = st.lists(st.integers(1, 2 * 365 * 24 * 60), max_size=5).map(
    lambda minutes: [
        _backup(f"f{i:03}", _NOW + timedelta(minutes=ahead)) for i, ahead in enumerate(minutes)
    ]
)
_rules = st.builds(
    KeepRules,
    **{name: st.integers(0, 5) for name in _COUNTS},
    within_s=st.one_of(st.just(0.0), st.integers(0, 400 * 86400).map(float)),
    tags=st.sampled_from([(), ("t",), ("u", "v")]),
    min_age_s=st.one_of(st.just(0.0), st.integers(0, 30 * 86400).map(float)),
)


@given(_backups, _future, _rules, st.integers(0, 2**45 - 1))
def test_judge_agrees_with_the_plain_model(
    backups: list[Backup], future: list[Backup], rules: KeepRules, mask: int
) -> None:
    every = [*future, *backups]
    held = frozenset(b.id for i, b in enumerate(every) if mask >> i & 1 and i % 5 == 0)
    verdicts = judge(every, rules, _NOW, held)
    assert {v.backup.id for v in verdicts if v.kept} == _model(every, rules, held)
    assert all(v.kept or v.missed or not rules.counting for v in verdicts)
    assert all(not (v.kept and v.missed) for v in verdicts)


@given(_backups, _future, _rules)
def test_judge_backups_dated_in_the_future_push_nothing_out(
    backups: list[Backup], future: list[Backup], rules: KeepRules
) -> None:
    assert _kept([*backups, *future], rules) == _kept(backups, rules) | {b.id for b in future}


@given(_backups, st.integers(1, 20), st.integers(1, 200))
def test_judge_flood_of_backups_pushes_out_nothing_younger_than_the_floor(
    backups: list[Backup], days: int, count: int
) -> None:
    rules = KeepRules(last=3, hourly=3, daily=3, weekly=3, min_age_s=days * 86400.0)
    flood = [_backup(f"x{i:03}", _NOW - timedelta(seconds=i), "a") for i in range(count)]
    young = {b.id for b in backups if _NOW - b.created_at < timedelta(days=days)}
    assert young <= _kept([*backups, *flood], rules)


def test_judge_floor_alone_is_no_rule() -> None:
    backups = _nightly(30)
    assert len(_kept(backups, KeepRules(min_age_s=86400.0))) == 30
    assert len(_kept(backups, KeepRules(tags=("t",), min_age_s=10 * 86400.0))) == 1


def test_judge_says_of_each_rule_why_it_does_not_keep() -> None:
    night = timedelta(days=1)
    backups = [_backup("new", _NOW), _backup("noon", _NOW - night),
               _backup("morning", _NOW - night - timedelta(hours=3)),
               _backup("old", _NOW - 2 * night)]  # fmt: skip
    rules = KeepRules(last=1, daily=2, within_s=3600.0, tags=("t",))
    missed = {v.backup.id: v.missed for v in judge(backups, rules, _NOW) if not v.kept}
    tail = ("older than within", "no tag that is kept")
    assert missed == {
        "morning": ("2 newer than it, last keeps 1", "daily: noon is newer in its day", *tail),
        "old": ("3 newer than it, last keeps 1", "daily: older than the newest 2", *tail),
    }


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
        tags=(*rules.tags, *more.tags),
        min_age_s=max(rules.min_age_s, more.min_age_s),
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
    form = _FORMS[name]
    wanted: set[str] = set()
    for group in {b.group for b in backups}:
        newest: dict[str, Backup] = {}
        for b in sorted(backups, key=lambda b: (b.created_at, b.id)):
            if b.group == group:
                newest[b.created_at.strftime(form)] = b
        wanted |= {newest[key].id for key in sorted(newest)[-count:]}
    rule: dict[str, Any] = {name: count}
    assert _kept(backups, KeepRules(**rule)) == wanted


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
