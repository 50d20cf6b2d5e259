"""What the admin guide says about KSM, sentence by sentence, and the claims that judge it.

Of Documentation/admin-guide/mm/ksm.rst as it is in 6.12; 7.3 has the same text. 5.10 has what
``since`` does not mark, but for the headings of two sections.
"""

from __future__ import annotations

from dataclasses import dataclass

_BACKGROUND = "background: it says nothing that a kernel could do otherwise"
_ADVICE = "advice"
_TOTAL = "how much faster or slower something becomes, without a figure"
_FIGURE = "a formula or an example to reckon with"
_DEFAULT = "a default: what a machine has now its owner may have set"
_SECTION = "it leads over to what follows"


@dataclass(frozen=True)
class Sentence:
    """One sentence of the guide.

    Attributes:
        begins: its first words, enough to find it.
        claims: ids of the claims that judge it, none where ``why_not`` says why.
        since: the first of the compared texts (5.10, 6.1, 6.12) that has it; None for the oldest.
        why_not: why nothing judges it.
    """

    begins: str
    claims: tuple[str, ...] = ()
    since: str | None = None
    why_not: str | None = None


def _said(begins: str, *claims: str, since: str | None = None) -> Sentence:
    return Sentence(begins, claims, since)


def _unsaid(begins: str, why_not: str, since: str | None = None) -> Sentence:
    return Sentence(begins, (), since, why_not)


GUIDE: tuple[tuple[str, tuple[Sentence, ...]], ...] = (
    (
        "Overview",
        (
            _unsaid("KSM is a memory-saving", _BACKGROUND),
            _unsaid("See mm/ksm.c", _BACKGROUND),
            _unsaid("KSM was originally developed", _BACKGROUND),
            _unsaid("But it can be useful", _ADVICE),
            _said("The KSM daemon ksmd periodically scans", "C02", "C44", "C47"),
            _said("The amount of pages that KSM daemon", "C32", "C33"),
            _said("KSM only merges anonymous", "C43"),
            _said("KSM's merged pages were originally", "C45", "C125"),
        ),
    ),
    (
        "Controlling KSM with madvise",
        (
            _said("KSM only operates on those areas", "C35"),
            _said("The app may call", "C39"),
            _said("Note: this unmerging call", "C42"),
            _unsaid(
                "If KSM is not configured", "a kernel without KSM has nothing else to be judged"
            ),
            _said("If the running kernel was built with CONFIG_KSM=y", "C36", "C38"),
            _said("If a region of memory must be split", "C37.split"),
            _said("Like other madvise calls", "C37"),
            _unsaid("Applications should be considerate", _ADVICE),
            _unsaid("KSM's scans may use a lot", _TOTAL),
        ),
    ),
    (
        "KSM daemon sysfs interface",
        (
            _said("The KSM daemon is controlled by sysfs", "C34"),
            _said("how many pages to scan before", "C32"),
            _said("The pages_to_scan value cannot be changed", "C32.advisor", since="6.12"),
            _unsaid("Default: 100", _DEFAULT),
            _said("how many milliseconds ksmd should sleep", "C33"),
            _unsaid("Default: 20", _DEFAULT),
            _said("specifies if pages from different NUMA", "C109.apart"),
            _said("When set to 0, ksm merges only pages", "C109.apart"),
            _unsaid("That brings lower latency", _TOTAL),
            _unsaid("Systems with more nodes", _ADVICE),
            _unsaid("Smaller systems, which need", _ADVICE),
            _unsaid("You may wish to compare", _ADVICE),
            _said("merge_across_nodes setting can be changed only", "DOC24.nodes"),
            _unsaid("Default: 1 (merging across", _DEFAULT),
            _said("set to 0 to stop ksmd", "C20", "C21"),
            _said("set to 1 to run ksmd", "C27"),
            _said("set to 2 to stop ksmd and unmerge", "C22", "C12", "C23"),
            _unsaid("Default: 0 (must be changed", _DEFAULT),
            _said("specifies whether empty pages", "DOC22"),
            _said("When set to 1, empty pages are merged", "DOC22"),
            _unsaid("This can improve the performance", _TOTAL),
            _unsaid("Care should be taken", _ADVICE),
            _said("This setting can be changed at any time", "DOC22.any"),
            _unsaid("Default: 0 (normal KSM behaviour", _DEFAULT),
            _said("Maximum sharing allowed for each", "Q6", "C02.limit"),
            _unsaid("This enforces a deduplication limit", "why there is a limit"),
            _said("The minimum value is 2", "DOC24.least"),
            _unsaid("The higher this value the faster", _TOTAL),
            _unsaid("Slowing down this traversal", _TOTAL),
            _unsaid("The scheduler latency of other tasks", _TOTAL),
            _unsaid(
                "specifies how frequently KSM checks the metadata",
                "it bounds how long stale dups may stay, and a walk of the tree prunes them "
                "earlier: no moment can be said to be wrong",
            ),
            _unsaid("Smaller milllisecs values", _TOTAL),
            _said("It's a noop if not a single", "Q7"),
            _said("Historically KSM checked every candidate", "C08.code", since="6.12"),
            _said("It did not take into account", "C08.code", since="6.12"),
            _said("When smart scan is enabled", "D1", since="6.12"),
            _said("How often these pages are skipped", "D1", since="6.12"),
            _unsaid("By default this optimization", _DEFAULT, since="6.12"),
            _said("The pages_skipped metric shows", "DOC10", "I2.passes", since="6.12"),
            _unsaid("The advisor_mode selects", _SECTION, since="6.12"),
            _said("Two modes are supported", "C32.advisor", since="6.12"),
            _unsaid("The default is none", _DEFAULT, since="6.12"),
            _said("By setting advisor_mode to scan-time", "C32.advisor", since="6.12"),
            _unsaid("The section about advisor", _SECTION, since="6.12"),
            _said("adivsor_max_cpu specifies the upper limit", "DOC21", since="6.12"),
            _unsaid("The default is 70", _DEFAULT, since="6.12"),
            _unsaid(
                "specifies the target scan time in seconds",
                "a target of seconds per pass, which takes passes of seconds to show",
                since="6.12",
            ),
            _unsaid("The default value is 200 seconds", _DEFAULT, since="6.12"),
            _said("specifies the lower limit of the pages_to_scan", "DOC20", since="6.12"),
            _unsaid("The default is 500", _DEFAULT, since="6.12"),
            _said("adivsor_max_pages_to_scan specifies", "DOC21", since="6.12"),
            _unsaid("The default is 30000", _DEFAULT, since="6.12"),
            _unsaid("The effectiveness of KSM", _SECTION),
            _said("how effective is KSM", "DOC13", since="6.12"),
            _unsaid("The calculation is explained below", _SECTION, since="6.12"),
            _said("how many pages are being scanned", "DOC9", "I2.passes", since="6.12"),
            _said("how many shared pages are being used", "C05", "C01.code"),
            _said("how many more sites are sharing", "C05", "C05.code", "C02.code"),
            _said("how many pages unique but repeatedly", "C08", "C07.code"),
            _said("how many pages changing too fast", "C08", "C09", "C52"),
            _said('how many pages did the "smart" page', "DOC10", since="6.12"),
            _said("how many times all mergeable areas", "C11", "C11.code"),
            _said("the number of KSM pages that hit", "DOC6"),
            _said("number of duplicated KSM pages", "DOC7"),
            _said(
                "how many zero pages that are still mapped",
                "DOC11",
                "DOC11.fork",
                "Q9",
                since="6.12",
            ),
            _said("When use_zero_pages is/was enabled", "C05.zero", "D8", since="6.12"),
            _said("if use_zero_pages has never been enabled", "DOC11.never", since="6.12"),
            _said("A high ratio of pages_sharing", "C15"),
            _said("pages_volatile embraces several", "C15", "D3", "C68.counters"),
            _said("The maximum possible pages_sharing/pages_shared", "DOC8"),
            _said("To increase the ratio max_page_sharing", "DOC8"),
        ),
    ),
    (
        "Monitoring KSM profit",
        (
            _unsaid("KSM can save memory by merging", _BACKGROUND, since="6.1"),
            _unsaid("Some of these pages may be merged", _BACKGROUND, since="6.1"),
            _unsaid("How to determine whether KSM save", _SECTION, since="6.1"),
            _said("Here is a simple approximate calculation", "DOC13", since="6.1"),
            _said("where ksm_saved_pages equals to the sum of pages", "DOC13", since="6.12"),
            _said("The KSM profit inner a single process", "Q10", since="6.1"),
            _said("where ksm_saved_pages equals to the sum of ksm_merging", "Q10", since="6.12"),
            _said("The process profit is also shown", "Q10", since="6.12"),
            _unsaid("From the perspective of application", _ADVICE, since="6.1"),
            _unsaid("Giving an example for reference", _FIGURE, since="6.1"),
            _unsaid("so if the ksm_rmap_items/ksm_merging", _FIGURE, since="6.1"),
        ),
    ),
    (
        "Monitoring KSM events",
        (
            _unsaid("There are some counters in /proc/vmstat", _SECTION, since="6.1"),
            _unsaid("KSM might help save memory", _BACKGROUND, since="6.1"),
            _unsaid("Those events could help users", _ADVICE, since="6.1"),
            _unsaid("For example, if cow_ksm increases", _ADVICE, since="6.1"),
            _said("is incremented every time a KSM page triggers", "DOC16", "I13", since="6.1"),
            _said("is incremented every time a KSM page is copied", "DOC17", "C123", since="6.1"),
        ),
    ),
    (
        "Advisor",
        (
            _unsaid("The number of candidate pages for KSM", _BACKGROUND, since="6.12"),
            _unsaid("It can be often observed", _BACKGROUND, since="6.12"),
            _unsaid("Without an advisor the pages_to_scan", _ADVICE, since="6.12"),
            _said("The scan time advisor can changes", "C32.advisor", since="6.12"),
            _said("The advisor can be enabled, so KSM", "C32.advisor", since="6.12"),
            _said("Two advisors are implemented", "C32.advisor", since="6.12"),
            _said("With none, no advisor is enabled", "C32.advisor", since="6.12"),
            _unsaid("The default is none", _DEFAULT, since="6.12"),
            _unsaid(
                "The scan time advisor changes the pages_to_scan",
                "what it chooses depends on the time that passes take",
                since="6.12",
            ),
            _said("The possible values for the pages_to_scan", "DOC20", "DOC21", since="6.12"),
            _unsaid("In addition there is also the", _SECTION, since="6.12"),
            _unsaid(
                "This parameter sets the target time", "it takes passes of seconds", since="6.12"
            ),
            _unsaid("The parameter advisor_target_scan_time decides", _TOTAL, since="6.12"),
            _unsaid("Lower values make the scan time advisor", _TOTAL, since="6.12"),
            _unsaid("This is the most important parameter", _ADVICE, since="6.12"),
            _said("The initial value and the maximum value", "DOC20.code", since="6.12"),
            _unsaid("The default values are sufficient", _ADVICE, since="6.12"),
            _unsaid(
                "The pages_to_scan parameter is re-calculated",
                "the report shows each choice of the advisor (ksm_advisor), which has seconds "
                "between them",
                since="6.12",
            ),
        ),
    ),
)
"""Per section its sentences, in their order."""
