// SPDX-License-Identifier: GPL-2.0-only
/* ksmd's look at one page: the visit, and its search of the stable tree. One text with functions.c. */

/* The rmap_item of the page that ksmd looks at is known now. */
static __always_inline void know_rmap_item(struct under_way *at, u64 rmap_item)
{
	at->rmap_item = rmap_item;
#if defined(EVERY_PAGE) || defined(EMIT_PAGE_OUTCOMES)
	u64 address = address_of_rmap_item(rmap_item);

	at->address = address & ADDRESS_MASK;
	at->mm = mm_of_rmap_item(rmap_item);
	at->flags_before = address & ~ADDRESS_MASK;
#ifdef RMAP_ITEM_OLDCHECKSUM
	bpf_probe_read_kernel(&at->oldchecksum, sizeof(at->oldchecksum),
			      (void *)(rmap_item + RMAP_ITEM_OLDCHECKSUM));
#endif
#endif
#if defined(VISITS_WATCHED) && defined(RMAP_ITEM_REMAINING_SKIPS)
	bpf_probe_read_kernel(&at->remaining_skips, 1,
			      (void *)(rmap_item + RMAP_ITEM_REMAINING_SKIPS));
#endif
}

#ifdef EMIT_PAGE_OUTCOMES
#define SPAN_NS 1000000000ULL
#define MOST_PAGES_OF_A_SPAN 0xffff

/* What became of pages of the mm that ksmd is at, as in the event. */
struct span {
	u64 mm;
	u64 begun_ns;
	u32 nr_pages;
	u32 outcome;
	union {
		u16 pages[NR_PAGE_OUTCOMES];
		u64 words[NR_PAGE_OUTCOMES / 4];
	};
};
BPF_ARRAY(spans, struct span, 1);

static __always_inline struct span *span_at_hand(void)
{
	int key = 0;

	return spans.lookup(&key);
}

static __always_inline void end_span(void)
{
	struct span *span = span_at_hand();
	struct ksm_event *event;
	struct span ended;

	if (!span || !span->nr_pages)
		return;
	/* Empty before it is told: a writer to run may be here, and ksmd come in between. */
	ended = *span;
	span->nr_pages = 0;
	span->words[0] = 0;
	span->words[1] = 0;
	span->words[2] = 0;
	span->words[3] = 0;
	event = begin(PAGE_OUTCOMES);
	if (!event)
		return;
	pid_is_owner(event, ended.mm);
	event->body[1] = ended.words[0];
	event->body[2] = ended.words[1];
	event->body[3] = ended.words[2];
	event->body[4] = ended.words[3];
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
}

static __always_inline void count_page(u64 mm, u64 at_ns, u32 outcome)
{
	struct span *span = span_at_hand();

	if (!span)
		return;
	/* Through the map, so that the verifier does not follow each outcome on its own. */
	span->outcome = outcome;
	if (span->mm != mm || at_ns - span->begun_ns > SPAN_NS ||
	    span->nr_pages == MOST_PAGES_OF_A_SPAN)
		end_span();
	if (!span->nr_pages) {
		span->mm = mm;
		span->begun_ns = at_ns;
	}
	span->nr_pages++;
	span->pages[span->outcome & (NR_PAGE_OUTCOMES - 1)]++;
}

static __always_inline bool is_mapped_more_than_once(u64 page)
{
	struct evidence evidence = {};

	read_page(&evidence, page);
	return evidence.mapcount > 1;
}

/* The rmap_item's, when ksmd goes on. */
static __always_inline u32 outcome_of_visit(struct under_way *at)
{
	u64 flags;
	u32 oldchecksum = 0;

	if (at->zero_merged)
		return PAGE_ZERO_PAGE;
	if (at->appended && at->paired)
		return PAGE_MERGED_PAIR;
	if (at->appended)
		return at->outcome == SEARCH_SAME_PAGE ? PAGE_FORKED : PAGE_MERGED;
	if (at->tried)
		return PAGE_FAILED;
	if (at->outcome == SEARCH_BUSY)
		return PAGE_BUSY;
	/* Of a page that is in place already, a derived visit does not learn the rmap_item. */
	if (!at->rmap_item)
		return PAGE_IN_PLACE;
	if (mm_of_rmap_item(at->rmap_item) != at->mm)
		return PAGE_UNKNOWN;
	flags = address_of_rmap_item(at->rmap_item);
	if (flags & UNSTABLE_FLAG)
		return PAGE_UNIQUE;
	if (flags & STABLE_FLAG)
		return PAGE_IN_PLACE;
	bpf_probe_read_kernel(&oldchecksum, sizeof(oldchecksum),
			      (void *)(at->rmap_item + RMAP_ITEM_OLDCHECKSUM));
	if (oldchecksum != at->oldchecksum)
		return at->oldchecksum ? PAGE_CHANGED : PAGE_FIRST_VISIT;
	if (is_mapped_more_than_once(at->page))
		return PAGE_SAME_PAGE;
#ifdef KSM_MERGE_ACROSS_NODES_ADDRESS
	if (!(u32)read_u64(KSM_MERGE_ACROSS_NODES_ADDRESS))
		return PAGE_OTHER_NODE;
#endif
	return PAGE_UNKNOWN;
}
#endif

/* As should_skip_rmap_item has left it. */
static __always_inline void emit_skip(u64 rmap_item, u64 mm, u64 at_ns)
{
#if defined(EVERY_PAGE) && defined(EMIT_SHOULD_SKIP_RMAP_ITEM)
	struct ksm_event *event = begin(SHOULD_SKIP_RMAP_ITEM);

	if (!event)
		return;
	event->ts_ns = at_ns;
	add_place(event, rmap_item, mm, 0);
	bpf_probe_read_kernel(&event->age, 1, (void *)(rmap_item + RMAP_ITEM_AGE));
	bpf_probe_read_kernel(&event->remaining_skips, 1,
			      (void *)(rmap_item + RMAP_ITEM_REMAINING_SKIPS));
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

#ifdef VISITS_WATCHED
/*
 * Nothing but should_skip_rmap_item writes to remaining_skips: it makes it one less where it skips
 * the page, which is then in no tree, and more where it ends a skipping (mm/ksm.c). In the stable
 * tree, 7.3 has something else in its place. Kernels without smart scan have none.
 */
static __always_inline bool was_skipped(struct under_way *at)
{
#ifdef RMAP_ITEM_REMAINING_SKIPS
	u8 remaining_skips = 0;

	bpf_probe_read_kernel(&remaining_skips, 1,
			      (void *)(at->rmap_item + RMAP_ITEM_REMAINING_SKIPS));
	return at->remaining_skips && remaining_skips == at->remaining_skips - 1 &&
	       mm_of_rmap_item(at->rmap_item) == at->mm &&
	       !(address_of_rmap_item(at->rmap_item) & STABLE_FLAG);
#else
	return false;
#endif
}
#endif

/* What became of the page is known when ksmd goes on. */
static __always_inline void end_visit(struct under_way *at)
{
	struct ksm_event *event;

	if (!at->looking)
		return;
	at->looking = 0;
#ifdef VISITS_WATCHED
	if (was_skipped(at)) {
		count(COUNT_SKIPS, 1);
		emit_skip(at->rmap_item, at->mm, at->begun_ns);
#ifdef EMIT_PAGE_OUTCOMES
		count_page(at->mm, at->begun_ns, PAGE_SKIPPED);
#endif
		return;
	}
	count(COUNT_VISITS, 1);
	count_passage(FUNCTION_cmp_and_merge_page, ENTERED);
#endif
	if (at->last_begun_ns)
		count_slot(HISTOGRAM_VISIT_INTERVAL_NS, at->begun_ns - at->last_begun_ns);
	at->last_begun_ns = at->begun_ns;
#ifdef EMIT_PAGE_OUTCOMES
	count_page(at->mm, at->begun_ns, outcome_of_visit(at));
#endif
#if defined(EVERY_PAGE) && defined(EMIT_CMP_AND_MERGE_PAGE)
	event = begin(CMP_AND_MERGE_PAGE);
	if (event) {
		event->ts_ns = at->begun_ns;
		event->pfn = pfn_of(at->page);
		/* The rmap_item may be gone by now, after a pause of ksmd. */
		if (at->rmap_item && at->mm && mm_of_rmap_item(at->rmap_item) == at->mm) {
			add_place(event, at->rmap_item, at->mm, 0);
			event->flags_before = at->flags_before;
#ifdef RMAP_ITEM_OLDCHECKSUM
			u32 oldchecksum = 0;

			bpf_probe_read_kernel(&oldchecksum, sizeof(oldchecksum),
					      (void *)(at->rmap_item + RMAP_ITEM_OLDCHECKSUM));
			event->checksum_changed = oldchecksum != at->oldchecksum;
#endif
		} else {
			add_place(event, 0, at->mm, at->address);
			event->rmap_item = at->rmap_item;
		}
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
#endif
	if (!at->searched)
		return;
	count(COUNT_SEARCHES + (at->outcome & 3), 1);
	count_slot(HISTOGRAM_SEARCH_NODES, at->nodes);
#if defined(EVERY_PAGE) && defined(EMIT_STABLE_TREE_SEARCH)
	event = begin(STABLE_TREE_SEARCH);
	if (!event)
		return;
	event->pfn = pfn_of(at->page);
	event->outcome = at->outcome;
	event->nodes = at->nodes;
	if (at->outcome == SEARCH_BUSY)
		event->err = -EBUSY;
	if (at->rmap_item && mm_of_rmap_item(at->rmap_item) == at->mm) {
		add_place(event, at->rmap_item, at->mm, 0);
	} else {
		add_place(event, 0, at->mm, at->address);
		event->rmap_item = at->rmap_item;
	}
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/*
 * ksmd may be taken off its CPU in the middle of a program of ours (fentry, preempt=full), where
 * the one on sched_switch ends the same visit; and it leaves its CPU without ksm_thread_mutex,
 * which a writer to run may have by then. Of two at a time one goes on, or none: whatever is
 * under way is then ended by whoever comes next. Without the value that an atomic addition
 * returns, which BPF has only since 5.12.
 */
static __always_inline bool comes_alone(u32 *inside)
{
	__sync_fetch_and_add(inside, 1);
	return *(volatile u32 *)inside == 1;
}

static __always_inline void goes(u32 *inside)
{
	__sync_fetch_and_add(inside, -1);
}

static __always_inline void end_visit_once(struct under_way *at)
{
	if (comes_alone(&at->ending_visit))
		end_visit(at);
	goes(&at->ending_visit);
}

/* ksmd is through with a pass, or takes no other page for now. */
static __always_inline void pause_visits(struct under_way *at)
{
	if (comes_alone(&at->ending_visit)) {
		end_visit(at);
#ifdef EMIT_PAGE_OUTCOMES
		end_span();
#endif
	}
	goes(&at->ending_visit);
}

#if defined(EMIT_PAGE_OUTCOMES) || defined(VISITS_WATCHED)
static __always_inline void pass_ends(void)
{
	struct under_way *at = now_under_way();

	if (at)
		pause_visits(at);
}
#endif

static __always_inline void begin_visit(struct under_way *at, u64 rmap_item, u64 page)
{
	u64 now_ns = bpf_ktime_get_ns();

	end_visit(at);
#ifndef VISITS_WATCHED
	count(COUNT_VISITS, 1);
#endif
#if defined(KSM_PAGES_SKIPPED_ADDRESS) && (defined(VISITS_DERIVED) || defined(EMIT_PAGE_OUTCOMES))
	at->skipped = read_u64(KSM_PAGES_SKIPPED_ADDRESS);
#endif
	at->begun_ns = now_ns;
	at->rmap_item = 0;
	at->page = page;
	at->mm = 0;
	at->address = 0;
	at->looking = 1;
	at->searched = 0;
	at->decided = 0;
	at->outcome = SEARCH_NONE;
	at->nodes = 0;
	at->tried = 0;
	at->appended = 0;
	at->paired = 0;
	at->zero_merged = 0;
	if (rmap_item)
		know_rmap_item(at, rmap_item);
}

/* ksmd: (struct page *page, rmap_item). */
static __always_inline u64 enter_cmp_and_merge_page(u64 *args)
{
	struct under_way *at = now_under_way();

	if (!at)
		return 0;
	begin_visit(at, args[1], args[0] ? args[0] : at->found_page);
	return 0;
}

#ifdef VISITS_WATCHED
BPF_MAPPED_ARRAY(watched, u64, 1);

/*
 * True where this program was run for each write since the last. The kernel leaves it out on a CPU
 * whose lost task is in the middle of bpf(2) (kernel/events/core.c:__perf_event_overflow and
 * kernel/bpf/syscall.c, bpf_prog_active), but counts the write.
 */
static __always_inline bool saw_last_write(void *ctx, struct under_way *at)
{
	struct {
		u64 counter;
		u64 enabled_ns;
		u64 running_ns;
	} reached = {};
	int key = 0;
	u64 *times = watched.lookup(&key);
	u64 before = at->reached;

	if (!times || bpf_perf_prog_read_value(ctx, (void *)&reached, sizeof(reached)))
		return false;
	*times += 1;
	at->reached = reached.counter;
	return reached.counter == before + 1;
}

/*
 * ksmd, right behind a write to ksm_scan.rmap_list, where scan_get_next_rmap_item holds how far it
 * has come: the link in the rmap_item that it has taken, before it asks should_skip_rmap_item and
 * returns it to be looked at; or, when it comes to an mm and when it gives up on one that exits,
 * the beginning of the mm_slot's list (mm/ksm.c, 6.1 to 7.x). Others do not write to it.
 */
int on_ksm_scan_rmap_list(void *ctx)
{
	struct under_way *at = now_under_way();
	u64 list, slot;

	if (!at)
		return 0;
	/* Of the last page it is then not known what the kernel has done with its rmap_item. */
	if (!saw_last_write(ctx, at))
		at->looking = 0;
	if (!is_recording())
		return 0;
	list = read_u64(KSM_SCAN_ADDRESS + KSM_SCAN_RMAP_LIST);
	slot = read_u64(KSM_SCAN_ADDRESS + KSM_SCAN_MM_SLOT);
	if (list == slot + MM_SLOT_RMAP_LIST) {
		end_visit(at);
		return 0;
	}
	begin_visit(at, list - RMAP_ITEM_RMAP_LIST, at->found_page);
	/* A new rmap_item is all 0, and compilers fill it before this write or after it. */
	at->mm = read_u64(slot + MM_SLOT_MM);
	return 0;
}
#endif

/*
 * ksmd: (pmd, addr, end, struct mm_walk *walk); 1: found a page for ksmd to look at, which it
 * then does unless smart scan skips it (mm/ksm.c:scan_get_next_rmap_item, should_skip_rmap_item)
 * or there is no memory for an rmap_item.
 */
static __always_inline void leave_ksm_next_page_pmd_entry(u64 *args, u64 result, struct call *call)
{
#if defined(MM_WALK_MM) && defined(MM_WALK_PRIVATE) && defined(NEXT_PAGE_PAGE) && \
	defined(NEXT_PAGE_ADDR)
	struct under_way *at = now_under_way();
	u64 walk = args[3];
	u64 found;

	if (!at || (u32)result != 1 || !in_ksmd())
		return;
	found = read_u64(walk + MM_WALK_PRIVATE);
	at->found_page = read_u64(found + NEXT_PAGE_PAGE);
#ifdef VISITS_DERIVED
	begin_visit(at, 0, at->found_page);
	at->mm = read_u64(walk + MM_WALK_MM);
	at->address = read_u64(found + NEXT_PAGE_ADDR);
#endif
#endif
}

/* ---- the search of the stable tree ---- */

/* ksmd: (struct page *page). */
static __always_inline u64 enter_stable_tree_search(u64 *args)
{
	struct under_way *at = now_under_way();

	if (!at || !at->looking)
		return 0;
	at->searched = 1;
	if (args[0])
		at->page = args[0];
	return 0;
}

/* NULL, ERR_PTR(-EBUSY), or the page or folio found. */
static __always_inline void leave_stable_tree_search(u64 *args, u64 result, struct call *call)
{
	struct under_way *at = now_under_way();

	if (!at || !at->looking)
		return;
	at->decided = 1;
	if (!result)
		at->outcome = SEARCH_NONE;
	else if ((s64)result == -EBUSY)
		at->outcome = SEARCH_BUSY;
	else
		at->outcome = result == args[0] ? SEARCH_SAME_PAGE : SEARCH_FOUND;
}

/* The holder of ksm_thread_mutex, as all its callers are, so that there is one at a time. */
static __always_inline u64 enter_get_ksm_page(u64 *args)
{
#ifdef EMIT_GET_KSM_PAGE
	struct under_way *at = now_under_way();

	if (!at)
		return 0;
	at->lookup_tid = bpf_get_current_pid_tgid();
	at->lookup_lost_cpu = 0;
	at->lookup_ended_ns = 0;
	at->lookup_waited_ns = 0;
	at->lookup_begun_ns = bpf_ktime_get_ns();
#endif
	return 0;
}

static __always_inline void end_lookup(u64 stable_node, s64 result, struct call *call);

/*
 * get_ksm_page, later ksm_get_folio: (stable_node, flags). Of its calls by ksmd, those of
 * stable_tree_search come before any merge of the page, without a lock or trying one;
 * remove_rmap_item_from_tree waits for the lock, and stable_tree_insert comes after the merge.
 */
static __always_inline void leave_get_ksm_page(u64 *args, u64 result, struct call *call)
{
	struct under_way *at;
	u32 flags = args[1];

	end_lookup(args[0], result, call);
	if (!in_ksmd())
		return;
	at = now_under_way();
	if (!at || !at->looking || at->decided || at->merging)
		return;
#ifdef SEARCHES_DERIVED
	if (flags == GET_NOLOCK || flags == GET_TRYLOCK)
		at->searched = 1;
#endif
	if (!at->searched)
		return;
	if (flags == GET_NOLOCK)
		at->nodes++;
	if (flags == GET_TRYLOCK && (s64)result == -EBUSY) {
		at->outcome = SEARCH_BUSY;
		at->decided = 1;
	}
}
