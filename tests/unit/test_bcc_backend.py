"""What the only user of bcc does without bcc."""

import os

import pytest

from ksmtrace.capture import bcc_backend


def test_a_look_into_a_map_comes_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    before = os.sched_getscheduler(0)
    monkeypatch.setattr(
        os,
        "sched_setscheduler",
        lambda pid, policy, param: asked.append((policy, param.sched_priority)),
    )
    with pytest.raises(KeyError), bcc_backend._before_all_others():
        assert asked == [(os.SCHED_FIFO, 1)]
        raise KeyError
    assert asked == [(os.SCHED_FIFO, 1), (before, os.sched_getparam(0).sched_priority)]


def test_where_that_is_not_allowed_it_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with bcc_backend._before_all_others():
        looked = True
    assert looked
