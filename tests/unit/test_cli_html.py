"""The report as a page: whole in itself, the same figures, and no name can break out of it."""

import dataclasses
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ksmtrace.analysis.books import balance, find_history
from ksmtrace.analysis.report import make_report
from ksmtrace.cli import main
from ksmtrace.cli.charts import Absent, Bars, Histogram, Timeline
from ksmtrace.cli.sections import SECTIONS
from ksmtrace.cli.table import wrap
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.recording.writer import RecordingWriter
from ksmtrace.stream import ProcessSeen

RECORDINGS = Path(__file__).parents[1] / "golden" / "recordings"
NAMES = sorted(path.stem for path in RECORDINGS.glob("*.ksmt"))
GUESTS = [name for name in NAMES if name.startswith("guest-")]
VOID = {"meta"}
HOSTILE = "</pre><script>x()"
MATH = r"$\frac{$&amp;"
TERMINAL = "\x1b[2J\n\u202eevil"


class Page(HTMLParser):
    """What a browser would make of it, as far as it matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.labelled: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href"):
                self.links.append(value)
            elif name.startswith("on"):
                self.handlers.append(name)
            elif name == "aria-labelledby":
                self.labelled += value.split()
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self._open.remove(tag) if tag in VOID else self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ksmtrace", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main()
        return leaving.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def page_of(run, tmp_path):
    def page_of(file, *options):
        out = tmp_path / "page.html"
        assert run(file, "--html", out, "--force", *options) == (0, "", "")
        return out.read_text()

    return page_of


def charts_of(recorded):
    content = make_report(recorded)
    return {
        section.name: list(section.charts(content)) if section.charts else []
        for section in SECTIONS
    }


@pytest.mark.parametrize("name", ["guest-7.x-moves", "losses", "crash"])
def test_a_page_is_whole_in_itself_and_says_what_the_text_says(page_of, run, monkeypatch, name):
    file = RECORDINGS / f"{name}.ksmt"
    text = page_of(file)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert page.handlers == []
    assert "default-src 'none'" in text
    # Names of XML namespaces are no addresses that anything is fetched from.
    assert set(re.findall(r"\w+://[^\"' )<]*", text)) <= {"http://www.w3.org/1999/xlink"}
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(page.labelled) <= set(page.ids)
    assert all(page.texts["title"]) and all(page.texts.get("desc", ["-"]))
    assert page.tags["svg"] == page.tags["desc"] == len(page.labelled) / 2
    monkeypatch.setenv("COLUMNS", "118")
    _, plain, _ = run(file)
    assert page.texts["pre"] == plain.rstrip("\n").split("\n\n")[1:]


def test_the_same_recording_makes_the_same_page(page_of):
    assert page_of(RECORDINGS / "pinned.ksmt") == page_of(RECORDINGS / "pinned.ksmt")


def test_what_is_absent_has_its_reason_instead_of_a_plot(page_of):
    page = Page(page_of(RECORDINGS / "crash.ksmt"))
    for reason in (
        "Not drawn: not visible on this kernel.",
        "Not drawn: no pass was seen from its begin to its end.",
        "Not drawn: nothing merged, failed, left or moved.",
        "Not drawn: there was none.",
        "Not drawn: KSM dealt with no process.",
        "Not drawn: no two processes merged into the same KSM page.",
        "Not drawn: no call of a function with programs was timed.",
    ):
        assert reason in page.texts["p"], reason
    lost = Page(page_of(RECORDINGS / "losses.ksmt", "--section", "counters"))
    assert "Not drawn: events were lost." in lost.texts["p"]
    assert lost.tags["section"] == 1


def test_the_page_of_a_part_says_so(page_of):
    page = Page(page_of(RECORDINGS / "guest-5.10-cow.ksmt", "--since", "41", "--pid", "158"))
    assert any(p.startswith("SELECTED: 41.000 s to 42.140 s, and of it") for p in page.texts["p"])


@pytest.mark.parametrize("name", NAMES)
def test_charts_show_what_the_report_counts(golden, name):
    recorded = golden(name)
    report, charts = make_report(recorded), charts_of(recorded)
    for section in charts.values():
        for chart in section:
            assert chart.title
            assert chart.why if isinstance(chart, Absent) else chart.describe()
    outcomes = next((c for c in charts["merges"] if isinstance(c, Bars)), None)
    if outcomes:
        assert sum(outcomes.series[0].values) == report["merges"]["attempts"]
    rates = next((c for c in charts["merges"] if isinstance(c, Timeline)), None)
    drawn = {
        panel.title: sum(panel.series[0].values) * rates.span_s
        for panel in (rates.panels if rates else ())
    }
    assert drawn.get("merged per second", 0) == pytest.approx(report["merges"]["succeeded"])
    histograms = {c.title: c for c in charts["calls"] if isinstance(c, Histogram)}
    for function, call in (report["calls"] or {}).items():
        if call["duration"]:
            slots = histograms[f"{function}: from entry to exit"].slots
            longest = next(below for _, below, _ in reversed(slots))
            assert sum(count for *_, count in slots) == sum(call["results"].values())
            assert longest // 2 <= call["duration"]["max_ns"] < longest
    passes = [c for c in charts["scans"] if isinstance(c, Bars)]
    if passes:
        whole = [p for p in report["scans"]["passes"] if p["duration_ns"] is not None]
        assert passes[1].series[0].values == [p["merged"] for p in whole]
    pages = report["outcomes"]["pages"]
    bars = [c for c in charts["outcomes"] if isinstance(c, Bars) and c.unit == "pages"]
    for chart in bars:  # in all, and by process
        drawn = sum(sum(series.values) for series in chart.series)
        assert drawn == sum(pages["total"].values())
    assert len(bars) == (2 if pages and pages["total"] else 0)
    failed = [c for c in charts["outcomes"] if isinstance(c, Bars) and c.unit == "failures"]
    causes = report["outcomes"]["causes"]
    assert [sum(sum(series.values) for series in c.series) for c in failed] == (
        [sum(row["failures"] for row in causes)] if causes else []
    )
    copies = next((c for c in charts["costs"] if isinstance(c, Bars)), None)
    written = sum(row["copies"] for row in (report["cow"] or {"by_process": []})["by_process"])
    assert (sum(sum(s.values) for s in copies.series) if copies else 0) == written


@pytest.mark.parametrize("name", [*GUESTS, "cow", "lifetime"])
def test_the_history_is_what_the_books_say_up_to_each_sample(golden, name):
    recorded = golden(name)
    history = find_history(recorded)
    assert {"pages_shared", "pages_sharing", "full_scans"} <= history.events_say.keys()
    assert "pages_to_scan" not in history.values
    for end in range(1, len(recorded.samples)):
        books = {
            e.counter: e for e in balance(replace(recorded, samples=recorded.samples[: end + 1]))
        }
        for counter, say in history.events_say.items():
            assert say[end] - say[0] == books[counter].events_say
            assert history.values[counter][end] == books[counter].last


def test_what_became_of_pages_is_drawn_pass_by_pass(golden):
    recorded = golden("guest-6.12-visits")
    (line,) = [c for c in charts_of(recorded)["outcomes"] if isinstance(c, Timeline)]
    drawn = {panel.title.partition(",")[0]: panel.series[0].values for panel in line.panels}
    assert len(line.times_s) == len(make_report(recorded)["outcomes"]["pages"]["passes"])
    assert drawn["first visit"][:2] == [101, 0]
    assert drawn["in place"][:4] == [0, 0, 22, 22]
    assert sum(drawn["skipped"]) == 120


def test_a_history_without_all_events_has_only_the_counters(golden):
    history = find_history(golden("losses"))
    assert history.events_say == {} and len(history.values["pages_sharing"]) == 2


@pytest.fixture
def hostile(tmp_path):
    """A recording of processes that call themselves what a page or a terminal would obey."""
    reader = RecordingReader(RECORDINGS / "duplicates.ksmt")
    names = {"ksm-dup-0": HOSTILE, "ksm-dup-1": MATH, "ksm-dup-2": TERMINAL}
    header = replace(reader.header, command_line=["record", HOSTILE, TERMINAL])
    file = tmp_path / "hostile.ksmt"
    with RecordingWriter(file, header) as writer:
        for item in reader:
            if isinstance(item, ProcessSeen) and item.comm in names:
                comm = names[item.comm]
                guest = HOSTILE if comm == MATH else None
                item = dataclasses.replace(item, comm=comm, cgroup=f"/{comm}", guest=guest)
            writer.write(item)
    return file


def test_a_name_cannot_break_out_of_the_page(page_of, hostile):
    text = page_of(hostile, "--all")
    page = Page(text)
    assert "script" not in page.tags and page.handlers == []
    assert "<script" not in text
    labels = page.texts["text"]
    assert any(label.startswith(HOSTILE) for label in labels)
    assert any(label.startswith(f"guest {HOSTILE}") for label in labels)
    assert any(label.startswith(r"\x1b[2J\n\u202eevil") for label in labels)
    assert any(f"/{MATH}" in pre for pre in page.texts["pre"])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_a_name_is_no_order_to_the_terminal(run, hostile):
    _, text, _ = run(hostile, "--all")
    assert r"\x1b[2J\n\u202eevil" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_wrapped_text_is_no_order_to_the_terminal_either():
    assert wrap(TERMINAL, "- ", "  ") == [r"- \x1b[2J\n\u202eevil"]


def test_a_page_is_its_owners_and_overwrites_nothing_unasked(run, tmp_path):
    out = tmp_path / "page.html"
    file = RECORDINGS / "crash.ksmt"
    assert run(file, "--html", out)[0] == 0
    assert out.stat().st_mode & 0o777 == 0o600
    written = out.read_bytes()
    out.write_text("mine")
    out.chmod(0o644)
    status, text, told = run(file, "--html", out)
    assert (status, text, out.read_text()) == (2, "", "mine")
    assert (
        told == f"ksmtrace: {out} exists\nHINT: choose another name, or overwrite it with --force\n"
    )
    assert run(file, "--html", out, "--force")[0] == 0
    assert (out.read_bytes(), out.stat().st_mode & 0o777) == (written, 0o600)


def test_a_page_is_never_written_over_its_recording(run, tmp_path):
    file = tmp_path / "crash.ksmt"
    file.write_bytes((RECORDINGS / "crash.ksmt").read_bytes())
    (tmp_path / "link").hardlink_to(file)
    for out in (file, tmp_path / "link"):
        status, text, told = run(file, "--html", out, "--force")
        assert (status, text) == (2, "") and "is the recording itself" in told
    assert file.read_bytes() == (RECORDINGS / "crash.ksmt").read_bytes()


def test_where_no_page_can_be_is_an_error_in_one_line(run, tmp_path):
    file = RECORDINGS / "crash.ksmt"
    for out, status in ((tmp_path / "no" / "page", 2), (tmp_path, 2), ("/dev/full", 2)):
        assert run(file, "--html", out, "--force")[0] == status
    status, text, told = run(file, "--html", tmp_path / "page", "--json")
    assert (status, text) == (2, "") and "--html and --json" in told
    assert not (tmp_path / "page").exists()
