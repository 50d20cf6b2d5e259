// SPDX-License-Identifier: GPL-2.0-only
/* rmap_items and stable_nodes leave the trees. One text with functions.c. */

#ifdef EMIT_PAGE_OUTCOMES
/*
 * An rmap_item leaves the trees that is neither of the page that ksmd looks at, nor of one that it
 * merges: should_skip_rmap_item does that, once it has counted the skip; get_next_rmap_item and
 * remove_trailing_rmap_items, for pages that are not there any more; and unmerging.
 */
static __always_inline void passes_by(struct under_way *at, u64 rmap_item, u64 address)
{
	u64 mm = mm_of_rmap_item(rmap_item);
	u32 outcome = PAGE_GONE;
	u32 users = 1;

	if (at->merging || !at->begun_ns)
		return;
#ifdef MM_USERS
	bpf_probe_read_kernel(&users, sizeof(users), (void *)(mm + MM_USERS));
#endif
	if (at->looking && at->rmap_item == rmap_item && users && in_ksmd())
		return;
#ifdef VISITS_DERIVED
	/* Before ksmd takes the page that it has found, it drops what was in front of it. */
	if (!(at->looking && !at->rmap_item && at->mm == mm && users &&
	      (address & ADDRESS_MASK) < at->address && in_ksmd()))
		end_visit_once(at);
#else
	end_visit_once(at);
#endif
	if (!in_ksmd())
		return;
	if (!users)
		outcome = PAGE_MM_EXITS;
#if defined(KSM_PAGES_SKIPPED_ADDRESS) && !defined(VISITS_WATCHED)
	u64 skipped = read_u64(KSM_PAGES_SKIPPED_ADDRESS);

	if (skipped != at->skipped) {
		outcome = PAGE_SKIPPED;
		at->skipped = skipped;
		count(COUNT_SKIPS, 1);
		emit_skip(rmap_item, mm, bpf_ktime_get_ns());
	}
#endif
	count_page(mm, bpf_ktime_get_ns(), outcome);
}
#endif

/* Whoever holds ksm_thread_mutex: (rmap_item). */
static __always_inline u64 enter_remove_rmap_item_from_tree(u64 *args)
{
	struct under_way *at = now_under_way();
	u64 rmap_item = args[0];
	u64 address;

	if (!at)
		return 0;
	address = address_of_rmap_item(rmap_item);
	/* cmp_and_merge_page calls it for the page that it looks at: now the rmap_item is known. */
	if (at->looking && !at->rmap_item && !at->merging && in_ksmd() &&
	    at->address == (address & ADDRESS_MASK) && at->mm == mm_of_rmap_item(rmap_item)) {
		know_rmap_item(at, rmap_item);
#if defined(VISITS_DERIVED) && defined(KSM_PAGES_SKIPPED_ADDRESS)
		/* should_skip_rmap_item calls it too, once it has counted the skip. */
		if (read_u64(KSM_PAGES_SKIPPED_ADDRESS) != at->skipped) {
			at->looking = 0;
			count(COUNT_VISITS, -1ULL);
#ifndef EMIT_PAGE_OUTCOMES
			count(COUNT_SKIPS, 1);
#endif
		}
#endif
	}
#ifdef EMIT_PAGE_OUTCOMES
	passes_by(at, rmap_item, address);
#endif
	at->removing = 0;
#ifdef RMAP_ITEM_HEAD
	if (address & STABLE_FLAG) {
		at->removing = rmap_item;
		at->removing_address = address;
		at->removing_node = read_u64(rmap_item + RMAP_ITEM_HEAD);
		at->removing_kpfn = kpfn_of(at->removing_node);
		at->removing_mm = mm_of_rmap_item(rmap_item);
		at->node_freed = 0;
	}
#endif
	return 0;
}

static __always_inline void leave_remove_rmap_item_from_tree(u64 *args, u64 result,
							     struct call *call)
{
	struct under_way *at = now_under_way();

	if (!at || !at->removing)
		return;
#ifdef EMIT_REMOVE_RMAP_ITEM_FROM_TREE
	struct ksm_event *event = begin(REMOVE_RMAP_ITEM_FROM_TREE);

	if (event) {
		event->rmap_item = at->removing;
		event->address = at->removing_address;
		event->stable_node = at->removing_node;
		event->pfn = at->removing_kpfn;
		event->flags |= HAS_ADDRESS;
		if (at->node_freed)
			event->flags |= NODE_FREED;
#ifdef STABLE_NODE_HLIST
		else if (!read_u64(at->removing_node + STABLE_NODE_HLIST))
			event->flags |= LAST_SHARER;
#endif
		if (at->removing_mm)
			pid_is_owner(event, at->removing_mm);
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
#endif
	at->removing = 0;
}

#ifdef EMIT_KSM_REMOVE_RMAP_ITEM
static __always_inline void emit_removed_sharer(u64 pfn, u64 rmap_item)
{
	struct ksm_event *event = begin(KSM_REMOVE_RMAP_ITEM);

	if (!event)
		return;
	event->pfn = pfn;
	add_place(event, rmap_item, 0, 0);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
}
#endif

/* The holder of ksm_thread_mutex, or memory hotplug: (stable_node), with its sharers on a hlist. */
static __always_inline u64 enter_remove_node_from_stable_tree(u64 *args)
{
	struct under_way *at = now_under_way();
	u64 stable_node = args[0];
	u64 pfn = kpfn_of(stable_node);

	if (at && at->removing && at->removing_node == stable_node)
		at->node_freed = 1;
#ifdef EMIT_GET_KSM_PAGE
	/* get_ksm_page has found it stale. */
	if (at && at->lookup_tid == (u32)bpf_get_current_pid_tgid())
		at->lookup_ended_ns = bpf_ktime_get_ns();
#endif
#if defined(EMIT_KSM_REMOVE_RMAP_ITEM) && defined(STABLE_NODE_HLIST) && defined(RMAP_ITEM_HLIST)
	u64 node = read_u64(stable_node + STABLE_NODE_HLIST);
	int i;

	/* As the tracepoint: for every sharer that has one behind it. */
	for (i = 0; i < MOST_SHARERS && node; i++) {
		u64 next = read_u64(node);

		if (next)
			emit_removed_sharer(pfn, node - RMAP_ITEM_HLIST);
		node = next;
	}
#endif
	struct ksm_event *event;

#ifdef EMIT_KSM_REMOVE_KSM_PAGE
	event = begin(KSM_REMOVE_KSM_PAGE);
	if (event) {
		event->pfn = pfn;
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
#endif
#ifdef EMIT_REMOVE_NODE_FROM_STABLE_TREE
	event = begin(REMOVE_NODE_FROM_STABLE_TREE);
	if (!event)
		return 0;
	add_node(event, stable_node);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
	return 0;
}

/* The task that unmerges, or ksmd in break_cow: (vma, addr[, lock_vma]), later (vma, addr, end,
 * lock_vma).
 */
static __always_inline void leave_break_ksm(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_BREAK_KSM
	struct ksm_event *event = begin(BREAK_KSM);

	if (!event)
		return;
	event->err = result;
	event->task_pid = event->pid;
	event->address = args[1];
	event->flags |= HAS_ADDRESS;
#if NARGS_break_ksm == 4
	event->end_address = args[2];
#endif
	event->duration_ns = call->entered_ns ? event->ts_ns - call->entered_ns : 0;
	if (event->duration_ns)
		count_shared_slot(HISTOGRAM_BREAK_KSM_NS, event->duration_ns);
#ifdef VMA_MM
	pid_is_owner(event, read_u64(args[0] + VMA_MM));
#endif
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* (kobj, attr, const char *buf, count): count, or a negative errno. */
static __always_inline u64 enter_run_store(u64 *args)
{
	u8 digit = 0;

	bpf_probe_read_kernel(&digit, sizeof(digit), (void *)args[2]);
	return digit;
}

static __always_inline void leave_run_store(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_RUN_STORE
	struct under_way *at = now_under_way();
	struct ksm_event *event;

	/* It has had ksm_thread_mutex: ksmd is through with its page, and takes no other now. */
	if (at && call->note != '1')
		pause_visits(at);
	event = begin(RUN_STORE);
	if (!event)
		return;
	event->err = (s64)result < 0 ? result : 0;
	event->run = call->note - '0';
	event->duration_ns = call->entered_ns ? event->ts_ns - call->entered_ns : 0;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}
