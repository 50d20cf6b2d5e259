// SPDX-License-Identifier: GPL-2.0-only
/* mms and passes, where there are no tracepoints. One text with functions.c. */

/* (mm): 0, or -ENOMEM. */
static __always_inline void leave___ksm_enter(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_KSM_ENTER
	struct ksm_event *event;

	if ((s32)result)
		return;
	event = begin(KSM_ENTER);
	if (!event)
		return;
	pid_is_owner(event, args[0]);
	bpf_get_current_comm(event->comm, COMM_BYTES);
	add_mm_counts(event, args[0]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* (mm), which the caller still holds. */
static __always_inline void leave___ksm_exit(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_KSM_EXIT
	struct ksm_event *event = begin(KSM_EXIT);

	if (!event)
		return;
	pid_is_owner(event, args[0]);
	add_mm_counts(event, args[0]);
#ifdef MM_KSM_ZERO_PAGES
	bpf_probe_read_kernel(&event->ksm_zero_pages, 8, (void *)(args[0] + MM_KSM_ZERO_PAGES));
#endif
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

#if defined(KSM_SCAN_ADDRESS) && defined(KSM_SCAN_SEQNR) && defined(KSM_RMAP_ITEMS_ADDRESS)
static __always_inline void stop_scan_if_over(struct under_way *at)
{
	struct ksm_event *event;
	bool over = false;

	if (comes_alone(&at->ending_pass)) {
		over = at->scanning && read_u64(KSM_SCAN_ADDRESS + KSM_SCAN_SEQNR) == at->seq + 1;
		if (over)
			at->scanning = 0;
	}
	goes(&at->ending_pass);
	if (!over)
		return;
	pause_visits(at);
#ifdef EMIT_KSM_STOP_SCAN
	event = begin(KSM_STOP_SCAN);
	if (!event)
		return;
	add_pass(event, at->seq, read_u64(KSM_RMAP_ITEMS_ADDRESS));
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* ksmd calls it where a pass begins, and nowhere else (mm/ksm.c:scan_get_next_rmap_item). */
static __always_inline u64 enter_lru_add_drain_all(u64 *args)
{
	struct under_way *at = now_under_way();
	struct ksm_event *event;

	if (!at || !in_ksmd())
		return 0;
	pause_visits(at);
	stop_scan_if_over(at);
	at->scanning = 1;
	at->seq = read_u64(KSM_SCAN_ADDRESS + KSM_SCAN_SEQNR);
#ifdef EMIT_KSM_START_SCAN
	event = begin(KSM_START_SCAN);
	if (!event)
		return 0;
	add_pass(event, at->seq, read_u64(KSM_RMAP_ITEMS_ADDRESS));
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
	return 0;
}

/* For locks.c. */
#define SCAN_ENDS_AT_SWITCH
#endif
