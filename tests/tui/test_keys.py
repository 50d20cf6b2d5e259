"""What the keys do."""

from __future__ import annotations

import csv
import json
import stat

import pytest

from ksmtrace.analysis.recorded import gather
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.tui import replay
from ksmtrace.tui.moment import Phase


def test_processes_are_sorted_searched_grouped_and_opened(tui):
    async def act(pilot, app):
        listing = app.query_one("#processes-table")
        await pilot.press("2")
        await tui.drawn(pilot)
        assert listing.row_count == 3
        merged = [row.values["ksm_merging_pages"] for row in listing.table.rows]
        assert merged == sorted(merged, reverse=True)
        await pilot.press("s")
        await tui.drawn(pilot)
        pids = [row.values["pid"] for row in listing.table.rows]
        assert pids == sorted(pids, reverse=True)
        await pilot.press("S")
        await tui.drawn(pilot)
        assert [row.values["pid"] for row in listing.table.rows] == sorted(pids)
        await pilot.press("slash", *str(pids[0]), "enter")
        await tui.until(pilot, lambda: listing.row_count == 1)
        assert f"search {pids[0]}" in tui.text_of(app)
        await pilot.press("escape")
        await tui.until(pilot, lambda: listing.row_count == 3)
        await pilot.press("enter")
        await tui.until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.pause(0.05)
        assert "KSM_STAT" in tui.text_of(app) and "SHARES WITH" in tui.text_of(app)
        await pilot.press("escape")
        await tui.until(pilot, lambda: len(app.screen_stack) == 1)
        await pilot.press("g")
        await tui.until(pilot, lambda: listing.row_count == 1)
        row = listing.table.rows[0]
        assert row.values["processes"] == 3
        assert row.values["merged_pages"] == 303

    tui.drive(tui.replay("duplicates"), act, (120, 40))


def test_a_node_is_opened_with_its_sharers_and_history(tui):
    async def act(pilot, app):
        await pilot.press("3")
        await tui.drawn(pilot)
        listing = app.query_one("#trees-table")
        sharers = [row.values["sharers"] for row in listing.table.rows]
        assert sum(sharers) == 303 and sharers == sorted(sharers, reverse=True)
        await pilot.press("enter")
        await tui.until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.pause(0.05)
        text = tui.text_of(app)
        assert f"SHARERS  {sharers[0]}" in text and "since 0." in text
        await pilot.press("end")
        await pilot.pause(0.05)
        assert "ksm_merge_with_ksm_page" in tui.text_of(app)

    tui.drive(tui.replay("duplicates"), act, (120, 40))


def test_a_chain_shows_its_dups(tui):
    async def act(pilot, app):
        await pilot.press("3", "g")
        listing = app.query_one("#trees-table")
        await tui.until(pilot, lambda: listing.row_count == 13)
        dups = listing.table.rows[0].values["dups"]
        await pilot.press("enter")
        await tui.until(pilot, lambda: listing.row_count == dups)
        assert "by nodes" not in tui.text_of(app)

    tui.drive(tui.replay("guest-6.12-witnessed"), act, (120, 40))


@pytest.mark.parametrize(
    ("search", "count"),
    [("ksm_enter", 3), ("enter ksm-dup-0", 1), ("scan", 4), ("nothing-like-that", 0)],
)
def test_events_are_searched_by_kind_and_process(tui, search, count):
    async def act(pilot, app):
        await pilot.press("7", "slash", *search, "enter")
        listing = app.query_one("#events-table")
        await tui.until(pilot, lambda: len(app.screen_stack) == 1)
        await tui.until(pilot, lambda: listing.table.nr_rows == count)

    tui.drive(tui.replay("duplicates"), act, (120, 40))


def test_exact_numbers_on_demand(tui):
    async def act(pilot, app):
        await pilot.press("x")
        await tui.drawn(pilot)
        # 53 + 42 sharers of 53 nodes: pages_sharing is 42.
        assert f"{42 * 4096:,} B" in tui.text_of(app)

    tui.drive(tui.replay("cow"), act)


@pytest.mark.parametrize("key", ["e", "E"])
def test_the_table_is_exported_for_its_owner_only(tui, tmp_path, key):
    async def act(pilot, app):
        await pilot.press("2", key)
        await tui.until(pilot, lambda: any(tmp_path.iterdir()))

    tui.drive(tui.replay("duplicates"), act)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if key == "e":
        rows = list(csv.DictReader(path.open()))
        assert sum(int(row["merged_pages"]) for row in rows) == 303
    else:
        rows = json.loads(path.read_text())
        assert sum(row["merged_pages"] for row in rows) == 303
        assert {"left_per_s", "saved_bytes", "cgroup"} <= rows[0].keys()


def test_a_picture_of_the_screen(tui, tmp_path):
    async def act(pilot, app):
        await pilot.press("p")
        await tui.until(pilot, lambda: any(tmp_path.iterdir()))

    tui.drive(tui.replay("duplicates"), act)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("<svg") and "PAYING" in path.read_text()


def test_help_names_the_columns_and_closes(tui):
    async def act(pilot, app):
        await pilot.press("2", "question_mark")
        await tui.until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.pause(0.05)
        assert "ksm_process_profit" in tui.text_of(app)
        await pilot.press("escape")
        await tui.until(pilot, lambda: len(app.screen_stack) == 1)

    tui.drive(tui.replay("duplicates"), act, (100, 40))


def test_the_mouse_chooses_screens_and_sorts(tui):
    async def act(pilot, app):
        await pilot.click("#tabs", offset=(16, 0))
        await tui.until(pilot, lambda: app.tab == "processes")
        await tui.drawn(pilot)
        await pilot.click("#processes-table", offset=(2, 0))
        await tui.until(pilot, lambda: app._views["processes"].sort == "pid")

    tui.drive(tui.replay("duplicates"), act, (120, 40))


def test_light_and_dark(tui):
    async def act(pilot, app):
        assert app.current_theme.dark
        await pilot.press("t")
        assert not app.current_theme.dark

    tui.drive(tui.replay("duplicates"), act)


def test_a_replay_pauses_steps_and_seeks(tui):
    engine = tui.replay("guest-7.x-churn")

    async def act(pilot, app):
        length_ns = app.shown.position.length_ns
        # So slow that it does not come to its end before it is paused again.
        await pilot.press("minus", "minus", "minus", "left_curly_bracket")
        await tui.until(pilot, lambda: app.shown.position.at_ns == 0)
        await tui.until(pilot, lambda: app.shown.phase is Phase.PAUSED)
        await pilot.press("space")
        await tui.until(pilot, lambda: app.shown.phase is Phase.PLAYING)
        await tui.until(pilot, lambda: app.shown.position.at_ns > 0)
        await pilot.press("space")
        await tui.until(pilot, lambda: app.shown.phase is Phase.PAUSED)
        before = app.shown
        assert before.position.at_ns < length_ns and before.position.speed == 0.125
        await pilot.press("full_stop")
        after_ns = before.position.at_ns + 250_000_000
        await tui.until(pilot, lambda: app.shown.position.at_ns == after_ns)
        await pilot.press("plus")
        await tui.until(pilot, lambda: app.shown.position.speed == 0.25)
        await pilot.press(*["right_square_bracket"] * 4)
        await tui.until(pilot, lambda: app.shown.position.at_ns > length_ns // 5)
        part = app.shown.picture.nr_events
        await pilot.press("right_curly_bracket")
        await tui.until(pilot, lambda: app.shown.phase is Phase.ENDED)
        whole = app.shown.picture
        assert before.picture.nr_events <= part <= whole.nr_events == 3079

    tui.drive(engine, act)


def test_every_moment_of_a_replay_is_what_was_known_then(tui):
    engine = tui.replay("guest-7.x-churn")
    recorded = gather(RecordingReader(tui.recordings / "guest-7.x-churn.ksmt"))

    async def act(pilot, app):
        for share in (0.85, 0.5, 0.95):
            engine.seek(share)
            at_ns = round(share * engine.shown.position.length_ns)
            await tui.until(pilot, lambda at_ns=at_ns: app.shown.position.at_ns == at_ns)
            await tui.until(pilot, lambda: app.shown.phase is Phase.PAUSED)
            picture = app.shown.picture
            until_ns = recorded.header.started_ns + at_ns
            assert picture.nr_events == int((recorded.events["ts_ns"] <= until_ns).sum())
            assert picture.at_ns == until_ns

    tui.drive(engine, act)


def test_q_ends_with_status_0(tui):
    async def act(pilot, app):
        await pilot.press("q")

    assert tui.drive(tui.replay("cow"), act).return_code == 0


def test_seeking_back_folds_again_only_what_came_since(tui, monkeypatch):
    monkeypatch.setattr(replay, "CHECKPOINT_EVENTS", 101)
    engine = tui.replay("guest-7.x-churn")
    seen = []

    def at(engine, share):
        engine.seek(share)
        at_ns = round(share * engine.shown.position.length_ns)
        tui.wait(
            lambda: engine.shown.position.at_ns == at_ns and engine.shown.phase is Phase.PAUSED
        )
        return engine.shown.picture

    engine.start()
    tui.wait(lambda: engine.shown.phase is Phase.ENDED)
    back_to = engine._back_to
    engine._back_to = lambda target_ns: seen.append(back_to(target_ns)) or seen[-1]
    shares = (0.95, 0.9, 0.97, 0.85)
    pictures = [at(engine, share) for share in shares]
    assert len(engine._checkpoints) > 2 and len(seen) == 3
    begun = [player.nr_events for player in seen]
    engine.stop()
    assert engine.join()
    for share, picture in zip(shares, pictures, strict=True):
        fresh_engine = tui.replay("guest-7.x-churn")
        fresh_engine._commands.clear()
        fresh_engine.start()
        tui.wait(lambda engine=fresh_engine: engine.shown.position is not None)
        fresh = at(fresh_engine, share)
        fresh_engine.stop()
        assert fresh_engine.join()
        assert picture.nr_events == fresh.nr_events
        for name in ("merges", "passes", "books", "pages", "waits", "by_kind", "sample"):
            assert getattr(picture, name) == getattr(fresh, name), name
        assert [one.merged_pages for one in picture.processes] == [
            one.merged_pages for one in fresh.processes
        ]
        for table in ("stable_nodes", "rmap_items", "chains"):
            rows, fresh_rows = (getattr(p.trees.state, table) for p in (picture, fresh))
            assert rows.tobytes() == fresh_rows.tobytes(), table
    # They went on from what was known a hundred events or so before.
    assert all(count > 2000 for count in begun), begun
