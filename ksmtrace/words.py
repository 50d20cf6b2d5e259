"""What the names in the analyses mean, in words: for every front that shows them."""

REASONS = {
    "EFAULT": "failed with EFAULT: locked, pinned, changing, or unmapped meanwhile; the kernel's "
    "answer does not tell which",
    "undone": "were undone: the first page of a pair whose second one failed",
    "open": "have no known outcome: what followed is not in the recording",
}
"""Why an attempt to merge did not end in a merged page."""

PAGE_OUTCOMES = {
    "first_visit": ("first visit", "only the checksum was stored"),
    "changed": ("volatile", "written to since the last visit"),
    "unique": ("unique", "no equal page: put into the unstable tree"),
    "merged": ("merged", "with a KSM page"),
    "merged_pair": ("merged in a pair", "with a page of the unstable tree"),
    "forked": ("forked", "a KSM page that a fork has shared, now counted as a sharer"),
    "in_place": ("in place", "merged already"),
    "zero_page": ("zero page", "replaced by the zero page"),
    "failed": ("failed", "a merge was tried and failed (causes below)"),
    "busy": ("busy", "the equal KSM page was locked (-EBUSY)"),
    "same_page": ("same page", "the unstable tree held the page itself, by a fork (inferred)"),
    "other_node": ("other node", "the equal page was on another NUMA node, or gone (inferred)"),
    "skipped": ("skipped", "by smart_scan"),
    "gone": ("gone", "not there any more: unmapped, swapped out, the zero page, unmergeable"),
    "mm_exits": ("exiting", "not there any more: the process exits"),
    "unknown": ("unknown", "fits none of these"),
}
"""What became of a page, by :class:`ksmtrace.events.PageOutcome` in small letters: short, long."""

HELD_BY = {
    "seen": "held by {}",
    "owner": "owned by {}",
    "last reader": "last read by {}, which may have left",
    "walk": "held by {} in rmap_walk_ksm",
    "merge": "held by {} in a merge",
}
"""Who held a lock, by how that is known (:class:`ksmtrace.analysis.contention.Wait`)."""
