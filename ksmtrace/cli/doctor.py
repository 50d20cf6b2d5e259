"""``ksmtrace doctor``: what this machine offers, what will be recorded, what cannot be seen."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import click

from ksmtrace.cli.options import without_option
from ksmtrace.cli.table import render_table

if TYPE_CHECKING:
    from ksmtrace.capture.plan import Plan
    from ksmtrace.kernel.facts import Facts
    from ksmtrace.kernel.probes import LoadProbe

_MAX_WIDTH = 110
_EXIT_CANNOT_RECORD = 3


@click.command(
    epilog="Example: ksmtrace doctor --json | jq .can_record",
    help="Say what can be recorded on this kernel, how, and what cannot be seen here and why.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@without_option
@click.pass_context
def doctor(context: click.Context, as_json: bool, without: tuple[str, ...]) -> None:
    """Print facts and plan; exit with 0 where a recording can be made, else with 3.

    Works for every user; changes nothing. As root it tries out, for some microseconds each,
    whether BPF programs that do nothing load and attach.
    """
    from ksmtrace.capture.plan import make_plan
    from ksmtrace.capture.sites import find_recipe
    from ksmtrace.kernel.facts import read_facts
    from ksmtrace.kernel.ksm_memory import probe_ksm_memory

    facts = read_facts()
    plan = make_plan(facts, find_recipe(facts.kernel.build_id), without=without)
    show = doctor_json if as_json else doctor_text
    click.echo(show(facts, plan, probe_ksm_memory()))
    context.exit(0 if plan.can_record else _EXIT_CANNOT_RECORD)


def doctor_json(facts: Facts, plan: Plan, memory: LoadProbe) -> str:
    """Write facts, plan, and whether kernel memory can be read, as JSON."""
    plain = facts.as_json()
    return json.dumps(
        {
            "can_record": plan.can_record,
            "kernel": plain["kernel"],
            "blockers": [{"missing": what, "remedy": remedy} for what, remedy in plan.blockers],
            "plan": plan.as_json(),
            "defines": dict(plan.defines),
            "unseen": [
                {"what": what, "why": why, "change": change} for what, why, change in plan.unseen
            ],
            "kernel_memory": {"readable": memory.works, "reason": memory.reason},
            "facts": plain,
        },
        indent=2,
    )


def doctor_text(facts: Facts, plan: Plan, memory: LoadProbe) -> str:
    """Write the same for people: first the verdict, last what cannot be seen."""
    width = min(shutil.get_terminal_size((_MAX_WIDTH, 24)).columns, _MAX_WIDTH)
    sections = [
        ("Can record?", _verdict(plan, width)),
        ("Kernel", _named(_kernel_rows(facts, memory), width)),
        ("Plan", _table(_plan_rows(plan), ("event", "rung", "on"))),
        ("How the derived and the inlined are told", _hows(plan, width)),
        ("Programs", _programs(plan, width)),
        ("KSM", _table(_ksm_rows(facts), ("file", "value", "unit", "type"), right=(1,))),
        ("Not readable", _named(sorted(facts.unknown.items()), width)),
        ("What cannot be seen here, and what would change that", _unseen(plan, width)),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections if lines)


def _verdict(plan: Plan, width: int) -> list[str]:
    caught = [event for event in plan.events if event.rung != "absent"]
    if plan.can_record:
        return [f"  yes: {len(caught)} of {len(plan.events)} kinds of event"]
    lines = ["  no:"]
    for what, remedy in plan.blockers:
        lines += _wrapped(what, width, "  - ", "    ")
        lines += _wrapped(remedy, width, "    do: ", "        ")
    return lines


def _kernel_rows(facts: Facts, memory: LoadProbe) -> list[tuple[str, str]]:
    kernel = facts.kernel
    rows = [
        ("release", f"{kernel.release}  {kernel.machine}"),
        ("version", kernel.version),
        ("build-id", kernel.build_id or "unknown"),
        ("CPUs", _numbers(facts.online_cpus)),
        ("NUMA nodes", _numbers(facts.numa_nodes)),
        ("page size", f"{facts.page_size_bytes} bytes"),
        ("ksmd", "not visible" if facts.ksmd_pid is None else f"pid {facts.ksmd_pid}"),
        ("BTF", "readable" if facts.btf else facts.unknown.get("btf", "absent")),
        ("tracefs", _tracefs(facts)),
        ("tracepoints", _tracepoints(facts)),
        ("user", _user(facts)),
        ("lockdown", (facts.privileges and facts.privileges.lockdown) or "unknown"),
    ]
    for kind, probe in (facts.loading or {}).items():
        outcome = {True: "works", False: "does not work", None: "unknown"}[probe.works]
        rows.append((f"{kind} programs", f"{outcome}: {probe.reason}"))
    outcome = "readable" if memory.works else "not readable"
    rows.append(("kernel memory", f"{outcome}: {memory.reason}"))
    if facts.kpf_ksm is not None:
        outcome = {True: "true", False: "not to be trusted", None: "unknown"}[
            facts.kpf_ksm.truthful
        ]
        rows.append(("KPF_KSM", f"{outcome}: {facts.kpf_ksm.reason}"))
    rows.append(("kernel headers", ", ".join(facts.headers) or "none (none are needed)"))
    rows.append(("bcc", "installed" if facts.bcc_installed else "not installed"))
    return rows


def _numbers(numbers: tuple[int, ...] | None) -> str:
    return "unknown" if numbers is None else f"{len(numbers)} ({_ranges(numbers)})"


def _ranges(numbers: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _tracefs(facts: Facts) -> str:
    if facts.tracefs_mounted is None:
        return facts.unknown.get("tracefs_mounted", "unknown")
    return "mounted" if facts.tracefs_mounted else "not mounted (not needed)"


def _tracepoints(facts: Facts) -> str:
    if facts.tracepoints is None:
        return "unknown"
    names = [name for name in facts.tracepoints if name.startswith("ksm_")]
    return f"{len(names)} named ksm_*"


def _user(facts: Facts) -> str:
    held = facts.privileges
    if held is None:
        return "unknown"
    if held.may_trace:
        return f"uid {held.euid}, may load tracing programs"
    return f"uid {held.euid}, may not load tracing programs"


def _plan_rows(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for event in plan.events:
        # The first of its hooks, without the kind of program; all are listed below.
        main = (event.target or "-").partition(", ")[0].rpartition(":")[2]
        rows.append((event.event, event.rung, main))
        rows += [("", "", f"without {field}") for field in event.missing_fields]
    return rows


def _hows(plan: Plan, width: int) -> list[str]:
    from ksmtrace.capture.hooks import DERIVED, SITE

    lines = []
    for event in plan.events:
        if event.rung in (DERIVED, SITE):
            lines += _wrapped(f"{event.event}: {event.reason}", width, "  ", "    ")
    return lines


def _programs(plan: Plan, width: int) -> list[str]:
    hows: dict[str, list[str]] = {}
    for attachment in plan.attachments:
        at = f"+{attachment.offset:#x}" if attachment.offset else ""
        hows.setdefault(f"{attachment.target}{at}", []).append(attachment.how)
    targets: dict[str, list[str]] = {}
    for target, how in hows.items():
        targets.setdefault(", ".join(how), []).append(target)
    lines = []
    for ways in sorted(targets):
        lines += _wrapped(f"{ways}: {', '.join(targets[ways])}", width, "  ", "    ")
    return lines


def _ksm_rows(facts: Facts) -> list[tuple[str, ...]]:
    from ksmtrace.kernel import sysfs

    rows: list[tuple[str, ...]] = []
    for file in sysfs.FILES if facts.ksm is not None else ():
        value = (facts.ksm or {})[file.name]
        rows.append((file.name, "absent" if value is None else str(value), file.unit, file.type))
    rows += [(name, "?", "", "unknown to ksmtrace") for name in facts.ksm_others]
    rows += [
        (f"vmstat {name}", "absent" if value is None else str(value), "", "counter")
        for name, value in (facts.vmstat or {}).items()
    ]
    return rows


def _unseen(plan: Plan, width: int) -> list[str]:
    lines = []
    for what, why, change in plan.unseen:
        lines += _wrapped(what, width, "  - ", "    ")
        lines += _wrapped(why, width, "    why:    ", "            ")
        lines += _wrapped(change, width, "    change: ", "            ")
    return lines


def _named(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    column = max((len(name) for name, _ in rows), default=0) + 4
    lines = []
    for name, text in rows:
        lines += _wrapped(text, width, f"  {name}".ljust(column), " " * column)
    return lines


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(
    rows: Iterable[Sequence[str]], heads: Sequence[str] = (), right: Collection[int] = ()
) -> list[str]:
    cells = list(rows)
    columns = len(cells[0]) if cells else 0
    left = [column for column in range(columns) if column not in right]
    return [f"  {line}" for line in render_table(heads, cells, left)] if cells else []
