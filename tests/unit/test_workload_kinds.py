import itertools

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ksmtrace.cli.workload import workload
from ksmtrace.errors import UsageError
from ksmtrace.workload.children import Layout
from ksmtrace.workload.kinds import COUNTERS, KINDS, PROCESS_COUNTERS, merge, statement
from ksmtrace.workload.run import fill_parameters

LIMIT = 256


def scan_twice(layouts: list[Layout], limit: int) -> dict[str, object]:
    """Do what mm/ksm.c:cmp_and_merge_page does, page by page, in its second pass."""
    nodes: dict[int, list[int]] = {}
    waiting: dict[int, int] = {}
    merging = [0] * len(layouts)
    for owner, layout in enumerate(layouts):
        for number in layout.content_numbers():
            sharers = nodes.setdefault(number, [])
            open_node = next((i for i, n in enumerate(sharers) if n < limit), None)
            if open_node is not None:
                sharers[open_node] += 1
                merging[owner] += 1
            elif number in waiting:
                merging[waiting.pop(number)] += 1
                merging[owner] += 1
                sharers.append(2)
            else:
                waiting[number] = owner
    chains = [sharers for sharers in nodes.values() if len(sharers) > 1]
    return {
        "nodes": sum(len(sharers) for sharers in nodes.values()),
        "sharing": sum(sum(sharers) - len(sharers) for sharers in nodes.values()),
        "single": len(waiting),
        "chains": len(chains),
        "dups": sum(len(sharers) for sharers in chains),
        "merging": tuple(merging),
    }


@given(
    processes=st.integers(1, 5),
    pages=st.integers(1, 60),
    contents=st.integers(1, 70),
    limit=st.integers(2, 20),
)
def test_the_closed_formula_agrees_with_the_algorithm(
    processes: int, pages: int, contents: int, limit: int
) -> None:
    layouts = [Layout(f"p{i}", pages, i * pages % contents, contents) for i in range(processes)]
    merged = merge(layouts, limit)
    expected = scan_twice(layouts, limit)
    assert expected == {name: getattr(merged, name) for name in expected}


@pytest.mark.parametrize(
    ("copies", "limit", "nodes", "sharing", "single"),
    [
        (1, 256, 0, 0, 1),
        (2, 256, 1, 1, 0),
        (256, 256, 1, 255, 0),
        (257, 256, 1, 255, 1),
        (258, 256, 2, 256, 0),
        (11, 2, 5, 5, 1),
    ],
)
def test_a_rest_of_one_finds_no_partner(
    copies: int, limit: int, nodes: int, sharing: int, single: int
) -> None:
    merged = merge([Layout("p", copies, 0, 1)], limit)
    assert (merged.nodes, merged.sharing, merged.single) == (nodes, sharing, single)


def test_every_default_is_prime() -> None:
    values = {n for kind in KINDS.values() for n in kind.defaults.values()}
    assert [n for n in sorted(values) if n < 2 or any(n % d == 0 for d in range(2, n))] == []


@pytest.mark.parametrize("name", KINDS)
def test_every_plan_accounts_for_every_page(name: str) -> None:
    plan = KINDS[name].plan(KINDS[name].defaults, LIMIT)
    for step in plan.steps:
        expected = step.expected
        assert set(expected.counters) == set(COUNTERS)
        counted = sum(
            expected.counters[counter]
            for counter in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
        )
        rmap_items = sum(process["ksm_rmap_items"] for process in expected.processes)
        merging = sum(process["ksm_merging_pages"] for process in expected.processes)
        assert counted == rmap_items
        assert merging == expected.counters["pages_shared"] + expected.counters["pages_sharing"]
        for process in expected.processes:
            assert set(process) == set(PROCESS_COUNTERS)


@pytest.mark.parametrize("name", KINDS)
def test_no_two_processes_have_one_name(name: str) -> None:
    plan = KINDS[name].plan({**KINDS[name].defaults}, LIMIT)
    comms = [layout.comm for layout in (*plan.layouts, *plan.heirs)]
    assert len(set(comms)) == len(comms)
    assert max(map(len, comms)) <= 15


def test_duplicates_state_their_figures() -> None:
    kind = KINDS["duplicates"]
    lines = statement(kind.plan(kind.defaults, LIMIT))
    assert lines[0].startswith("3 processes each map 1009 pages, 3027 in all, with 7 contents")
    assert "432 copies of a content: 2 stable nodes" in lines[1]
    assert lines[2].startswith("Expected (merged): pages_shared +14, pages_sharing +3013, ")


def test_a_fork_of_a_page_without_partner_is_volatile() -> None:
    plan = KINDS["fork"].plan({"pages": 257, "contents": 2, "forks": 3}, 4)
    counters = plan.steps[-1].expected.counters
    assert counters["pages_unshared"] == 1
    assert counters["pages_volatile"] == 3
    assert counters["pages_sharing"] == 256 * 4 - counters["pages_shared"]


@pytest.mark.parametrize(
    ("name", "given_parameters", "message"),
    [
        ("unique", {"contents": 3}, "the workload unique has no --contents"),
        ("unique", {"pages": 0}, "--pages must be at least 1, not 0"),
        ("duplicates", {"pages": 1, "contents": 5}, "3 pages cannot have 5 contents"),
        ("fork", {"pages": 3}, "3 pages cannot have 7 contents"),
        ("cow", {"processes": 1}, "cow needs between 2 and max_page_sharing=256 processes, not 1"),
        ("cow", {"pages": 100}, "a process with 100 pages cannot write to 101 of them"),
    ],
)
def test_parameters_that_cannot_be_meant(
    name: str, given_parameters: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        KINDS[name].plan(fill_parameters(KINDS[name], given_parameters), LIMIT)


def test_help_lists_every_workload_with_its_defaults() -> None:
    text = " ".join(CliRunner().invoke(workload, ["--help"]).output.split())
    for kind in KINDS.values():
        options = " ".join(itertools.chain(f"--{o} {n}" for o, n in kind.defaults.items()))
        assert f"{kind.name} {kind.meaning} ({options})" in text
