"""The application: screens, keys, and what they do; it draws what the engine has published."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import CommandPalette
from textual.containers import Container, VerticalScroll
from textual.content import Content
from textual.events import Resize
from textual.screen import Screen
from textual.style import Style
from textual.widgets import ContentSwitcher, Static

from ksmtrace.errors import KsmtraceError

from . import draw, happened, judged, nodes, processes
from .dialogs import Ask, Choose, Confirm, Details
from .draw import Line, Look
from .engine import Engine
from .help import help_lines
from .lines import Lines
from .listing import Listing
from .locks import locks
from .moment import Phase, Shown
from .outcomes import outcomes
from .overview import overview
from .specs import SPECS, figures
from .tables import Table, View
from .themes import DARK, LIGHT, themes

LEAST_COLUMNS, LEAST_ROWS = 80, 24
_TICK_S = 0.1
_JUDGE_S = 5.0
_JUDGE_BEHIND_S = 30.0  # while another screen is shown: for the alarms
_MOST_JUDGE_SHARE = 4  # at most a fifth of the time goes into claims
_MOST_JUDGED_UNASKED = 1_000_000  # events of a recording

TABS = ("overview", "processes", "trees", "outcomes", "locks", "claims", "events")
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Top(App[int]):
    """Shows KSM at work: the running kernel's, or a recording's.

    Args:
        engine: what it shows.
        title: what that is, in a few words.

    Attributes:
        changed: knobs that were changed from here, and what they were.
        nr_draws: how often something was drawn anew.
    """

    CSS_PATH = "top.tcss"
    TITLE = "ksmtrace top"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"tab('{name}')", name, show=False)
            for number, name in enumerate(TABS, 1)
        ),
        Binding("tab", "next_tab(1)", "next", show=False, priority=True),
        Binding("shift+tab", "next_tab(-1)", "before", show=False, priority=True),
        # In the order in which the bar shows them: the last ones give way on a narrow terminal.
        Binding("question_mark,f1", "help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
        # Also out of what is open over a screen, and from a line that is being typed in.
        Binding("ctrl+c", "quit", "quit", show=False, priority=True),
        Binding("slash", "search", "search", key_display="/"),
        Binding("s", "sort(1)", "sort"),
        Binding("S", "reverse", "other way round", show=False),
        Binding("g", "group", "group"),
        Binding("space", "freeze", "pause"),
        Binding("r", "record", "record"),
        Binding("left_square_bracket", "seek(-0.05)", "back", key_display="["),
        Binding("right_square_bracket", "seek(0.05)", "on", key_display="]"),
        Binding("full_stop", "step", "step", key_display="."),
        Binding("k", "knobs", "knobs"),
        Binding("e", "export('csv')", "export"),
        Binding("x", "exact", "exact"),
        Binding("E", "export('json')", "export as JSON", show=False),
        Binding("p", "picture", "picture", show=False),
        Binding("w", "savings", "page truth", show=False),
        Binding("J", "judge", "judge the claims", show=False),
        Binding("t", "theme", "theme", show=False),
        Binding("escape", "forget_search", "all", show=False),
        Binding("left_curly_bracket", "seek_to(0)", "begin", show=False),
        Binding("right_curly_bracket", "seek_to(1)", "end", show=False),
        Binding("plus,equals_sign", "faster(1)", "faster", show=False),
        Binding("minus", "faster(-1)", "slower", show=False),
    ]

    def __init__(self, engine: Engine, title: str = "") -> None:
        super().__init__()
        self.engine = engine
        self.changed: dict[str, str] = {}
        self.nr_draws = 0
        self.animation_level = "none"
        for theme in themes():
            self.register_theme(theme)
        self.theme = DARK
        self._title = title
        self._look = Look(LEAST_COLUMNS)
        self._views = {
            name: View(by=spec.ways[0] if spec.ways else "") for name, spec in SPECS.items()
        }
        self._drawn: tuple[object, ...] = ()
        self._judged_s = -math.inf
        self._begun_s = 0.0
        self._regions: tuple[str, ...] | None = None
        self._is_built = False

    def compose(self) -> ComposeResult:
        """Build the screen."""
        yield Lines(id="status")
        yield Static(id="tabs")
        with ContentSwitcher(id="body", initial="overview"):
            for name in TABS:
                if name in SPECS:
                    with Container(id=name):
                        yield Lines(id=f"{name}-heading", classes="heading")
                        yield Listing(f"{name}-table")
                        yield Lines(id=f"{name}-empty", classes="empty")
                else:
                    with VerticalScroll(id=name):
                        yield Lines(id=f"{name}-lines", classes="lines")
        yield Static(id="small")
        yield Static(id="keys")

    def on_mount(self) -> None:
        """Begin to draw, and let the engine begin."""
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            # Only a main thread may have handlers; a test's application runs in one too.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self._on_signal)
        self.query_one("#events-table", Listing).follows = True
        self._is_built = True
        self.show_tab("overview")
        self.set_interval(_TICK_S, self.redraw)
        self.call_after_refresh(self.engine.start)

    def _on_signal(self) -> None:
        self.exit(0)

    async def on_unmount(self) -> None:
        """Let the engine end."""
        self._is_built = False
        self.engine.stop()

    # ---- drawing ----

    @property
    def tab(self) -> str:
        """Name of the screen that is shown."""
        return self.query_one("#body", ContentSwitcher).current or TABS[0]

    @property
    def shown(self) -> Shown:
        """The moment that is to be drawn."""
        return self.engine.shown

    def on_resize(self, event: Resize) -> None:
        """Fit the new size, or say that it is too small."""
        size = event.size
        self._look = Look(size.width - 1, self._look.exact, self.changed)
        too_small = size.width < LEAST_COLUMNS or size.height < LEAST_ROWS
        self.screen_stack[0].set_class(too_small, "too-small")
        self.query_one("#small", Static).update(
            f"ksmtrace top needs {LEAST_COLUMNS}×{LEAST_ROWS}; this is {size.width}×{size.height}"
        )
        self._draw_tabs()
        self.redraw()

    def redraw(self) -> None:
        """Draw what has changed since the last time."""
        # The timer's last tick may come when the screens have gone.
        if not (self._is_built and self.screen_stack and self.screen_stack[0].query("#status")):
            return  # not there yet, or being taken down
        shown = self.shown
        if shown.phase is Phase.FAILED and shown.picture is None:
            failure = self.engine.failure
            status = failure.exit_status if failure else 1
            self.exit(status, return_code=status)
            return
        self._keep_judging(shown)
        now = (shown.number, self.tab, self._look, tuple(self._views.items()), len(self.changed))
        if now == self._drawn:
            return
        self._drawn = now
        self.nr_draws += 1
        root = self.screen_stack[0]
        root.query_one("#status", Lines).show([draw.status(shown, self._look)])
        self._draw_tab(root, shown)
        for screen in self.screen_stack[1:]:
            if isinstance(screen, Details):
                screen.redraw()

    def _draw_tab(self, root: Screen[object], shown: Shown) -> None:
        name = self.tab
        if name not in SPECS:
            lines = {"overview": overview, "outcomes": outcomes, "locks": locks}
            root.query_one(f"#{name}-lines", Lines).show(lines[name](shown, self._look))
            return
        view = self._views[name]
        table = SPECS[name].make(shown, view)
        listing = root.query_one(f"#{name}-table", Listing)
        listing.show(table, self._look, view.sort, view.reverse)
        listing.display = bool(table.rows)
        empty = root.query_one(f"#{name}-empty", Lines)
        empty.display = not table.rows
        empty.show(draw.wrapped(table.empty, self._look.width - 4, draw.MUTED))
        heading = root.query_one(f"#{name}-heading", Lines)
        heading.show(self._heading(name, shown, view, table))

    def _heading(self, name: str, shown: Shown, view: View, table: Table) -> list[Line]:
        lines: list[Line] = []
        if name == "trees":
            lines += nodes.tree_summary(shown, self._look)
        elif name == "processes":
            lines += processes.processes_gap(shown, self._look)
        elif name == "claims":
            lines += judged.claims_heading(shown, view, self._look)
        said: Line = []
        if view.by and view.by not in ("process", "nodes", "claims"):
            said.append((f"by {view.by}  ", draw.BOLD))
        if view.search:
            said += [
                ("search ", draw.MUTED),
                (view.search, draw.BOLD),
                ("  esc: all  ", draw.MUTED),
            ]
        what = dict.fromkeys(SPECS, "rows") | {"events": "events kept"}
        if table.nr_rows > len(table.rows):
            which = "last" if name == "events" else "first"
            said.append((f"the {which} {len(table.rows):,} of {table.nr_rows:,} {what[name]}", ""))
        elif name in ("processes", "events"):
            of = what[name] if table.nr_rows != 1 else what[name].replace("s", "", 1)
            said.append((f"{table.nr_rows:,} {of}", ""))
        picture = shown.picture
        if name == "processes" and picture is not None and picture.processes_forgotten:
            gone = picture.processes_forgotten
            said.append((f"  {gone:,} that exited longer ago are not listed", draw.MUTED))
        if name == "events" and picture is not None and picture.only_counted:
            kinds = " and ".join(picture.only_counted)
            said.append((f"  {kinds}: only counted", draw.MUTED))
        elif name == "events":
            said.append(("  without what happens for every page", draw.MUTED))
        return [*lines, said] if said else lines

    def _draw_tabs(self) -> None:
        parts = []
        for number, name in enumerate(TABS, 1):
            title = f"{number} {name.capitalize()}"
            mark = "reverse b" if name == self.tab else ""
            shown = f"[{mark}] {title} [/]" if mark else f" {title} "
            parts.append(f"[@click=app.tab('{name}')]{shown}[/]")
        root = self.screen_stack[0]
        root.query_one("#tabs", Static).update("".join(parts), layout=False)
        keys = []
        room = self._look.width + 1
        for one in self.BINDINGS:
            if not (isinstance(one, Binding) and one.show and self._offers(one.action)):
                continue
            key = Content.assemble(
                (one.key_display or one.key.partition(",")[0], "bold $said-bar"),
                f" {one.description}",
            )
            room -= key.cell_length + 1
            if room < -1:
                break
            keys.append(key.stylize(Style.from_meta({"@click": f"app.{one.action}"})))
        root.query_one("#keys", Static).update(Content(" ").join(keys), layout=False)

    def _offers(self, action: str) -> bool | None:
        name, _, arguments = action.partition("(")
        return self.check_action(name, (arguments,))

    # ---- moving about ----

    def show_tab(self, name: str) -> None:
        """Show a screen."""
        self.query_one("#body", ContentSwitcher).current = name
        self._draw_tabs()
        self.redraw()
        if name in SPECS:
            self.query_one(f"#{name}-table", Listing).focus()
        else:
            self.query_one(f"#{name}", VerticalScroll).focus()

    def action_tab(self, name: str) -> None:
        """Show a screen, unless something is open over it."""
        if len(self.screen_stack) == 1:
            self.show_tab(name)

    def action_next_tab(self, by: int) -> None:
        """Show the next screen, or with -1 the one before."""
        if len(self.screen_stack) > 1:
            if by > 0:
                self.screen.focus_next()
            else:
                self.screen.focus_previous()
            return
        self.show_tab(TABS[(TABS.index(self.tab) + by) % len(TABS)])

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what can be done here."""
        # What is chosen in the palette is done when it has closed.
        over = self._is_built and (
            len(self.screen_stack) - isinstance(self.screen, CommandPalette) > 1
        )
        table = self._is_built and self.tab in SPECS
        if action in ("sort", "reverse"):
            return table and self.tab != "events" and not over
        if action in ("search", "forget_search"):
            return table and not over
        if action == "group":
            return bool(table and SPECS[self.tab].ways) and not over
        if action in ("record", "knobs", "savings"):
            return self.engine.is_live and not over
        if action in ("seek", "seek_to", "step", "faster"):
            return not self.engine.is_live and not over
        if action in ("freeze", "export", "picture", "exact", "judge", "theme"):
            return not over
        return True

    def action_help(self) -> None:
        """Show the keys, and what the screen shows."""
        columns = (
            self.query_one(f"#{self.tab}-table", Listing).table.columns
            if (self.tab in SPECS)
            else ()
        )
        tab, is_live = self.tab, self.engine.is_live
        self.push_screen(Details("Help", lambda width: help_lines(tab, is_live, columns, width)))

    def action_exact(self) -> None:
        """Write numbers in full, or readable again."""
        self._look = Look(self._look.width, not self._look.exact, self.changed)
        self.redraw()

    def action_theme(self) -> None:
        """Change between dark and light."""
        self.theme = LIGHT if self.current_theme.dark else DARK

    # ---- tables ----

    def _change_view(self, **changes: object) -> None:
        self._views[self.tab] = replace(self._views[self.tab], **changes)  # type: ignore[arg-type]
        self.redraw()

    def action_search(self) -> None:
        """Ask for what rows must hold."""
        hint = "words that a row must hold"
        if self.tab == "events":
            hint = "kind, process, or pid:N; all words must match"
        tab = self.tab

        def take(search: str | None) -> None:
            if search is not None and tab == self.tab:
                self._change_view(search=search.strip())

        self.push_screen(Ask("Search", self._views[tab].search, hint), take)

    def action_forget_search(self) -> None:
        """Show all rows again."""
        if self._views[self.tab].search:
            self._change_view(search="")

    def action_sort(self, by: int) -> None:
        """Sort by the next column."""
        names = ["", *(column.name for column in self._listing().table.columns)]
        view = self._views[self.tab]
        at = names.index(view.sort) if view.sort in names else 0
        self._change_view(sort=names[(at + by) % len(names)], reverse=False)

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._change_view(reverse=not self._views[self.tab].reverse)

    def on_listing_head_clicked(self, event: Listing.HeadClicked) -> None:
        """Sort by the column that was clicked on; the other way round the second time."""
        if self.tab == "events":
            return
        view = self._views[self.tab]
        again = view.sort == event.name
        self._change_view(sort=event.name, reverse=again and not view.reverse)

    def action_group(self) -> None:
        """Put the rows together another way."""
        ways = SPECS[self.tab].ways
        at = ways.index(self._views[self.tab].by)
        self._change_view(by=ways[(at + 1) % len(ways)], sort="", reverse=False)

    def _listing(self) -> Listing:
        return self.query_one(f"#{self.tab}-table", Listing)

    def on_listing_opened(self, event: Listing.Opened) -> None:
        """Open the row."""
        row = event.row
        key = row.key
        tab, view = self.tab, self._views[self.tab]
        if tab == "processes":
            if view.by != "process":
                name = "" if key == "–" else key
                self._change_view(by="process", search=name)
                return
            self._open_process(key)
        elif tab == "trees" and view.by == "nodes":
            self._open("Stable node", lambda look: nodes.node_detail(self.shown, key, look))
        elif tab == "trees":
            chain = key.partition(".")[0]
            self._change_view(by="nodes", search=f"{int(chain):#x}")
        elif tab == "claims":
            detail = judged.book_detail if view.by == "books" else judged.claim_detail
            self._open("Claim", lambda look: detail(self.shown, key, look))
        elif tab == "events":
            self._open("Event", lambda look: happened.event_detail(self.shown, row, look))

    def _open(self, title: str, make: object) -> None:
        def lines(width: int) -> list[Line]:
            return make(Look(width, self._look.exact, self.changed))  # type: ignore[operator,no-any-return]

        self.push_screen(Details(title, lines))

    def _open_process(self, key: str) -> None:
        self._regions = None
        self._open(
            "Process",
            lambda look: processes.process_detail(self.shown, key, look, self._regions),
        )
        picture = self.shown.picture
        process = processes.find_process(picture, key) if picture else None
        if self.engine.is_live and process is not None and process.pid and not process.exited_ns:
            self._read_regions(process.pid)

    @work(thread=True, exclusive=True)
    def _read_regions(self, pid: int) -> None:
        from ksmtrace.kernel.procfs import read_smaps_ksm
        from ksmtrace.units import text_bytes

        try:
            mappings = read_smaps_ksm(pid)
        except KsmtraceError as error:
            self._regions = (f"unknown: {error}",)
            return
        self._regions = tuple(
            f"{one.start:#x}-{one.end:#x} {text_bytes(one.end - one.start):>10}"
            + ("" if one.ksm_bytes is None else f", {text_bytes(one.ksm_bytes)} KSM pages")
            for one in mappings or ()
            if one.mergeable
        ) or ("none",)

    # ---- claims ----

    def _keep_judging(self, shown: Shown) -> None:
        if shown.picture is None:
            return
        self._begun_s = self._begun_s or time.monotonic()
        asked, judged = self.tab == "claims", shown.judged
        if judged is None:
            few = self.engine.is_live or shown.picture.nr_events <= _MOST_JUDGED_UNASKED
            due_s = 0.0 if asked else self._begun_s + _JUDGE_S if few else math.inf
        elif self.engine.is_live and shown.phase not in (Phase.ENDED, Phase.FAILED):
            wait_s = _JUDGE_S if asked else _JUDGE_BEHIND_S
            due_s = self._judged_s + wait_s + _MOST_JUDGE_SHARE * judged.took_s
        else:
            return
        if time.monotonic() >= due_s:
            self.action_judge()

    def action_judge(self) -> None:
        """Judge the claims now."""
        if time.monotonic() - self._judged_s > 1.0:
            self._judged_s = time.monotonic()
            self.engine.ask_claims()

    # ---- time ----

    def action_freeze(self) -> None:
        """Pause, or go on."""
        self.engine.freeze()

    def action_seek(self, by: float) -> None:
        """Go on or back by a part of the recording."""
        self.engine.seek_by(by)

    def action_seek_to(self, share: float) -> None:
        """Go to the begin or the end of the recording."""
        self.engine.seek(share)

    def action_step(self) -> None:
        """Go a quarter of a second on."""
        self.engine.step()

    def action_faster(self, by: int) -> None:
        """Replay faster, or slower."""
        self.engine.faster(by)

    # ---- files ----

    def action_record(self) -> None:
        """Begin a recording, or end the one that is under way."""
        recorder = self.shown.recorder
        if recorder is not None and not recorder.says:
            self.engine.end_recording()
            return
        if self._is_over():
            return
        path = Path(time.strftime("ksmtrace-%Y%m%d-%H%M%S.ksmt")).absolute()
        since = self.shown.can_record
        if since is not None:
            ago_s = (time.monotonic_ns() - since) / 1e9
            self.notify(
                f"recording to {path.name} in {path.parent}, from {ago_s:.0f} s ago; r ends it"
            )
        self.engine.record(path)

    def action_export(self, form: str) -> None:
        """Write the table of this screen to a file."""
        table = (
            SPECS[self.tab].make(self.shown, replace(self._views[self.tab], most=None))
            if self.tab in SPECS
            else figures(self.shown)
        )
        path = Path(time.strftime(f"ksmtrace-top-{self.tab}-%Y%m%d-%H%M%S.{form}")).absolute()
        text = table_as_csv(table) if form == "csv" else table_as_json(table)
        rows = f"{len(table.rows):,} rows"
        if table.nr_rows > len(table.rows):
            rows = f"the first {rows} of {table.nr_rows:,}"
        self._write(path, text, rows)

    def action_picture(self) -> None:
        """Write the screen to an SVG file."""
        path = Path(time.strftime(f"ksmtrace-top-{self.tab}-%Y%m%d-%H%M%S.svg")).absolute()
        self._write(path, self.picture(), "a picture")

    def picture(self) -> str:
        """Return the screen as SVG, which loads nothing from anywhere."""
        drawn = self.export_screenshot(title="ksmtrace top")
        return re.sub(r"@font-face \{[^}]*\}\s*", "", drawn)

    def _write(self, path: Path, text: str, what: str) -> None:
        try:
            write_new(path, text)
        except OSError as error:
            self.notify(f"{path} cannot be written: {error.strerror}", severity="error")
        else:
            self.notify(f"{path.name} in {path.parent}: {what}")

    # ---- the kernel ----

    def _is_over(self) -> bool:
        # Says so: nobody would do what is asked for then.
        over = self.shown.phase in (Phase.ENDED, Phase.FAILED)
        if over:
            self.notify(f"not done: ended, {self.shown.says}", severity="error")
        return over

    def action_savings(self) -> None:
        """Have the page tables read."""
        if self._is_over():
            return
        self.notify("reading the page tables of all mergeable memory")
        self.engine.ask_savings()

    def action_knobs(self) -> None:
        """Choose a knob to change."""
        from ksmtrace.workload.knobs import KNOBS

        sample = self.shown.sample
        if sample is None:
            return
        options = [
            (name, f"{name:<36}{sample.ksm[name]}")
            for name in ("run", *(knob for knob in KNOBS if knob != "run"))
            if sample.ksm.get(name) is not None
        ]
        self.push_screen(Choose("Change a knob of KSM", options), self._ask_value)

    def _ask_value(self, name: str | None) -> None:
        from ksmtrace.kernel.sysfs import FILE_BY_NAME

        if name is None:
            return
        sample = self.shown.sample
        now = "" if sample is None else str(sample.ksm.get(name))

        def take(value: str | None) -> None:
            if value is not None and value.strip() not in ("", now):
                self._confirm_knob(name, now, value.strip())

        self.push_screen(Ask(name, now, FILE_BY_NAME[name].meaning), take)

    def _confirm_knob(self, name: str, now: str, value: str) -> None:
        lines: list[Line] = [
            [(f"/sys/kernel/mm/ksm/{name}: ", ""), (now, draw.BOLD), (" → ", ""),
             (value, draw.BOLD)],
            [],
            *draw.wrapped(
                "This changes KSM for the whole machine, and it STAYS so when ksmtrace top ends.",
                60, draw.WARN,
            ),
        ]  # fmt: skip

        def take(yes: bool | None) -> None:
            if yes:
                self._change_knob(name, value)

        self.push_screen(Confirm(f"Change {name}?", lines), take)

    @work(thread=True)
    def _change_knob(self, name: str, value: str) -> None:
        # In a thread: run=2 returns when everything is unmerged.
        from ksmtrace.workload.change import change_knob

        try:
            before = change_knob(name, value)
        except KsmtraceError as error:
            self.call_from_thread(self.notify, str(error), severity="error")
            return
        self.changed.setdefault(name, before)
        self.call_from_thread(self.notify, f"{name} is now {value}; it was {before}")

    # ---- the command palette ----

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Offer everything that has a key."""
        for name in TABS:
            yield SystemCommand(
                f"Show {name}", f"the screen {name}", lambda n=name: self.show_tab(n)
            )
        commands = (
            ("Help", "keys and columns", "help"),
            ("Search", "only rows that hold some words", "search"),
            ("Sort", "by the next column", "sort(1)"),
            ("Group", "put rows together another way", "group"),
            ("Other way round", "sort so", "reverse"),
            ("Pause or go on", "hold the picture", "freeze"),
            ("Step", "a quarter of a second on", "step"),
            ("Faster", "replay so", "faster(1)"),
            ("Slower", "replay so", "faster(-1)"),
            ("To the begin", "of the recording", "seek_to(0)"),
            ("To the end", "of the recording", "seek_to(1)"),
            ("Record", "from the moment before; again: end", "record"),
            ("Change a knob", "after a confirmation", "knobs"),
            ("Export as CSV", "the table of this screen", "export('csv')"),
            ("Export as JSON", "the table of this screen", "export('json')"),
            ("Save a picture", "the screen as SVG", "picture"),
            ("Exact numbers", "or readable ones", "exact"),
            ("Read the page truth", "what is mapped, beside the counters", "savings"),
            ("Judge the claims", "now", "judge"),
            ("Light or dark", "the other theme", "theme"),
            ("Quit", "end", "quit"),
        )
        for title, meaning, action in commands:
            name = action.partition("(")[0]
            if name == "quit" or self.check_action(name, ()):
                yield SystemCommand(
                    title, meaning, lambda a=action: self.call_later(self.run_action, a)
                )

    async def action_quit(self) -> None:
        """End, with status 0."""
        self.exit(0)


def table_as_csv(table: Table) -> str:
    """Write a table's exact values as CSV, with a line of names first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in table.columns]
    writer.writerow(names)
    for row in table.rows:
        writer.writerow(["" if row.values.get(n) is None else row.values[n] for n in names])
    return text.getvalue()


def table_as_json(table: Table) -> str:
    """Write a table's exact values as a JSON array of objects; null stands for absent."""
    names = [column.name for column in table.columns]
    rows = [{name: row.values.get(name) for name in names} for row in table.rows]
    return json.dumps(rows, indent=1) + "\n"


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet, readable by its owner only.

    Raises:
        OSError: it is there, or cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
