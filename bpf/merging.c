// SPDX-License-Identifier: GPL-2.0-only
/* Merges, and why they fail. One text with functions.c. */

/* ksmd: (rmap_item, struct page *page, struct page *kpage). */
static __always_inline u64 enter_try_to_merge_with_ksm_page(u64 *args)
{
	struct under_way *at = now_under_way();

	if (!at)
		return 0;
	at->merging = args[0];
	at->tried = 1;
	merge_begins(args[1]);
	if (at->looking && !at->decided) {
		/* Without kpage: the first step of a new pair, after a search that found none. */
		if (args[2]) {
			at->outcome = args[1] == args[2] ? SEARCH_SAME_PAGE : SEARCH_FOUND;
#ifdef SEARCHES_DERIVED
			/* A forked KSM page is its own answer, and no stable_node is looked up. */
			at->searched = 1;
#endif
		}
		at->decided = 1;
	}
	return 0;
}

static __always_inline void leave_try_to_merge_with_ksm_page(u64 *args, u64 result,
							     struct call *call)
{
	struct under_way *at = now_under_way();

	if (at)
		at->merging = 0;
#ifdef EMIT_KSM_MERGE_WITH_KSM_PAGE
	struct ksm_event *event = begin(KSM_MERGE_WITH_KSM_PAGE);

	if (event) {
		event->err = result;
		event->pfn = pfn_of(args[2] ? args[2] : args[1]);
		event->ksm_page = args[2];
		add_place(event, args[0], 0, 0);
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
#endif
	merge_ends((s32)result, pfn_of(args[1]), args[0], mm_of_rmap_item(args[0]), 0);
}

/*
 * ksmd: (vma, struct page *page, struct page *kpage). Called by try_to_merge_with_ksm_page, or
 * else with the zero page (mm/ksm.c:cmp_and_merge_page, later try_to_merge_with_zero_page).
 */
static __always_inline u64 enter_try_to_merge_one_page(u64 *args)
{
	struct under_way *at = now_under_way();

	if (at && !at->merging)
		merge_begins(args[1]);
	merge_is_tried(args[1]);
	return 0;
}

static __always_inline void leave_try_to_merge_one_page(u64 *args, u64 result, struct call *call)
{
	struct under_way *at = now_under_way();
	u64 rmap_item = 0;
	u64 mm = 0;
	u64 address = 0;
	struct ksm_event *event;

#ifdef VMA_MM
	mm = read_u64(args[0] + VMA_MM);
#endif
	if (at && at->merging) {
		rmap_item = at->merging;
	} else if (at && at->looking) {
		rmap_item = at->rmap_item;
		address = at->address;
	}
#ifdef EMIT_TRY_TO_MERGE_ONE_PAGE
	event = begin(TRY_TO_MERGE_ONE_PAGE);
	if (event) {
		event->err = result;
		event->pfn = pfn_of(args[1]);
		event->duration_ns = call->entered_ns ? event->ts_ns - call->entered_ns : 0;
		add_place(event, rmap_item, mm, address);
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
#endif
	if (at && at->merging)
		return;
	if (at)
		at->zero_merged = !(s32)result;
	merge_ends((s32)result, pfn_of(args[1]), rmap_item, mm, STEP_ZERO_PAGE);
#ifdef EMIT_KSM_MERGE_ONE_PAGE
	event = begin(KSM_MERGE_ONE_PAGE);
	if (event) {
		event->err = result;
		event->pfn = pfn_of(args[2]);
		add_place(event, rmap_item, mm, address);
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
#endif
}

/* ksmd: (vma, page or folio, pte_t *orig_pte); it has the folio's lock. */
static __always_inline void leave_write_protect_page(u64 *args, u64 result, struct call *call)
{
	struct evidence *evidence = evidence_at_hand();

	if (!evidence || !evidence->page)
		return;
	evidence->steps |= STEP_WRITE_PROTECT;
	if (!(s32)result)
		evidence->steps |= STEP_WRITE_PROTECTED;
	else
		read_page(evidence, evidence->page);
}

/* Anyone: (mm, address). Of ksmd's merges only replace_page calls it, once contents are equal. */
static __always_inline u64 enter_mm_find_pmd(u64 *args)
{
	struct evidence *evidence;

	if (!in_ksmd())
		return 0;
	evidence = evidence_at_hand();
	if (evidence && evidence->page && (evidence->steps & STEP_WRITE_PROTECTED))
		evidence->steps |= STEP_IDENTICAL;
	return 0;
}

/* rmap_hlist_len of a chain's stable_node (mm/ksm.c: STABLE_NODE_CHAIN). */
#define STABLE_NODE_CHAIN (-1024)
/* How far from the chain a dup without sharers is found: a new one is the first. */
#define MOST_DUPS_BEFORE 16

static __always_inline void add_node(struct ksm_event *event, u64 stable_node)
{
	event->stable_node = stable_node;
	event->pfn = kpfn_of(stable_node);
#if defined(STABLE_NODE_LENGTH) && defined(STABLE_NODE_NID)
	if (stable_node) {
		bpf_probe_read_kernel(&event->sharers, 4,
				      (void *)(stable_node + STABLE_NODE_LENGTH));
		bpf_probe_read_kernel(&event->nid, 4, (void *)(stable_node + STABLE_NODE_NID));
	}
#endif
}

#ifdef STABLE_NODE_LENGTH
static __always_inline bool is_chain(u64 stable_node)
{
	s32 length = 0;

	bpf_probe_read_kernel(&length, sizeof(length), (void *)(stable_node + STABLE_NODE_LENGTH));
	return length == STABLE_NODE_CHAIN;
}
#endif

#if defined(EMIT_STABLE_TREE_INSERT) && defined(MIGRATE_NODES_ADDRESS)
/*
 * A dup's head is STABLE_NODE_DUP_HEAD, which is &migrate_nodes.prev, and its hlist_dup.pprev
 * leads to the dup before it or to the chain's hlist (mm/ksm.c: stable_node_chain_add_dup).
 */
static __always_inline u64 chain_of(u64 stable_node)
{
	u64 at = stable_node;
	int i;

	if (read_u64(stable_node + STABLE_NODE_HEAD) != MIGRATE_NODES_ADDRESS + 8)
		return 0;
	for (i = 0; i < MOST_DUPS_BEFORE; i++) {
		u64 pprev = read_u64(at + STABLE_NODE_HLIST_DUP + 8);

		if (!pprev)
			return 0;
		if (is_chain(pprev - STABLE_NODE_HLIST))
			return pprev - STABLE_NODE_HLIST;
		at = pprev - STABLE_NODE_HLIST_DUP;
	}
	return 0;
}
#endif

/* ksmd: (rmap_item, stable_node, bool max_page_sharing_bypass). */
static __always_inline u64 enter_stable_tree_append(u64 *args)
{
	struct under_way *at = now_under_way();

	if (at && at->rmap_item == args[0])
		at->appended = 1;
	else if (at)
		at->paired = 1;
#if defined(EMIT_STABLE_TREE_INSERT) && defined(STABLE_NODE_HLIST)
	struct ksm_event *first;

	if (!read_u64(args[1] + STABLE_NODE_HLIST)) {
		first = begin(STABLE_TREE_INSERT);
		if (first) {
			add_node(first, args[1]);
			first->chain = chain_of(args[1]);
			ring.ringbuf_submit(first, RB_NO_WAKEUP);
		}
	}
#endif
#ifdef EMIT_STABLE_TREE_APPEND
	struct ksm_event *event = begin(STABLE_TREE_APPEND);

	if (!event)
		return 0;
	event->stable_node = args[1];
	event->pfn = kpfn_of(args[1]);
	if (args[2] & 1)
		event->flags |= BYPASS;
#ifdef STABLE_NODE_HLIST
	if (!read_u64(args[1] + STABLE_NODE_HLIST))
		event->flags |= FIRST_SHARER;
#endif
	add_place(event, args[0], 0, 0);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
	return 0;
}

/* (dup, root): the new chain, or NULL. */
static __always_inline void leave_alloc_stable_node_chain(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_ALLOC_STABLE_NODE_CHAIN
	struct ksm_event *event;

	if (!result)
		return;
	event = begin(ALLOC_STABLE_NODE_CHAIN);
	if (!event)
		return;
	add_node(event, args[0]);
	event->chain = result;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/*
 * stable_node_dup, before it __stable_node_chain: (dup **, stable_node **, root, prune). Where it
 * frees the chain, the second points to the only dup afterwards, or to NULL.
 */
static __always_inline u64 enter_stable_node_dup(u64 *args)
{
#ifdef STABLE_NODE_LENGTH
	u64 chain = read_u64(args[1]);

	if (chain && is_chain(chain))
		return chain;
#endif
	return 0;
}

static __always_inline void leave_stable_node_dup(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_FREE_STABLE_NODE_CHAIN
	struct ksm_event *event;
	u64 now;

	if (!call->note)
		return;
	now = read_u64(call->args[1]);
	if (now == call->note) {
#ifdef STABLE_NODE_HLIST
		/* All its dups were stale: it is freed here, or by the caller next. */
		if (read_u64(now + STABLE_NODE_HLIST))
			return;
		now = 0;
#else
		return;
#endif
	}
	event = begin(FREE_STABLE_NODE_CHAIN);
	if (!event)
		return;
	add_node(event, now);
	event->chain = call->note;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}
