"""The programs that the plan makes for other kernels, through this kernel's compiler and verifier.

Nothing is attached. The verifier takes a program on a function's entry or exit as one on a raw
tracepoint just as well: its context is an array of words, too.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from ksmtrace.capture.bcc_backend import Programs
from ksmtrace.capture.hooks import FENTRY, KPROBE, TRACEPOINT, WATCHPOINT
from ksmtrace.capture.plan import make_plan
from ksmtrace.capture.sites import Frame, Location, Recipe, Site
from ksmtrace.kernel.facts import read_facts
from ksmtrace.kernel.loading import KINDS as LOADING_KINDS
from ksmtrace.kernel.probes import LoadProbe

pytestmark = pytest.mark.live

TREES = Path(__file__).parents[1] / "golden/trees"
PROGRAM_TYPE_RAW_TRACEPOINT = 17
PROGRAM_TYPES = {"kprobe": 2, "kretprobe": 2, WATCHPOINT: 7}


def site(function: str, **arguments: Location) -> Site:
    frames = (Frame(function, 1), Frame("ksm_scan_thread", 2))
    return Site(function, "ksm_scan_thread", 8, arguments, {}, frames)


RECIPE = Recipe(
    "00" * 20,
    "6.1",
    "#1",
    (
        site("cmp_and_merge_page", rmap_item=Location("sp", 24, in_memory=True)),
        site("stable_tree_search", folio=Location("r12", -8)),
    ),
    (),
)


@pytest.fixture
def unattached(monkeypatch):
    bcc = pytest.importorskip("bcc")
    monkeypatch.setattr(bcc.BPF, "_trace_autoload", lambda bpf: None)
    monkeypatch.setattr(Programs, "_attach", lambda programs, attachment: None)
    monkeypatch.setattr(Programs, "_detach", lambda programs, attachment: None)


@pytest.mark.parametrize("rung", [FENTRY, KPROBE])
@pytest.mark.parametrize(("recipe", "every_page"), [(None, False), (RECIPE, True), (None, True)])
@pytest.mark.parametrize("tree", ["5.10", "6.1", "6.12", "6.18h"])
def test_every_program_of_every_plan_passes_the_verifier(
    unattached, tree, recipe, every_page, rung
):
    works = dict.fromkeys(LOADING_KINDS, LoadProbe(True, "as if"))
    facts = replace(read_facts(TREES / tree), loading=works, bcc_installed=True)
    left_out = () if rung == FENTRY else (FENTRY, TRACEPOINT)
    plan = make_plan(facts, recipe, every_page, left_out)
    assert {made.how for made in plan.attachments} >= (
        {"fentry", "fexit"} if rung == FENTRY else {"kprobe", "kretprobe"}
    )

    is_watched = WATCHPOINT in {made.how for made in plan.attachments}
    assert is_watched is (every_page and not recipe and tree in ("6.1", "6.12"))

    programs = Programs(plan.attachments, plan.defines, 4096)
    try:
        for made in plan.attachments:
            name = programs._prefixes.get(made.how, "") + made.program
            kind = PROGRAM_TYPES.get(made.how, PROGRAM_TYPE_RAW_TRACEPOINT)
            programs._bpf.load_func(name.encode(), kind)
    finally:
        programs.close()
