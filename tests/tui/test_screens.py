"""Every screen, in both sizes and in every degraded state, is as it was looked at and kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ksmtrace.analysis.frames import open_recording
from ksmtrace.tui.draw import Look, width_of
from ksmtrace.tui.graphs import GRAPHS, graphs
from ksmtrace.tui.lines import Lines
from ksmtrace.tui.locks import locks
from ksmtrace.tui.moment import Phase
from ksmtrace.tui.overview import overview, trees

SIZES = pytest.mark.parametrize("size", [(80, 24), (160, 50)], ids=["80x24", "160x50"])
KEYS = {"overview": "1", "processes": "2", "trees": "3", "outcomes": "4", "locks": "5"}


@SIZES
@pytest.mark.parametrize("name", ["guest-7.x-fork-every-page", "guest-5.10-chains", "duplicates"])
def test_every_screen(tui, name, size):
    screens = {}

    async def act(pilot, app):
        for tab, key in {**KEYS, "events": "7"}.items():
            await pilot.press(key)
            await tui.drawn(pilot)
            screens[tab] = tui.text_of(app)

    tui.drive(tui.replay(name), act, size)
    for tab, text in screens.items():
        tui.compare(f"{name}-{tab}-{size[0]}x{size[1]}", text)


@pytest.mark.parametrize(
    ("name", "place", "says"),
    [("guest-7.x-churn", 10, "139  with skipped pages"), ("volatile", 1, "106")],
    ids=["smart scan", "without"],
)
def test_volatile_says_whether_skipped_pages_are_in_it(tui, name, place, says):
    sample = open_recording(tui.recordings / f"{name}.ksmt").samples[place]
    texts = ["".join(text for text, _ in one) for one in trees(None, sample, Look(79))]
    assert [text.split(maxsplit=1)[1].rstrip() for text in texts if "volatile" in text] == [says]


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("exact", [False, True])
def test_rows_of_bars_fit_whatever_their_figures(tui, columns, exact):
    engine = tui.replay("duplicates")
    tui.drive(engine, lambda pilot, app: tui.drawn(pilot))
    picture, look = engine.shown.picture, Look(columns - 1, exact)
    # As after 10 minutes with 41,237.9 pages a second: every place for a bar is taken.
    points = tuple(
        replace(picture.points[0], begin_ns=picture.at_ns + s * 10**9, pages_scanned=412379 * s)
        for s in range(601)
    )
    long = replace(picture, points=points, at_ns=points[-1].begin_ns)
    lines = graphs(long, look, list(GRAPHS))
    assert len(lines) == 1 + len(GRAPHS)
    assert max(map(width_of, lines)) <= look.width


@SIZES
@pytest.mark.parametrize(
    ("name", "tab"), [("contended-storm", "locks"), ("guest-6.12-visits", "outcomes")]
)
def test_waits_and_outcomes(tui, name, tab, size):
    screens = []

    async def act(pilot, app):
        await pilot.press(KEYS[tab])
        await tui.drawn(pilot)
        screens.append(tui.text_of(app))

    tui.drive(tui.replay(name), act, size)
    tui.compare(f"{name}-{tab}-{size[0]}x{size[1]}", screens[0])


@SIZES
@pytest.mark.parametrize("name", ["losses", "killed", "crash", "zero", "cow"])
def test_the_overview_of_a_degraded_state(tui, name, size):
    screens = []

    async def act(pilot, app):
        screens.append(tui.text_of(app))

    tui.drive(tui.replay(name), act, size)
    tui.compare(f"{name}-overview-{size[0]}x{size[1]}", screens[0])


def test_losses_are_told_where_one_looks_first(tui):
    async def act(pilot, app):
        text = tui.text_of(app)
        assert "247 LOST" in text.splitlines()[0]
        assert "246 ksm_merge_with_ksm_page" in " ".join(text.split())

    tui.drive(tui.replay("losses"), act)


def test_a_recording_that_was_cut_off_says_so(tui):
    async def act(pilot, app):
        assert "cut off: the file ends before its trailer" in tui.text_of(app)

    tui.drive(tui.replay("killed"), act)


def test_a_recording_that_is_damaged_shows_what_came_before(tui, tmp_path):
    content = bytearray((tui.recordings / "guest-7.x-churn.ksmt").read_bytes())
    content[len(content) * 3 // 4] ^= 255
    path = tmp_path / "damaged.ksmt"
    path.write_bytes(content)
    from ksmtrace.tui.replay import ReplayEngine

    async def act(pilot, app):
        text = tui.text_of(app)
        # Where it is broken into lines, the length of the path decides.
        assert "the recording is damaged before or at byte" in " ".join(text.split())
        assert app.shown.picture.nr_events > 0

    app = tui.drive(ReplayEngine(path, at_end=True), act)
    assert app.engine.failure is None


def test_what_is_not_visible_is_said_and_is_no_zero(tui):
    async def act(pilot, app):
        await pilot.press("4")
        await tui.drawn(pilot)
        text = " ".join(tui.text_of(app).split())
        assert "PAGE BY PAGE not visible on this kernel" in text
        assert "left singly not visible on this kernel" in text

    tui.drive(tui.replay("duplicates"), act, (160, 50))


def test_claims_are_judged_and_opened(tui):
    async def act(pilot, app):
        await pilot.press("6")
        await tui.until(pilot, lambda: app.shown.judged is not None)
        await tui.until(pilot, lambda: app.query_one("#claims-table").row_count > 0)
        text = tui.text_of(app)
        assert "judged on the whole recording" in text
        verdicts = {one.word for one in app.shown.judged.judgements}
        assert {"holds", "unknown", "refuted"} <= verdicts and "violated" not in verdicts
        await pilot.press("enter")
        await tui.until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.pause(0.05)
        assert "EVIDENCE" in tui.text_of(app)
        await pilot.press("escape")
        await tui.until(pilot, lambda: len(app.screen_stack) == 1)
        await pilot.press("g")
        await tui.until(pilot, lambda: "events say" in tui.text_of(app))
        assert app.query_one("#claims-table").cursor_key == "full_scans"

    tui.drive(tui.replay("guest-7.x-churn"), act, (160, 50))


@pytest.mark.parametrize("size", [(79, 24), (80, 23), (20, 5)])
def test_a_terminal_that_is_too_small_is_told_how_large_it_must_be(tui, size):
    async def act(pilot, app):
        assert "80×24" in tui.text_of(app).replace("\n", " ")
        await pilot.resize_terminal(80, 24)
        await tui.until(pilot, lambda: "IS KSM PAYING?" in tui.text_of(app))

    tui.drive(tui.replay("cow"), act, size)


def test_no_colour_is_drawn_where_nobody_wants_it(tui, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    async def act(pilot, app):
        colours = {
            segment.style.color.triplet
            for strip in app.screen._compositor.render_strips()
            for segment in strip
            if segment.style and segment.style.color and segment.style.color.triplet
        }
        assert all(len(set(colour)) == 1 for colour in colours), colours

    tui.drive(tui.replay("losses"), act)


def test_regret_and_copies_are_shown_or_why_not(tui):
    async def absent(pilot, app):
        await pilot.press("2")
        await tui.drawn(pilot)
        assert "regret, COW: not visible: the recording is older" in tui.text_of(app)
        (row, *_) = app.query_one("#processes-table").table.rows
        assert row.values["regretted_pages"] is None and row.values["copies"] is None
        await pilot.press("enter")
        await tui.until(pilot, lambda: "COPIES ON WRITE  not visible" in tui.text_of(app))

    async def seen(pilot, app):
        await pilot.press("2")
        await tui.drawn(pilot)
        assert "not visible" not in tui.text_of(app)
        (row, *_) = app.query_one("#processes-table").table.rows
        assert row.values["regretted_pages"] == 0 and row.values["copies"] == 0

    tui.drive(tui.replay("duplicates"), absent)
    tui.drive(tui.replay("guest-6.12-visits"), seen, (160, 50))


def luminance(colour):
    parts = (part / 255 for part in colour)
    red, green, blue = (
        one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_all_text_can_be_read_and_what_is_muted_is_paler(tui, theme):
    contrasts = {}

    async def act(pilot, app):
        if theme == "light":
            await pilot.press("t")
        assert app.current_theme.dark == (theme == "dark")
        for key in "1234567":
            await pilot.press(key)
            if key == "6":
                await tui.until(pilot, lambda: app.shown.judged is not None)
            await tui.drawn(pilot)
            strips = app.screen._compositor.render_strips()
            for segment in (segment for strip in strips for segment in strip):
                text, style = segment.text.strip(), segment.style
                # A single block is the end of a scroll bar.
                if any(map(str.isalnum, text)) or text[2:].strip("▁▂▃▄▅▆▇█") != text[2:]:
                    sides = map(luminance, (style.color.triplet, style.bgcolor.triplet))
                    dark, light = sorted(sides)
                    contrasts[text] = (light + 0.05) / (dark + 0.05)

    tui.drive(tui.replay("contended-storm"), act, (160, 50))
    assert {text: one for text, one in contrasts.items() if one < 4.5} == {}
    assert contrasts["saved"] < contrasts["IS KSM PAYING?"] / 1.5


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_exact_numbers_are_neither_cut_nor_run_together(tui, columns):
    engine = tui.replay("contended-storm")
    tui.drive(engine, lambda pilot, app: tui.drawn(pilot))
    look = Look(columns - 1, exact=True)
    shown = engine.shown
    waits = shown.picture.waits["mmap_lock"]
    said = {
        "overview": "\n".join("".join(text for text, _ in one) for one in overview(shown, look)),
        "locks": "\n".join("".join(text for text, _ in one) for one in locks(shown, look)),
    }
    passes = shown.picture.passes
    for value in (passes.median_ns, passes.longest_ns):
        assert f" {value:,} ns" in said["overview"]
    for value in (waits.holds, waits.total_wait_ns, waits.worst_hold_ns):
        assert f" {value:,} " in said["locks"]


def test_what_is_counted_and_not_mapped_is_an_alarm(tui):
    async def act(pilot, app):
        text = " ".join(tui.text_of(app).split())
        assert "the counters say that 964.0 KiB is saved, what is mapped 0 B" in text

    tui.drive(tui.replay("guest-6.12-witnessed"), act)


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (160, 50)])
def test_what_is_opened_fits_its_box(tui, size):
    async def act(pilot, app):
        for keys in (("question_mark",), ("3", "enter"), ("2", "enter")):
            await pilot.press(*keys)
            await tui.until(pilot, lambda: len(app.screen_stack) == 2)
            await pilot.pause(0.05)
            lines = app.screen.query_one(Lines)
            # One row each: nothing is wrapped once more by the widget.
            assert lines.size.height == len(lines._lines), tui.text_of(app)
            await pilot.press("escape")
            await tui.until(pilot, lambda: len(app.screen_stack) == 1)

    tui.drive(tui.replay("guest-6.12-witnessed"), act, size)


def test_what_came_before_the_damage_can_be_gone_to(tui, tmp_path):
    content = bytearray((tui.recordings / "guest-7.x-churn.ksmt").read_bytes())
    content[len(content) * 3 // 4] ^= 255
    path = tmp_path / "damaged.ksmt"
    path.write_bytes(content)
    from ksmtrace.tui.replay import ReplayEngine

    async def act(pilot, app):
        await pilot.press("left_curly_bracket", "space")
        await tui.until(pilot, lambda: app.shown.position.at_ns < app.shown.position.length_ns)
        await pilot.press("right_curly_bracket")
        await tui.until(pilot, lambda: app.shown.phase is Phase.ENDED)

    app = tui.drive(ReplayEngine(path, at_end=True), act)
    assert app.engine.failure is None
