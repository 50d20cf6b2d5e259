"""The workloads: what each maps and does, and exactly what KSM should make of it.

Pure arithmetic over the parameters and one kernel setting, max_page_sharing; nothing here
touches the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ksmtrace.errors import UsageError
from ksmtrace.workload.children import Layout

COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "cow_ksm",
)
"""What is expected of the whole kernel, as the change since the start: files of
/sys/kernel/mm/ksm, and cow_ksm of /proc/vmstat."""

PROCESS_COUNTERS = ("ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages")
"""What is expected of each process: lines of /proc/PID/ksm_stat."""


@dataclass(frozen=True)
class Expectation:
    """What is expected at one moment.

    Attributes:
        counters: change since the start, by name in :data:`COUNTERS`.
        processes: by process in order of appearance, values by name in
            :data:`PROCESS_COUNTERS`.
    """

    counters: Mapping[str, int]
    processes: tuple[Mapping[str, int], ...]


@dataclass(frozen=True)
class Scan:
    """Let ksmd complete this many passes, and more until the expectation is met."""

    passes: int


@dataclass(frozen=True)
class Churn:
    """The same, with every page rewritten before each pass."""

    passes: int


@dataclass(frozen=True)
class Fork:
    """Let the first process fork its heirs, while ksmd rests."""


@dataclass(frozen=True)
class Write:
    """Let the first process write to its first pages, while ksmd rests."""

    pages: int


@dataclass(frozen=True)
class Step:
    """One thing that is done, and what is expected right after it.

    Attributes:
        label: a word for it, in the output.
        action: what is done.
        expected: what is expected then.
        why: in a sentence, for the statement.
    """

    label: str
    action: Scan | Churn | Fork | Write
    expected: Expectation
    why: str


@dataclass(frozen=True)
class Plan:
    """A workload with its parameters filled in.

    Attributes:
        does: what the processes do, in sentences.
        layouts: the processes that are started.
        heirs: the processes that the first one forks, if it does.
        steps: in order; the last one's expectation is the workload's.
        knobs: what must be set for it, beyond what every workload sets.
    """

    does: str
    layouts: tuple[Layout, ...]
    steps: tuple[Step, ...]
    heirs: tuple[Layout, ...] = ()
    knobs: Mapping[str, int] = field(default_factory=dict)


Parameters = Mapping[str, int]


@dataclass(frozen=True)
class Kind:
    """One of the known workloads.

    Attributes:
        name: as on the command line.
        meaning: what it does, in a line.
        defaults: its parameters, with the primes they default to.
        plan: fills in the parameters, given max_page_sharing.
    """

    name: str
    meaning: str
    defaults: Mapping[str, int]
    plan: Callable[[Parameters, int], Plan]


@dataclass(frozen=True)
class Merged:
    """How pages that do not change end up, once ksmd has seen them twice.

    A stable node takes sharers up to max_page_sharing (mm/ksm.c:is_page_sharing_candidate); the
    next copy finds every node full, goes to the unstable tree, and makes a new node with the one
    after it. So c copies make c div M nodes, and one more of a rest of at least 2; a rest of 1
    stays in the unstable tree. That last copy is the last in ksmd's order: process by process as
    they registered (mm/ksm.c:__ksm_enter), by address within each.

    Attributes:
        nodes: stable nodes: pages_shared.
        sharing: further pages on them: pages_sharing.
        single: pages without a partner: pages_unshared.
        chains: contents that need more than one node.
        dups: the nodes of those contents.
        merging: per process, pages that hang on a stable node.
        copies: the different numbers of copies that a content has, ascending.
    """

    nodes: int
    sharing: int
    single: int
    chains: int
    dups: int
    merging: tuple[int, ...]
    copies: tuple[int, ...]


def merge(layouts: Sequence[Layout], max_page_sharing: int) -> Merged:
    """Compute how the pages of processes end up; see :class:`Merged`.

    Args:
        layouts: in the order in which the processes register.
        max_page_sharing: the knob's value.
    """
    copies: dict[int, int] = {}
    last_owner: dict[int, int] = {}
    for owner, layout in enumerate(layouts):
        for number in layout.content_numbers():
            copies[number] = copies.get(number, 0) + 1
            last_owner[number] = owner
    merging = [layout.pages for layout in layouts]
    nodes = single = chains = dups = 0
    for number, count in copies.items():
        full, rest = divmod(count, max_page_sharing)
        content_nodes = full + (rest >= 2)
        nodes += content_nodes
        if content_nodes > 1:
            chains += 1
            dups += content_nodes
        if rest == 1:
            single += 1
            merging[last_owner[number]] -= 1
    return Merged(
        nodes=nodes,
        sharing=sum(merging) - nodes,
        single=single,
        chains=chains,
        dups=dups,
        merging=tuple(merging),
        copies=tuple(sorted(set(copies.values()))),
    )


def _expect(
    merged: Merged, layouts: Sequence[Layout], **changes: int | Sequence[int]
) -> Expectation:
    # What `merged` means for every counter, with some replaced.
    counters = {
        "pages_shared": merged.nodes,
        "pages_sharing": merged.sharing,
        "pages_unshared": merged.single,
        "pages_volatile": 0,
        "ksm_zero_pages": 0,
        "stable_node_chains": merged.chains,
        "stable_node_dups": merged.dups,
        "cow_ksm": 0,
    }
    counters.update({name: n for name, n in changes.items() if isinstance(n, int)})
    merging = changes.get("merging", merged.merging)
    assert not isinstance(merging, int)
    return Expectation(
        counters,
        tuple(
            {
                "ksm_merging_pages": pages_merging,
                "ksm_rmap_items": layout.pages,
                "ksm_zero_pages": 0,
            }
            for layout, pages_merging in zip(layouts, merging, strict=True)
        ),
    )


def _layouts(comm: str, parameters: Parameters, contents: int) -> tuple[Layout, ...]:
    # Content numbers run on from one process to the next.
    pages = parameters["pages"]
    return tuple(
        Layout(f"{comm}-{index}", pages, index * pages % contents if contents else 0, contents)
        for index in range(parameters.get("processes", 1))
    )


def _nobody(layouts: Sequence[Layout]) -> Merged:
    return Merged(0, 0, 0, 0, 0, (0,) * len(layouts), ())


def _merges(merged: Merged, limit: int) -> str:
    texts = []
    for count in merged.copies:
        full, rest = divmod(count, limit)
        nodes = full + (rest >= 2)
        text = f"{_nr(count, 'copy', 'copies')} of a content: {_nr(nodes, 'stable node')}"
        texts.append(text + " and 1 page left in the unstable tree" * (rest == 1))
    return (
        "The first pass stores each page's checksum. The second finds it unchanged and puts the "
        f"page on a stable node of its content with fewer than max_page_sharing={limit} sharers, "
        "or else makes one with an equal page that waits in the unstable tree: "
        + "; ".join(texts)
        + "."
    )


def _merge_step(merged: Merged, layouts: Sequence[Layout], max_page_sharing: int) -> Step:
    return Step("merged", Scan(2), _expect(merged, layouts), _merges(merged, max_page_sharing))


def _nr(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _map(parameters: Parameters) -> str:
    processes = parameters.get("processes", 1)
    verb = "maps" if processes == 1 else "each map"
    return f"{_nr(processes, 'process', 'processes')} {verb} {_nr(parameters['pages'], 'page')}"


def _plan_duplicates(parameters: Parameters, max_page_sharing: int) -> Plan:
    total = parameters["processes"] * parameters["pages"]
    contents = parameters["contents"]
    if contents > total:
        raise UsageError(f"{total} pages cannot have {contents} contents")
    layouts = _layouts("ksm-dup", parameters, contents)
    merged = merge(layouts, max_page_sharing)
    return Plan(
        does=f"{_map(parameters)}, {total} in all, with {_nr(contents, 'content')} in turn.",
        layouts=layouts,
        steps=(_merge_step(merged, layouts, max_page_sharing),),
    )


def _plan_unique(parameters: Parameters, max_page_sharing: int) -> Plan:
    total = parameters["processes"] * parameters["pages"]
    layouts = _layouts("ksm-uniq", parameters, total)
    return Plan(
        does=f"{_map(parameters)}, all {total} different.",
        layouts=layouts,
        steps=(
            Step(
                "unshared",
                Scan(2),
                _expect(merge(layouts, max_page_sharing), layouts),
                "The first pass stores each page's checksum. The second finds it unchanged and no "
                "equal page, and puts the page into the unstable tree.",
            ),
        ),
    )


def _plan_volatile(parameters: Parameters, max_page_sharing: int) -> Plan:
    total = parameters["processes"] * parameters["pages"]
    layouts = _layouts("ksm-vola", parameters, total)
    return Plan(
        does=f"{_map(parameters)}; all {total} get new contents before each of "
        f"{_nr(parameters['passes'], 'pass', 'passes')}.",
        layouts=layouts,
        steps=(
            Step(
                "volatile",
                Churn(parameters["passes"]),
                _expect(_nobody(layouts), layouts, pages_volatile=total),
                "Every pass finds every checksum changed, so no page gets into a tree.",
            ),
        ),
    )


def _plan_zero(parameters: Parameters, max_page_sharing: int) -> Plan:
    total = parameters["processes"] * parameters["pages"]
    layouts = _layouts("ksm-zero", parameters, 0)
    return Plan(
        does=f"{_map(parameters)}; all {total} are written to and emptied again; use_zero_pages "
        "is 1.",
        layouts=layouts,
        steps=(
            Step(
                "zero",
                Scan(3),
                Expectation(
                    {
                        **_expect(_nobody(layouts), layouts).counters,
                        "ksm_zero_pages": total,
                    },
                    tuple(
                        {
                            "ksm_merging_pages": 0,
                            "ksm_rmap_items": 0,
                            "ksm_zero_pages": layout.pages,
                        }
                        for layout in layouts
                    ),
                ),
                "The first pass stores each page's checksum. The second finds that of an empty "
                "page and maps the kernel's zero page instead. The third meets no page any more "
                "and drops the rmap_items.",
            ),
        ),
        knobs={"use_zero_pages": 1},
    )


def _plan_fork(parameters: Parameters, max_page_sharing: int) -> Plan:
    pages, contents, forks = (parameters[name] for name in ("pages", "contents", "forks"))
    if contents > pages:
        raise UsageError(f"{pages} pages cannot have {contents} contents")
    layouts = _layouts("ksm-fork", parameters, contents)
    heirs = tuple(Layout(f"ksm-heir-{index}", pages, 0, contents) for index in range(forks))
    merged = merge(layouts, max_page_sharing)
    before = _expect(merged, layouts)
    newborn = {"ksm_merging_pages": 0, "ksm_rmap_items": 0, "ksm_zero_pages": 0}
    everyone = (*layouts, *heirs)
    inherited = merged.merging[0]
    return Plan(
        does=f"{_map(parameters)} with {_nr(contents, 'content')} in turn; once they are merged "
        f"it forks {_nr(forks, 'time')}.",
        layouts=layouts,
        heirs=heirs,
        steps=(
            _merge_step(merged, layouts, max_page_sharing),
            Step(
                "forked",
                Fork(),
                Expectation(before.counters, (*before.processes, *(newborn for _ in heirs))),
                "A fork shares the merged pages at once, but no counter knows before ksmd has "
                "visited it.",
            ),
            Step(
                "counted",
                Scan(1),
                _expect(
                    merged,
                    everyone,
                    pages_sharing=merged.sharing + forks * inherited,
                    pages_volatile=forks * merged.single,
                    merging=(inherited,) * len(everyone),
                ),
                "One pass adds each fork's pages to the stable nodes that they are on already, "
                f"past max_page_sharing={max_page_sharing} where need be; a page that is not "
                "merged stays volatile in a fork, as it finds itself in the unstable tree.",
            ),
        ),
    )


def _plan_cow(parameters: Parameters, max_page_sharing: int) -> Plan:
    processes, pages, writes = (parameters[name] for name in ("processes", "pages", "writes"))
    if not 2 <= processes <= max_page_sharing:
        raise UsageError(
            f"cow needs between 2 and max_page_sharing={max_page_sharing} processes, "
            f"not {processes}"
        )
    if writes > pages:
        raise UsageError(f"a process with {pages} pages cannot write to {writes} of them")
    layouts = _layouts("ksm-cow", parameters, pages)
    merged = merge(layouts, max_page_sharing)
    left = (pages - writes, *merged.merging[1:])
    return Plan(
        does=f"{_map(parameters)}, the same {pages} contents; once they are merged the first "
        f"process writes to {writes} of its pages.",
        layouts=layouts,
        steps=(
            _merge_step(merged, layouts, max_page_sharing),
            Step(
                "written",
                Write(writes),
                _expect(merged, layouts, cow_ksm=writes),
                "Each write copies a page (cow_ksm); the sharing counters do not move before ksmd "
                "has visited it.",
            ),
            Step(
                "unshared",
                Scan(2),
                _expect(
                    merged,
                    layouts,
                    pages_sharing=merged.sharing - writes,
                    pages_unshared=writes,
                    cow_ksm=writes,
                    merging=left,
                ),
                "The next pass takes the copies off their stable nodes, which stay even with a "
                "single sharer, and stores the new checksums; the one after puts the copies into "
                "the unstable tree.",
            ),
        ),
    )


def _kind(
    name: str, meaning: str, plan: Callable[[Parameters, int], Plan], **defaults: int
) -> Kind:
    return Kind(name, meaning, MappingProxyType(defaults), plan)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            _kind(
                "duplicates",
                "processes with many copies of few contents",
                _plan_duplicates,
                processes=3,
                pages=1009,
                contents=7,
            ),
            _kind(
                "unique",
                "pages that have no equal",
                _plan_unique,
                processes=2,
                pages=1009,
            ),
            _kind(
                "volatile",
                "pages that change before every pass",
                _plan_volatile,
                processes=2,
                pages=503,
                passes=5,
            ),
            _kind(
                "zero",
                "empty pages, with use_zero_pages",
                _plan_zero,
                processes=2,
                pages=1009,
            ),
            _kind(
                "fork",
                "a process that forks once its pages are merged",
                _plan_fork,
                pages=1009,
                contents=7,
                forks=2,
            ),
            _kind(
                "cow",
                "writes to merged pages",
                _plan_cow,
                processes=2,
                pages=503,
                writes=101,
            ),
        )
    }
)
"""The workloads by name."""


def statement(plan: Plan) -> list[str]:
    """Write what is done, and exactly what is expected, one paragraph per line."""
    lines = [plan.does]
    for step in plan.steps:
        lines.append(f"{_action_text(step.action)} {step.why}")
        changes = [f"{name} {step.expected.counters[name]:+d}" for name in COUNTERS]
        lines.append(f"Expected ({step.label}): {', '.join(changes)}.")
    return lines


def _action_text(action: Scan | Churn | Fork | Write) -> str:
    match action:
        case Scan(passes) | Churn(passes):
            return f"Scan, {_nr(passes, 'pass', 'passes')}:"
        case Fork():
            return "Fork:"
        case Write(pages):
            return f"Write to {_nr(pages, 'page')}:"
