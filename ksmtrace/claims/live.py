"""The running kernel as it stands, as a case: read, and nothing touched."""

from __future__ import annotations

import sys
import time

from ksmtrace import __version__
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.capture.hooks import ABSENT
from ksmtrace.capture.samples import CounterSampler
from ksmtrace.claims.claim import Case
from ksmtrace.errors import CannotRun
from ksmtrace.events import KINDS, check_sorting, no_events
from ksmtrace.kernel.facts import read_facts
from ksmtrace.kernel.ksm_memory import read_ksm_memory
from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.stream import Header, Witnessed

_NO_EVENTS = "the state alone was read; record, and check the recording"


def read_case() -> Case:
    """Read counters, kernel memory and mapped pages of the running kernel, once.

    What may not be read is left out, with the reason; no program is loaded and no knob written.

    Raises:
        KernelFeatureMissing: the kernel has no KSM.
        CannotRun: this CPU does not sort.
    """
    check_sorting()
    facts = read_facts(probe=False)
    header = Header(
        version=__version__,
        command_line=sys.argv,
        started_ns=time.monotonic_ns(),
        started_realtime_ns=time.time_ns(),
        facts=facts.as_json(),
        plan=[{"event": kind.name, "rung": ABSENT, "reason": _NO_EVENTS} for kind in KINDS],
        unseen=[],
        settings={},
    )
    recorded = Recorded(header, no_events())
    sampler = CounterSampler(facts.ksmd_pid)
    sampler.watch_mergeable()
    recorded.samples.append(sampler.sample())
    begin_ns = time.monotonic_ns()
    memory, pages, why_not = None, None, {}
    try:
        memory = read_ksm_memory()
    except CannotRun as error:
        why_not["memory"] = str(error)
    try:
        pages = read_page_truth()
    except CannotRun as error:
        why_not["pages"] = str(error)
    recorded.witnessed.append(
        Witnessed("now", begin_ns, time.monotonic_ns(), memory, pages, why_not)
    )
    recorded.samples.append(sampler.sample())
    return Case(recorded)
