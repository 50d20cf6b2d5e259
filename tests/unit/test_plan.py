import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ksmtrace.capture import plan as planning
from ksmtrace.capture.hooks import (
    ABSENT,
    DERIVED,
    FENTRY,
    FUNCTION_BY_BODY,
    HOOKS,
    KPROBE,
    SITE,
    TRACEPOINT,
    WATCHPOINT,
)
from ksmtrace.capture.plan import make_plan
from ksmtrace.capture.sites import Frame, Location, Recipe, Site, shipped_recipes
from ksmtrace.capture.unseen import GAPS
from ksmtrace.events import KIND_BY_NAME, KINDS
from ksmtrace.kernel.facts import FUNCTIONS, OFFSETS, Facts, Tracepoint, read_facts
from ksmtrace.kernel.kallsyms import KSM_OBJECTS, MEMORY_OBJECTS
from ksmtrace.kernel.loading import KINDS as LOADING_KINDS
from ksmtrace.kernel.probes import KpfProbe, LoadProbe

TREES = Path(__file__).parents[1] / "golden/trees"
WORKS = LoadProbe(True, "loaded, and attached")
REFUSED = LoadProbe(False, "loading a program: EPERM")


WITH_TRACEPOINT = [kind.name for kind in KINDS if kind.has_tracepoint]
OF_OTHERS = [name for name, hooks in HOOKS.items() if hooks and hooks[0].rung == TRACEPOINT]
"""Kinds that come from tracepoints of other groups."""
OF_FUNCTIONS = [
    kind.name for kind in KINDS if not kind.has_tracepoint and kind.name not in OF_OTHERS
]
INLINED = ("cmp_and_merge_page", "stable_tree_search")
WATCHED = ("cmp_and_merge_page", "should_skip_rmap_item")
ASKED = (
    "`record --every-page` sees it by a hardware watchpoint, which makes ksmd take about five "
    "times as long per page; "
)


def all_well(facts: Facts) -> Facts:
    """As if everything had been tried and worked, and every variable had an address."""
    assert facts.symbols is not None
    addresses = {name: (0x1000 + n,) for n, name in enumerate(facts.symbols.addresses)}
    return replace(
        facts,
        bcc_installed=True,
        loading=dict.fromkeys(LOADING_KINDS, WORKS),
        kpf_ksm=KpfProbe(True, "tried"),
        symbols=replace(facts.symbols, addresses=addresses, hidden=False, objects_listed=True),
        unknown={},
    )


@pytest.fixture(scope="module")
def capable() -> Facts:
    """A kernel where all is well; every test takes one thing away."""
    return all_well(read_facts(TREES / "6.18h"))


@pytest.fixture(scope="module")
def bare(capable) -> Facts:
    """The same without tracepoints of KSM, as before 6.4."""
    others = {n: t for n, t in capable.tracepoints.items() if not n.startswith("ksm_")}
    return replace(capable, tracepoints=others)


def refusing(facts: Facts, *kinds: str) -> Facts:
    return replace(facts, loading={**(facts.loading or {}), **dict.fromkeys(kinds, REFUSED)})


def site(function: str, offset: int = 0x67B, **arguments: Location) -> Site:
    frames = (Frame(function, 1), Frame("ksm_scan_thread", 2))
    return Site(function, "ksm_scan_thread", offset, arguments, {}, frames)


def recipe(*sites: Site) -> Recipe:
    return Recipe("00" * 20, "6.18", "#1", sites, ())


CMP = site("cmp_and_merge_page", page=Location("bx"), rmap_item=Location("sp", 24, in_memory=True))
SEARCH = site("stable_tree_search", 0x788, folio=Location("r12", -8))


def without(facts: Facts, field: str, key: str) -> Facts:
    """Set one key of a mapping among the facts to None."""
    return replace(facts, **{field: {**getattr(facts, field), key: None}})


def held(facts: Facts, **changes: object) -> Facts:
    assert facts.privileges is not None
    return replace(facts, privileges=replace(facts.privileges, **changes))


def entry(plan, event):
    (found,) = [item for item in plan.events if item.event == event]
    return found


def whats(plan) -> str:
    return "\n".join(what for what, _, _ in plan.unseen)


def rungs(plan) -> dict[str, str]:
    return {event.event: event.rung for event in plan.events}


def absent(plan) -> set[str]:
    return {event.event for event in plan.events if event.rung == ABSENT}


def attached(plan, event: str) -> list[tuple[str, str, int]]:
    """Attachments of the programs that an event's target names."""
    targets = (entry(plan, event).target or "").split(", ")
    return [
        (made.how, made.target, made.offset)
        for made in plan.attachments
        if any(
            f"{how}:{made.target}" + (f"+{made.offset:#x}" if made.offset else "") == one
            for target in targets
            for hows, _, name in [target.partition(":")]
            for how in hows.split("/")
            for one in [f"{how}:{name}"]
            if how == made.how
        )
    ]


def test_where_all_is_well_every_event_is_caught(capable):
    plan = make_plan(capable)

    assert plan.can_record
    assert plan.blockers == ()
    assert [event.event for event in plan.events] == [kind.name for kind in KINDS]
    assert absent(plan) == set()
    for event in plan.events:
        has_tracepoint = KIND_BY_NAME[event.event].has_tracepoint
        assert (event.rung == TRACEPOINT) is (has_tracepoint or event.event in OF_OTHERS)
        if has_tracepoint:
            assert event.target == f"raw_tracepoint:{event.event}"
            assert "argument" in event.reason
        assert set(event.missing_fields) <= {"rmap_item", "lock_address"} and event.reason
    assert {"KSMD_PID": 37, "RMAP_ITEM_ADDRESS": 24}.items() <= plan.defines.items()


@pytest.mark.parametrize("refused", [(), (FENTRY,)])
@pytest.mark.parametrize("tree", ["5.10", "6.1", "6.12", "6.18h"])
def test_targets_and_attachments_are_the_same_programs(tree, refused):
    plan = make_plan(refusing(all_well(read_facts(TREES / tree)), *refused), recipe(CMP, SEARCH))

    named = {made for event in plan.events for made in attached(plan, event.event)}
    assert named == {(made.how, made.target, made.offset) for made in plan.attachments}
    for event in plan.events:
        parts = [part for part in (event.target or "").split(", ") if part]
        assert len(attached(plan, event.event)) == sum(part.count("/") + 1 for part in parts)
    places = [(made.how, made.target, made.offset) for made in plan.attachments]
    assert len(set(places)) == len(places)
    made_ones = [made for made in plan.attachments if made.text]
    for made in made_ones:
        assert plan.defines[f"FUNCTION_{made.body}"] < plan.defines["NR_FUNCTIONS"]


# --- tracepoints


@pytest.mark.parametrize("name", WITH_TRACEPOINT)
def test_one_missing_tracepoint_costs_one_event_its_rung(capable, name):
    assert capable.tracepoints is not None
    rest = {key: value for key, value in capable.tracepoints.items() if key != name}
    plan = make_plan(replace(capable, tracepoints=rest))
    before = rungs(make_plan(capable))

    assert {event for event, rung in rungs(plan).items() if rung != before[event]} == {name}
    assert entry(plan, name).rung == (HOOKS[name][0].rung if HOOKS[name] else ABSENT)
    assert plan.can_record

    plan = make_plan(refusing(replace(capable, tracepoints=rest), FENTRY, KPROBE))
    lost = entry(plan, name)
    assert (lost.rung, lost.target) == (ABSENT, None)
    assert lost.reason.startswith("this kernel has no tracepoint of this name")
    assert plan.can_record
    assert name in whats(plan)


@pytest.mark.parametrize("name", WITH_TRACEPOINT)
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_tracepoint_with_other_arguments_is_refused_and_not_misread(capable, name, difference):
    count = len(KIND_BY_NAME[name].fields) + difference
    changed = {**(capable.tracepoints or {}), name: Tracepoint(count, "btf")}
    plan = make_plan(refusing(replace(capable, tracepoints=changed), FENTRY, KPROBE))

    lost = entry(plan, name)
    assert (lost.rung, lost.target) == (ABSENT, None)
    assert f"has {count} arguments here" in lost.reason


def test_no_ksm_tracepoint_and_no_function_blocks(bare):
    assert make_plan(bare).can_record
    plan = make_plan(refusing(bare, FENTRY, KPROBE))

    assert not plan.can_record
    ((what, remedy),) = plan.blockers
    assert "no event can be caught" in what
    assert "CONFIG_KSM" in remedy


def test_tracepoints_unknown_is_not_tracepoints_absent(capable):
    facts = replace(capable, tracepoints=None, unknown={"tracepoints": "nothing was readable"})
    plan = make_plan(refusing(facts, FENTRY, KPROBE))

    assert not plan.can_record
    for name in WITH_TRACEPOINT:
        assert entry(plan, name).rung == ABSENT
        assert "unknown whether" in entry(plan, name).reason
        assert "nothing was readable" in entry(plan, name).reason
    assert {event.rung for event in make_plan(facts).events} >= {FENTRY, DERIVED}


@pytest.mark.parametrize(
    ("member", "fields"),
    [
        ("ksm_rmap_item.address", {"address"}),
        ("mm_struct.owner", {"pid"}),
        ("task_struct.tgid", {"pid", "holder_pid"}),
        ("mutex.owner", {"holder_pid"}),
        ("mm_struct.ksm_merging_pages", {"ksm_merging_pages", "ksm_rmap_items"}),
        ("mm_struct.ksm_rmap_items", {"ksm_merging_pages", "ksm_rmap_items"}),
        ("mm_struct.ksm_zero_pages", {"ksm_zero_pages"}),
        ("task_struct.se.sum_exec_runtime", {"ksmd_cpu_ns", "ksmd_run_delay_ns"}),
        ("task_struct.sched_info.run_delay", {"ksmd_cpu_ns", "ksmd_run_delay_ns"}),
    ],
)
def test_one_missing_member_costs_the_fields_read_with_it(capable, member, fields):
    plan = make_plan(without(capable, "offsets", member))

    (define,) = [d for d, m in planning.OFFSET_DEFINES.items() if m == member]
    assert define not in plan.defines
    lost = {
        name
        for name in OF_FUNCTIONS
        if (hooks := visible(name)) and all(define in needs(hook) for hook in hooks)
    }
    assert absent(plan) == dependent(lost)
    assert all(member in entry(plan, name).reason for name in lost)
    for event in plan.events:
        if event.rung == ABSENT:
            continue
        lost = fields & set(KIND_BY_NAME[event.event].in_place)
        usual = entry(make_plan(capable), event.event).missing_fields
        assert set(event.missing_fields) == lost | set(usual)
        assert all(member in event.missing_fields[field] for field in lost)
    assert plan.can_record
    assert all(f"{field} of " in whats(plan) for field in fields)


def test_without_btf_events_lack_every_field_read_from_memory(capable):
    facts = replace(capable, btf=False, offsets=None, functions=None, unknown={"offsets": "no BTF"})
    plan = make_plan(facts)

    assert plan.can_record
    assert not set(plan.defines) & set(planning.OFFSET_DEFINES)
    assert absent(plan) == set(OF_FUNCTIONS)
    for event in (entry(plan, name) for name in WITH_TRACEPOINT):
        in_place = set(KIND_BY_NAME[event.event].in_place) - {"comm"}
        assert set(event.missing_fields) == in_place
        assert all("no BTF" in reason for reason in event.missing_fields.values())


def test_without_a_visible_ksmd_its_context_is_unseen(capable):
    plan = make_plan(replace(capable, ksmd_pid=None))

    assert "KSMD_PID" not in plan.defines
    assert plan.can_record
    assert "whether an event happened in ksmd" in whats(plan)


def test_without_ksm_nothing_can_be_recorded(capable):
    plan = make_plan(replace(capable, ksm=None, unknown={"ksm": "built without KSM"}))

    assert not plan.can_record
    assert plan.blockers == (("built without KSM", "boot a kernel with CONFIG_KSM=y"),)


def test_without_privileges_the_plan_stands_and_recording_does_not(capable):
    plan = make_plan(held(replace(capable, loading=None), capabilities=(), euid=1000))

    assert not plan.can_record
    ((what, remedy),) = plan.blockers
    assert "may not load" in what
    assert "root" in remedy
    assert rungs(plan) == rungs(make_plan(capable))


def test_unknown_privileges_block(capable):
    assert not make_plan(replace(capable, privileges=None)).can_record


def test_lockdown_blocks_only_where_it_forbids_reading(capable):
    assert make_plan(held(capable, lockdown="none")).can_record
    assert make_plan(held(capable, lockdown="integrity")).can_record
    plan = make_plan(held(capable, lockdown="confidentiality"))
    assert not plan.can_record
    assert ["lockdown" in what for what, _ in plan.blockers] == [True]


def test_programs_that_may_not_read_memory_catch_nothing(capable):
    plan = make_plan(refusing(capable, "kernel_read"))

    assert not plan.can_record
    assert absent(plan) == {kind.name for kind in KINDS}
    assert all("EPERM" in event.reason for event in plan.events)
    ((what, _),) = plan.blockers
    assert "EPERM" in what
    assert (plan.attachments, plan.counted) == ((), ())


def test_without_raw_tracepoints_functions_are_left(capable):
    plan = make_plan(refusing(capable, "raw_tracepoint"))

    assert plan.can_record
    assert absent(plan) == {"ksm_stop_scan", "ksm_advisor", "lock_hold", "get_ksm_page"}
    assert {made.how for made in plan.attachments} == {"fentry", "fexit"}
    assert "EPERM" in entry(plan, "ksm_stop_scan").reason

    plan = make_plan(refusing(capable, "raw_tracepoint", FENTRY, KPROBE))
    assert absent(plan) == {kind.name for kind in KINDS}
    ((what, _),) = plan.blockers
    assert "EPERM" in what


# --- functions


def needs(hook) -> set[str]:
    """Return the defines that a hook cannot do without."""
    return set(hook.defines).union(*(FUNCTION_BY_BODY[body].defines for body in hook.functions))


def visible(event: str) -> list:
    """Return the hooks that need neither a recipe nor a function that compilers inline."""
    return [
        hook
        for hook in HOOKS[event]
        if (hook.functions or hook.rung == TRACEPOINT)
        and not {*hook.functions, *hook.sites} & set(INLINED)
    ]


def dependent(events: set[str]) -> set[str]:
    """Add the events that build on one of these, whatever their hook: but no watchpoint is asked
    for."""
    return events | {
        name
        for name, hooks in HOOKS.items()
        if hooks and all(set(hook.kinds) & events for hook in hooks if not hook.watches)
    }


@pytest.mark.parametrize(
    ("refused", "how"),
    [
        ((), {"fentry", "fexit"}),
        ((KPROBE,), {"fentry", "fexit"}),
        ((FENTRY,), {"kprobe", "kretprobe"}),
    ],
)
def test_functions_are_reached_by_fentry_else_by_kprobe(bare, refused, how):
    plan = make_plan(refusing(bare, *refused))

    assert {made.how for made in plan.attachments} == {*how, "raw_tracepoint"}
    assert absent(plan) == {"ksm_advisor"}
    for kind in KINDS:
        hooks = HOOKS[kind.name]
        if hooks and hooks[0].rung == FENTRY and kind.name not in INLINED:
            wanted = KPROBE if FENTRY in refused else FENTRY
            assert entry(plan, kind.name).rung == wanted, kind.name


def test_with_neither_both_reasons_are_given_and_once(bare):
    facts = replace(bare, loading={"fentry": REFUSED, "kprobe": LoadProbe(False, "no kprobes")})
    plan = make_plan(facts)

    assert absent(plan) == {kind.name for kind in KINDS} - set(OF_OTHERS)
    wanted = (
        "fentry programs do not work here: loading a program: EPERM; "
        "kprobe programs do not work here: no kprobes"
    )
    for name in OF_FUNCTIONS:
        assert entry(plan, name).reason == (ASKED if name in WATCHED else "") + wanted
    assert [why for _, why, _ in plan.unseen].count(wanted) == 1
    assert not any(made.text for made in plan.attachments)
    assert all(name.startswith(("wait_ns.", "hold_ns.")) for name in plan.counted)


@pytest.mark.parametrize("probe", [LoadProbe(None, "bpf(2) is unknown")])
def test_unknown_whether_it_works_is_not_called_refused(bare, probe):
    plan = make_plan(replace(bare, loading={**(bare.loading or {}), "fentry": probe}))

    assert entry(plan, "break_ksm").rung == KPROBE
    plan = make_plan(replace(bare, loading={"fentry": probe, "kprobe": REFUSED}))
    assert "whether fentry programs work here is unknown: bpf(2)" in entry(plan, "break_ksm").reason


def test_kprobes_read_registers_of_x86_only(bare):
    elsewhere = replace(bare, kernel=replace(bare.kernel, machine="aarch64"))

    assert entry(make_plan(elsewhere), "break_ksm").rung == FENTRY
    plan = make_plan(refusing(elsewhere, FENTRY), recipe(CMP, SEARCH))
    assert absent(plan) == {kind.name for kind in KINDS} - set(OF_OTHERS)
    assert "not aarch64's" in entry(plan, "break_ksm").reason


ALL_DEFINES = sorted(
    {
        define
        for hooks in HOOKS.values()
        for hook in hooks
        if hook.functions or hook.sites
        for define in needs(hook)
    }
    - {"MM_MMAP_LOCK", "KSM_THREAD_MUTEX_ADDRESS"}  # each costs one hook of two
    - {"KSM_PAGES_SKIPPED_ADDRESS"}  # with smart scan visits need it, too: see below
)


def lacking_define(facts: Facts, define: str) -> Facts:
    if define == "KSMD_PID":
        return replace(facts, ksmd_pid=None)
    if define == "STRUCT_PAGE_BYTES":
        return replace(facts, page_struct_bytes=None)
    if define.startswith("PTE_"):
        return replace(facts, kernel=replace(facts.kernel, machine="aarch64"))
    if define in planning.OFFSET_DEFINES:
        return without(facts, "offsets", planning.OFFSET_DEFINES[define])
    assert facts.symbols is not None
    addresses = {**facts.symbols.addresses, planning.SYMBOL_DEFINES[define]: ()}
    return replace(facts, symbols=replace(facts.symbols, addresses=addresses))


@pytest.mark.parametrize("define", ALL_DEFINES)
def test_a_missing_define_costs_exactly_the_events_that_need_it(bare, define):
    plan = make_plan(lacking_define(bare, define))

    lost = {
        name
        for name in HOOKS
        if (hooks := visible(name)) and all(define in needs(hook) for hook in hooks)
    }
    assert lost
    assert absent(plan) == dependent(lost) | {"ksm_advisor"}
    assert define not in plan.defines
    for name in lost:
        assert "unknown" in entry(plan, name).reason or "has no" in entry(plan, name).reason


VISIBLE = sorted(
    {
        body
        for name, hooks in HOOKS.items()
        for hook in hooks
        for body in hook.functions
        if name not in OF_OTHERS
    }
    - set(INLINED)
)


@pytest.mark.parametrize("difference", [None, 7])
@pytest.mark.parametrize("body", VISIBLE)
def test_a_function_that_is_inlined_or_another_costs_exactly_its_events(bare, body, difference):
    function = FUNCTION_BY_BODY[body]
    changed = dict.fromkeys(function.names, difference)
    plan = make_plan(replace(bare, functions={**(bare.functions or {}), **changed}))

    lost = {
        name
        for name in HOOKS
        if (hooks := visible(name)) and all(body in hook.functions for hook in hooks)
    }
    assert lost
    assert absent(plan) == dependent(lost) | {"ksm_advisor"}
    assert not any(made.body == body for made in plan.attachments)
    for name in lost:
        if any(set(hook.kinds) & lost for hook in HOOKS[name]):
            assert "it builds on" in entry(plan, name).reason
            continue
        assert ("is inlined here" if difference is None else "has 7 arguments here") in entry(
            plan, name
        ).reason


@pytest.mark.parametrize("count", FUNCTION_BY_BODY["break_ksm"].arguments)
def test_the_programs_are_told_the_number_of_arguments(capable, count):
    functions = {**(capable.functions or {}), "break_ksm": count}
    plan = make_plan(replace(capable, functions=functions))

    assert plan.defines["NARGS_break_ksm"] == count
    (left,) = [made for made in plan.attachments if (made.how, made.body) == ("fexit", "break_ksm")]
    assert left.text.startswith(f"FEXIT(break_ksm, break_ksm, {count}, take_call(")


def test_a_function_is_found_by_any_of_its_names(bare):
    old = {**(bare.functions or {}), "folio_migrate_ksm": None, "ksm_migrate_page": 2}
    plan = make_plan(replace(bare, functions=old))

    assert entry(plan, "ksm_migrate_page").target == "fentry/fexit:ksm_migrate_page"
    assert entry(make_plan(bare), "ksm_migrate_page").target == "fentry/fexit:folio_migrate_ksm"


@pytest.mark.parametrize("lacking", ["vmemmap_base", "struct page"])
def test_without_a_way_from_page_to_frame_only_the_pfn_is_missing(bare, lacking):
    if lacking == "vmemmap_base":
        facts = lacking_define(bare, "VMEMMAP_BASE_ADDRESS")
    else:
        facts = replace(bare, page_struct_bytes=None)
    plan = make_plan(facts)

    # A write is known for one to a KSM page by the page's frame alone.
    assert rungs(plan) == rungs(make_plan(bare)) | {"do_wp_page": ABSENT}
    for event in plan.events:
        if event.event == "do_wp_page":
            continue
        usual = set(entry(make_plan(bare), event.event).missing_fields)
        page_fields = set().union(*(hook.page_fields for hook in HOOKS[event.event]))
        assert set(event.missing_fields) - usual == page_fields
        assert all(lacking in event.missing_fields[field] for field in page_fields)


# --- inlined sites, and what is derived without them


def test_a_recipe_makes_sites(capable):
    plan = make_plan(capable, recipe(CMP, SEARCH))

    assert (rungs(plan)["cmp_and_merge_page"], rungs(plan)["stable_tree_search"]) == (SITE, SITE)
    assert entry(plan, "cmp_and_merge_page").target == "kprobe:ksm_scan_thread+0x67b"
    assert entry(plan, "stable_tree_search").target.startswith("kprobe:ksm_scan_thread+0x788, ")
    found = {made.program: made for made in plan.attachments if made.how == "kprobe"}
    assert set(found) == {"site_cmp_and_merge_page", "site_stable_tree_search"}
    assert found["site_cmp_and_merge_page"].text == (
        "SITE(cmp_and_merge_page, ctx->bx + (0), read_u64(ctx->sp + (24)))"
    )
    assert found["site_stable_tree_search"].text == "SITE(stable_tree_search, ctx->r12 + (-8), 0)"
    assert not {"VISITS_DERIVED", "SEARCHES_DERIVED"} & set(plan.defines)


@pytest.mark.parametrize(
    ("sites", "event", "why"),
    [
        ([SEARCH], "cmp_and_merge_page", "0 sites of cmp_and_merge_page"),
        ([CMP], "stable_tree_search", "0 sites of stable_tree_search"),
        (
            [CMP, site("cmp_and_merge_page", 0x900, rmap_item=Location("bx")), SEARCH],
            "cmp_and_merge_page",
            "2 sites of cmp_and_merge_page",
        ),
        (
            [site("cmp_and_merge_page", page=Location("bx")), SEARCH],
            "cmp_and_merge_page",
            "does not know cmp_and_merge_page's rmap_item",
        ),
    ],
)
def test_a_recipe_that_does_not_suffice_leaves_what_is_derived(capable, sites, event, why):
    plan = make_plan(capable, recipe(*sites))

    assert rungs(plan)[event] == DERIVED
    (other,) = set(INLINED) - {event}
    assert rungs(plan)[other] == SITE
    plan = make_plan(capable, recipe(*sites), without=[DERIVED])
    assert why in entry(plan, event).reason


@pytest.mark.parametrize("release", ["5.10", "6.1", "6.12", "7.2", "7.3"])
def test_shipped_recipes_suffice(capable, release):
    (found, *_) = [one for one in shipped_recipes() if one.release.startswith(release)]
    plan = make_plan(capable, found)

    assert {rungs(plan)[event] for event in INLINED} == {SITE}


# --- watchpoints


@pytest.fixture(scope="module")
def hardened(capable) -> Facts:
    """The same where no program can be put on functions."""
    return refusing(capable, FENTRY, KPROBE)


def test_where_every_page_is_asked_for_a_watchpoint_sees_them(hardened):
    plan = make_plan(hardened, every_page=True)

    before = rungs(make_plan(hardened))
    assert rungs(plan) == before | dict.fromkeys(WATCHED, WATCHPOINT)
    assert {before[name] for name in WATCHED} == {ABSENT}
    (made,) = [made for made in plan.attachments if made.how == WATCHPOINT]
    assert (made.target, made.body) == ("ksm_scan.rmap_list", "cmp_and_merge_page")
    # struct ksm_scan (mm/ksm.c): mm_slot, address, rmap_list.
    assert made.address == plan.defines["KSM_SCAN_ADDRESS"] + 16
    assert set(entry(plan, WATCHED[0]).missing_fields) == {"pfn"}
    assert entry(plan, WATCHED[1]).missing_fields == {}
    assert {"cmp_and_merge_page", "smart_scan_skips"} < set(plan.counted)
    assert not {"VISITS_DERIVED", "SEARCHES_DERIVED"} & set(plan.defines)


def test_where_every_page_is_not_asked_for_the_reason_says_what_that_would_cost(hardened):
    plan = make_plan(hardened)

    assert not any(made.how == WATCHPOINT for made in plan.attachments)
    for name in WATCHED:
        assert entry(plan, name).reason.startswith(ASKED)
    (change,) = [change for what, _, change in plan.unseen if "cmp_and_merge_page," in what]
    assert change.startswith("`record --every-page`")


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (lambda facts: refusing(facts, WATCHPOINT), "watchpoint programs do not work here"),
        (lambda facts: lacking_define(facts, "KSM_SCAN_ADDRESS"), "the address of ksm_scan"),
        (lambda facts: lacking_define(facts, "MM_SLOT_RMAP_LIST"), "no ksm_mm_slot.rmap_list"),
        (lambda facts: lacking_define(facts, "KSMD_PID"), "ksmd's pid is unknown"),
        (
            lambda facts: lacking_define(facts, "RMAP_ITEM_REMAINING_SKIPS"),
            "skips cannot be told from others: this kernel has no ksm_rmap_item.remaining_skips",
        ),
        (lambda facts: lacking_define(facts, "PTE_PRESENT"), "know only x86_64"),
        (lambda facts: without(facts, "tracepoints", "sched_switch"), "no tracepoint sched_switch"),
    ],
)
def test_what_a_watchpoint_takes(hardened, lose, why):
    plan = make_plan(lose(hardened), every_page=True)

    assert set(WATCHED) <= absent(plan)
    assert why in entry(plan, "cmp_and_merge_page").reason
    assert not any(made.how == WATCHPOINT for made in plan.attachments)


def test_a_watchpoint_comes_before_what_is_derived_and_behind_a_site(capable):
    plan = make_plan(capable, every_page=True)
    assert {rungs(plan)[name] for name in WATCHED} == {WATCHPOINT}
    # What the function for the page's table entry found is the page.
    assert entry(plan, "cmp_and_merge_page").missing_fields == {}
    assert {rungs(plan)[name] for name in ("stable_tree_search", "page_outcomes")} == {DERIVED}
    plan = make_plan(capable, recipe(CMP, SEARCH), every_page=True)
    assert (rungs(plan)[WATCHED[0]], rungs(plan)[WATCHED[1]]) == (SITE, DERIVED)
    plan = make_plan(capable, every_page=True, without=[WATCHPOINT])
    assert {rungs(plan)[name] for name in WATCHED} == {DERIVED}


def test_a_visible_function_comes_before_its_sites(capable):
    functions = {**(capable.functions or {}), "cmp_and_merge_page": 2, "stable_tree_search": 1}
    plan = make_plan(replace(capable, functions=functions), recipe(CMP, SEARCH))

    assert {rungs(plan)[event] for event in INLINED} == {FENTRY}
    assert not any(made.offset for made in plan.attachments)


def test_with_smart_scan_derived_visits_need_the_count_of_skips(capable):
    assert "smart_scan_skips" in make_plan(capable).counted
    plan = make_plan(lacking_define(capable, "KSM_PAGES_SKIPPED_ADDRESS"))
    assert absent(plan) == {*INLINED, "page_outcomes", "should_skip_rmap_item"}
    assert "ksm_pages_skipped" in entry(plan, "cmp_and_merge_page").reason
    assert "cmp_and_merge_page, which is absent" in entry(plan, "stable_tree_search").reason
    # Of what is per page: a 0 would claim that there was none.
    left = {"cow_ns", "break_ksm_ns", "get_ksm_page_ns"}
    assert {name for name in plan.counted if "." not in name} == left
    assert "VISITS_DERIVED" not in plan.defines

    older = without(lacking_define(capable, "KSM_PAGES_SKIPPED_ADDRESS"), "ksm", "smart_scan")
    plan = make_plan(older)
    assert rungs(plan)["cmp_and_merge_page"] == DERIVED
    assert "smart_scan_skips" not in plan.counted


def test_skips_are_counted_where_what_becomes_of_pages_is(capable):
    assert "smart_scan_skips" in make_plan(capable, recipe(CMP, SEARCH)).counted
    inlined = without(capable, "functions", "run_store")
    plan = make_plan(inlined, recipe(CMP, SEARCH))
    assert entry(plan, "page_outcomes").rung == ABSENT
    assert "smart_scan_skips" not in plan.counted
    assert entry(plan, "cmp_and_merge_page").rung == SITE


@pytest.mark.parametrize(
    ("page", "extra"), [({"page": Location("bx")}, set()), ({}, {"ksm_next_page_pmd_entry"})]
)
def test_every_page_streams_and_finds_the_page_elsewhere_where_the_recipe_does_not_know(
    capable, page, extra
):
    known = recipe(site("cmp_and_merge_page", rmap_item=Location("r14"), **page), SEARCH)
    counting, streaming = make_plan(capable, known), make_plan(capable, known, every_page=True)

    assert "EVERY_PAGE" not in counting.defines
    assert streaming.defines["EVERY_PAGE"] == 1
    more = {made.body for made in streaming.attachments} - {
        made.body for made in counting.attachments
    }
    assert more == extra
    assert entry(streaming, "cmp_and_merge_page").missing_fields == {}

    if extra:
        blind = replace(capable, ksmd_pid=None)
        plan = make_plan(blind, known, every_page=True)
        assert "ksmd" in entry(plan, "cmp_and_merge_page").missing_fields["pfn"]


# --- rungs left out on request


@pytest.mark.parametrize(
    ("left_out", "event", "rung"),
    [
        ([], "ksm_enter", TRACEPOINT),
        ([TRACEPOINT], "ksm_enter", FENTRY),
        ([TRACEPOINT, FENTRY], "ksm_enter", KPROBE),
        ([TRACEPOINT], "ksm_start_scan", DERIVED),
        ([TRACEPOINT, DERIVED], "ksm_start_scan", ABSENT),
        ([FENTRY], "break_ksm", KPROBE),
        ([FENTRY, KPROBE], "break_ksm", ABSENT),
        ([], "stable_tree_search", SITE),
        ([SITE], "stable_tree_search", DERIVED),
        ([KPROBE], "stable_tree_search", DERIVED),
        ([SITE, DERIVED], "stable_tree_search", ABSENT),
    ],
)
def test_a_rung_left_out_is_as_if_it_were_not_there(capable, left_out, event, rung):
    plan = make_plan(capable, recipe(CMP, SEARCH), without=left_out)

    assert rungs(plan)[event] == rung
    assert not set(rungs(plan).values()) & set(left_out)
    if rung == ABSENT:
        assert "left out on request" in entry(plan, event).reason


# --- whole kernels

_BEFORE_TRACEPOINTS = {
    **dict.fromkeys(["ksm_start_scan", "ksm_stop_scan"], DERIVED),
    **dict.fromkeys(["ksm_enter", "ksm_exit"], FENTRY),
    **dict.fromkeys(["ksm_merge_one_page", "ksm_remove_rmap_item"], DERIVED),
    **dict.fromkeys(["ksm_merge_with_ksm_page", "ksm_remove_ksm_page"], FENTRY),
    "ksm_advisor": ABSENT,
}
_BEFORE_SMART_SCAN = {"should_skip_rmap_item": ABSENT}
_LOCKS = dict.fromkeys(OF_OTHERS, TRACEPOINT)
_FUNCTIONS = {
    **dict.fromkeys(OF_FUNCTIONS, FENTRY),
    **dict.fromkeys(INLINED, DERIVED),
    **dict.fromkeys(
        [
            *("stable_tree_insert", "free_stable_node_chain", "remove_migration_ptes"),
            *("page_outcomes", "should_skip_rmap_item"),
        ],
        DERIVED,
    ),
}


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        (
            "5.10",
            _BEFORE_TRACEPOINTS
            | _FUNCTIONS
            | _BEFORE_SMART_SCAN
            | {"lock_wait": DERIVED, "lock_hold": ABSENT},
        ),
        ("6.1", _BEFORE_TRACEPOINTS | _FUNCTIONS | _BEFORE_SMART_SCAN | _LOCKS),
        ("6.12", dict.fromkeys(WITH_TRACEPOINT, TRACEPOINT) | _FUNCTIONS | _LOCKS),
    ],
)
@pytest.mark.parametrize("sites", [False, True])
def test_debians_kernels(tree, wanted, sites):
    facts = replace(
        read_facts(TREES / tree),
        bcc_installed=True,
        loading=dict.fromkeys(LOADING_KINDS, WORKS),
    )
    plan = make_plan(facts, recipe(CMP, SEARCH) if sites else None)

    assert rungs(plan) == wanted | (dict.fromkeys(INLINED, SITE) if sites else {})
    assert plan.can_record
    new = {"ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages"}  # members that came later
    for event in plan.events:
        if event.event == "cmp_and_merge_page":
            assert set(event.missing_fields) == (set() if sites else {"rmap_item"})
        elif event.rung == TRACEPOINT and event.event == "lock_hold":
            assert set(event.missing_fields) == {"lock_address"}
        else:
            assert set(event.missing_fields) <= new


@pytest.mark.parametrize(
    ("taken", "what", "cure"),
    [
        (None, "rmap_item of cmp_and_merge_page", "ksmtrace sites resolve"),
        (
            "VMEMMAP_BASE_ADDRESS",
            "new_pfn of ksm_migrate_page, remove_migration_ptes",
            "CONFIG_KALLSYMS_ALL=y",
        ),
        ("MM_KSM_ZERO_PAGES", "ksm_zero_pages of ksm_exit", "CONFIG_DEBUG_INFO_BTF=y"),
    ],
)
def test_a_missing_field_has_its_cure(capable, taken, what, cure):
    plan = make_plan(lacking_define(capable, taken) if taken else capable)

    (change,) = [change for found, _, change in plan.unseen if found == what]
    assert cure in change


def test_without_bcc_nothing_can_be_recorded(capable):
    plan = make_plan(replace(capable, bcc_installed=False))

    assert not plan.can_record
    assert plan.blockers == (
        ("the Python module bcc is not installed", "apt install python3-bpfcc"),
    )


def test_every_gap_of_the_tracepoints_is_listed_with_cause_and_cure(capable):
    plan = make_plan(refusing(capable, FENTRY, KPROBE))
    unseen = {what: (why, change) for what, why, change in plan.unseen}

    for gap in GAPS:
        if "merge_failure" in gap.shown_by:  # by a tracepoint, after the fact
            assert gap.what not in unseen
            continue
        why, change = unseen[gap.what]
        assert gap.why in why
        assert f"still known: {gap.still_known}" in why
        assert change


@pytest.mark.parametrize("gap", GAPS, ids=lambda gap: gap.what)
def test_a_gap_is_closed_where_an_event_shows_it(capable, gap):
    assert set(gap.shown_by) <= {kind.name for kind in KINDS}
    assert (gap.what in whats(make_plan(capable))) is not bool(gap.shown_by)


def test_gaps_name_known_functions_and_counters(capable):
    counters = {*(capable.ksm or {}), *(capable.vmstat or {})}
    for gap in GAPS:
        assert set(gap.functions) <= set(FUNCTIONS)
        assert set(gap.counters) <= counters
        assert all(counter in gap.still_known for counter in gap.counters)


def cow(plan):
    (found,) = [item for item in plan.unseen if "(COW break)" in item[0]]
    return found


def test_a_counter_that_is_absent_is_not_called_known(capable):
    unaided = refusing(capable, FENTRY, KPROBE)
    _, why, _ = cow(make_plan(without(unaided, "vmstat", "cow_ksm")))

    assert "still known" not in why
    assert "this kernel has no cow_ksm" in why


def test_what_would_change_a_gap_depends_on_the_probes_that_work(capable):
    inlined = without(capable, "functions", "do_wp_page")
    _, _, change = cow(make_plan(inlined))
    assert "do_wp_page, which this kernel's compiler inlined" in change
    assert "fentry and kprobe work here" in change

    neither = dict.fromkeys(("fentry", "kprobe"), REFUSED)
    _, _, change = cow(make_plan(replace(capable, loading={**(capable.loading or {}), **neither})))
    assert "here neither works" in change

    _, _, change = cow(make_plan(replace(inlined, loading=None)))
    assert "not tried here" in change


def test_absent_counters_are_said_to_be_absent(capable):
    plan = make_plan(
        without(without(capable, "ksm", "general_profit"), "ksm_stat", "ksm_mergeable")
    )

    absent = [(what, why) for what, why, _ in plan.unseen if "absent, not 0" in why]
    assert [what for what, _ in absent] == [
        "/sys/kernel/mm/ksm/general_profit",
        "/proc/PID/ksm_stat ksm_mergeable",
    ]


def test_a_lying_page_flag_is_reported(capable):
    assert "kpageflags" not in whats(make_plan(capable))
    lying = make_plan(replace(capable, kpf_ksm=KpfProbe(False, "set for every page")))
    assert ("which page frames are KSM pages, from /proc/kpageflags", "set for every page") in [
        (what, why) for what, why, _ in lying.unseen
    ]
    untried = make_plan(replace(capable, kpf_ksm=None, unknown={"kpf_ksm": "not tried"}))
    assert "whether /proc/kpageflags tells the truth" in whats(untried)


def test_symbols_hidden_or_not_listed_are_reported(capable):
    assert capable.symbols is not None
    hidden = make_plan(replace(capable, symbols=replace(capable.symbols, hidden=True)))
    assert "addresses of the kernel's functions" in whats(hidden)
    unlisted = make_plan(replace(capable, symbols=replace(capable.symbols, objects_listed=False)))
    assert "variables at an event" in whats(unlisted)


def test_the_plan_as_json(capable):
    entries = make_plan(without(capable, "offsets", "mm_struct.owner")).as_json()

    assert json.loads(json.dumps(entries)) == entries
    assert {"event", "rung", "target", "reason", "missing_fields"} == set(entries[0])
    assert "pid" in entries[2]["missing_fields"]


def test_every_define_has_an_offset_to_come_from():
    assert set(planning.OFFSET_DEFINES.values()) <= set(OFFSETS)
    assert set(planning.SYMBOL_DEFINES.values()) <= {*KSM_OBJECTS, *MEMORY_OBJECTS}


# --- locks


def test_holds_of_mmap_locks_are_seen_only_by_tracepoints_that_cost_little(capable):
    assert "--every-page" in entry(make_plan(capable), "lock_hold").missing_fields["lock_address"]
    plan = make_plan(capable, every_page=True)
    assert entry(plan, "lock_hold").missing_fields == {}
    assert {"hold_ns.mmap_lock", "hold_ns.ksm_thread_mutex.worst"} <= set(plan.counted)
    assert "HOLDS_OF_MMAP_LOCK" in plan.defines

    dear = {**capable.tracepoints, "mmap_lock_released": Tracepoint(3, "btf")}
    plan = make_plan(replace(capable, tracepoints=dear), every_page=True)
    assert entry(plan, "lock_hold").target == "raw_tracepoint:sched_switch"
    assert "lock_address" in entry(plan, "lock_hold").missing_fields
    assert "hold_ns.ksm_thread_mutex" in plan.counted
    assert "hold_ns.mmap_lock" not in plan.counted
    assert not {"HOLDS_OF_MMAP_LOCK"} & set(plan.defines)
    assert not any(made.target.startswith("mmap_lock") for made in plan.attachments)


def test_without_the_slow_paths_tracepoints_waits_are_absent(capable):
    rest = {n: t for n, t in capable.tracepoints.items() if n != "contention_end"}
    bare = replace(capable, tracepoints=rest)
    plan = make_plan(bare)
    assert entry(plan, "lock_wait").rung == DERIVED
    assert "fentry/fexit:rwsem_down_write_slowpath" in entry(plan, "lock_wait").target
    assert "wait_ns.mmap_lock" in plan.counted

    plan = make_plan(refusing(bare, FENTRY, KPROBE))
    assert entry(plan, "lock_wait").rung == ABSENT
    assert "this kernel has no tracepoint contention_end" in entry(plan, "lock_wait").reason
    assert not any(name.startswith("wait_ns") for name in plan.counted)
    assert "lock_wait" in whats(plan)


def test_ksm_thread_mutex_is_known_by_its_address_or_by_who_takes_it(capable):
    plan = make_plan(capable)
    assert "KSM_THREAD_MUTEX_ADDRESS" in plan.defines

    plan = make_plan(lacking_define(capable, "KSM_THREAD_MUTEX_ADDRESS"))
    begin, end = (plan.defines[f"KSM_TEXT_{side}"] for side in ("BEGIN", "END"))
    assert begin <= capable.symbols.address("run_store") < end
    assert plan.defines["MUTEX_TEXT_BEGIN"] <= capable.symbols.address("mutex_lock")
    assert entry(plan, "lock_wait").missing_fields == {}

    hidden = replace(capable, symbols=replace(capable.symbols, addresses={}))
    plan = make_plan(hidden)
    assert "functions are unknown" in entry(plan, "lock_wait").missing_fields["lock"]


def test_facts_and_plans_do_not_change(capable):
    for thing in (capable, make_plan(capable)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.can_record = False
