// SPDX-License-Identifier: GPL-2.0-only
/*
 * The programs on functions of mm/ksm.c, and on places inside ksm_scan_thread
 * into which the compiler has inlined such functions. One text with ksm.c.
 *
 * Each function has a body for its entry (enter_F) and one for its exit
 * (leave_F), whichever way they are reached: the plan appends one line per
 * attachment, FENTRY, FEXIT, KENTRY, KEXIT or SITE, which makes the program
 * (ksmtrace/capture/hooks.py). Arguments are in the order of the kernel's.
 *
 * Defines from the plan, each only where known or wanted:
 *   EMIT_KIND               events of that kind come from here, and not from a tracepoint
 *   EVERY_PAGE              stream what happens for every page, too
 *   VISITS_DERIVED          no program on cmp_and_merge_page: see leave_ksm_next_page_pmd_entry
 *   VISITS_WATCHED          the same, but a watchpoint: see on_ksm_scan_rmap_list
 *   SEARCHES_DERIVED        no program on stable_tree_search: see leave_get_ksm_page
 *   NARGS_break_ksm         its number of arguments: 4 where it takes a range
 *   STRUCT_PAGE_BYTES, VMEMMAP_BASE_ADDRESS
 *   KSM_SCAN_ADDRESS, KSM_RMAP_ITEMS_ADDRESS, KSM_PAGES_SKIPPED_ADDRESS, MIGRATE_NODES_ADDRESS,
 *   KSM_MERGE_ACROSS_NODES_ADDRESS
 *                           the kernel's own variables
 *   offsets as in ksm.c
 */
#include <uapi/linux/ptrace.h>

#define EBUSY 16
#define UNSTABLE_FLAG 0x100ULL
#define STABLE_FLAG 0x200ULL
#define ADDRESS_MASK (~0xfffULL)

/* enum ksm_get_folio_flags, before it enum get_ksm_page_flags (mm/ksm.c), on all kernels. */
#define GET_NOLOCK 0
#define GET_TRYLOCK 2

/* A stable_node has at most max_page_sharing sharers, 256 by default, and those of forks. */
#define MOST_SHARERS 1024

enum { ENTERED, RETURNED, NR_WAYS };
BPF_MAPPED_ARRAY(passages, u64, NR_FUNCTIONS * NR_WAYS);

/* What ksmd and ksmd alone counts, so that no two programs write at a time; but for the last. */
enum {
	COUNT_VISITS,
	COUNT_SKIPS,
	COUNT_SEARCHES,
	COUNT_ZERO_PAGE_COWS = COUNT_SEARCHES + 4,
	NR_COUNTS,
};
BPF_MAPPED_ARRAY(counts, u64, NR_COUNTS);

enum {
	HISTOGRAM_VISIT_INTERVAL_NS,
	HISTOGRAM_SEARCH_NODES,
	HISTOGRAM_COW_NS,
	HISTOGRAM_BREAK_KSM_NS,
	HISTOGRAM_GET_KSM_PAGE_NS,
	NR_HISTOGRAMS,
};
#define HISTOGRAM_SLOTS 64
BPF_MAPPED_ARRAY(histograms, u64, NR_HISTOGRAMS * HISTOGRAM_SLOTS);

/* A call under way, of a function whose exit needs to know its entry. */
struct call {
	u64 args[4];
	u64 entered_ns;
	u64 note;
	/* of the program at the exit */
	void *ctx;
};
BPF_HASH(calls, u64, struct call, 16384);

/*
 * What ksm_thread_mutex's holder is about. There is one at a time, so one of
 * these is enough (mm/ksm.c: every caller of remove_rmap_item_from_tree, and
 * all of cmp_and_merge_page, hold it).
 */
struct under_way {
	/* the page that ksmd found last, and the one that it looks at */
	u64 found_page;
	u64 page;
	u64 mm;
	u64 address;
	u64 rmap_item;
	u64 begun_ns;
	u64 last_begun_ns;
	u32 looking;
	u32 flags_before;
	u32 oldchecksum;
	u8 remaining_skips;
	/* what was seen of its merging */
	u32 tried;
	u32 appended;
	u32 paired;
	u32 zero_merged;
	/* its search of the stable tree */
	u32 searched;
	u32 decided;
	u32 outcome;
	u32 nodes;
	/* rmap_item of the try_to_merge_with_ksm_page that has not returned */
	u64 merging;
	/* the sharer in remove_rmap_item_from_tree, as it was at its entry */
	u64 removing;
	u64 removing_address;
	u64 removing_node;
	u64 removing_kpfn;
	u64 removing_mm;
	u32 node_freed;
	/* the get_ksm_page that has not returned: its thread, and where its own time begins and ends */
	u32 lookup_tid;
	u32 lookup_lost_cpu;
	u64 lookup_begun_ns;
	u64 lookup_ended_ns;
	u64 lookup_waited_ns;
	/* the pass, where no tracepoint tells of it */
	u32 scanning;
	u64 seq;
	u64 skipped;
	/* how often the watchpoint was */
	u64 reached;
	/* how many are about to end the visit, and the pass */
	u32 ending_visit;
	u32 ending_pass;
};
BPF_ARRAY(under_way, struct under_way, 1);

static __always_inline struct under_way *now_under_way(void)
{
	int key = 0;

	return under_way.lookup(&key);
}

static __always_inline void count(int what, u64 by)
{
	u64 *counted = counts.lookup(&what);

	if (counted)
		*counted += by;
}

static __always_inline u64 *slot_of(int histogram, u64 value)
{
	int slot = histogram * HISTOGRAM_SLOTS + (value ? bpf_log2l(value) : 0);

	return histograms.lookup(&slot);
}

static __always_inline void count_slot(int histogram, u64 value)
{
	u64 *counted = slot_of(histogram, value);

	if (counted)
		*counted += 1;
}

/* The same where tasks on several CPUs count. */
static __always_inline void count_shared(int what)
{
	u64 *counted = counts.lookup(&what);

	if (counted)
		__sync_fetch_and_add(counted, 1);
}

static __always_inline void count_shared_slot(int histogram, u64 value)
{
	u64 *counted = slot_of(histogram, value);

	if (counted)
		__sync_fetch_and_add(counted, 1);
}

static __always_inline void count_passage(int function, int way)
{
	int key = function * NR_WAYS + way;
	u64 *counted = passages.lookup(&key);

	if (counted)
		__sync_fetch_and_add(counted, 1);
}

static __always_inline u64 pfn_of(u64 page)
{
#if defined(STRUCT_PAGE_BYTES) && defined(VMEMMAP_BASE_ADDRESS)
	return page ? (page - read_u64(VMEMMAP_BASE_ADDRESS)) / STRUCT_PAGE_BYTES : 0;
#else
	return 0;
#endif
}

static __always_inline u64 mm_of_rmap_item(u64 rmap_item)
{
#ifdef RMAP_ITEM_MM
	return read_u64(rmap_item + RMAP_ITEM_MM);
#else
	return 0;
#endif
}

static __always_inline u64 address_of_rmap_item(u64 rmap_item)
{
#ifdef RMAP_ITEM_ADDRESS
	return read_u64(rmap_item + RMAP_ITEM_ADDRESS);
#else
	return 0;
#endif
}

static __always_inline u64 kpfn_of(u64 stable_node)
{
#ifdef STABLE_NODE_KPFN
	return stable_node ? read_u64(stable_node + STABLE_NODE_KPFN) : 0;
#else
	return 0;
#endif
}

/* Who and where: from the rmap_item, else what is known without one. */
static __always_inline void add_place(struct ksm_event *event, u64 rmap_item, u64 mm, u64 address)
{
	if (rmap_item) {
		add_rmap_item(event, rmap_item);
		mm = mm ? mm : mm_of_rmap_item(rmap_item);
	} else if (address) {
		event->address = address;
		event->flags |= HAS_ADDRESS;
	}
	if (mm)
		pid_is_owner(event, mm);
}

static __always_inline void keep_call(int function, u64 *args, u64 note)
{
	u64 key = (bpf_get_current_pid_tgid() << 32 >> 24) | function;
	struct call call = {};

	call.args[0] = args[0];
	call.args[1] = args[1];
	call.args[2] = args[2];
	call.args[3] = args[3];
	call.entered_ns = bpf_ktime_get_ns();
	call.note = note;
	calls.update(&key, &call);
}

static __always_inline void keep_noted(int function, u64 *args, u64 note)
{
	if (note)
		keep_call(function, args, note);
}

/* How many calls of filtered functions are under way that their entry's body noted. */
BPF_ARRAY(noted_under_way, u64, 1);

static __always_inline void add_noted_under_way(s64 by)
{
	int key = 0;
	u64 *nr = noted_under_way.lookup(&key);

	if (nr)
		__sync_fetch_and_add(nr, by);
}

static __always_inline bool any_noted_under_way(void)
{
	int key = 0;
	u64 *nr = noted_under_way.lookup(&key);

	return nr && *nr;
}

/* For functions that seldom deal with KSM pages: what the body does not note is not even counted. */
static __always_inline void keep_filtered(int function, u64 *args, u64 note)
{
	if (!note)
		return;
	count_passage(function, ENTERED);
	keep_call(function, args, note);
	add_noted_under_way(1);
}

static __always_inline void count_filtered(int function, u64 *args, u64 note)
{
	if (note)
		count_passage(function, ENTERED);
}

/* False where the entry was not seen: the function was under way when we came. */
static __always_inline bool take_call(int function, struct call *call)
{
	u64 key = (bpf_get_current_pid_tgid() << 32 >> 24) | function;
	struct call *kept = calls.lookup(&key);

	if (!kept)
		return false;
	*call = *kept;
	calls.delete(&key);
	return true;
}

static __always_inline bool take_filtered(int function, struct call *call)
{
	if (!any_noted_under_way() || !take_call(function, call))
		return false;
	add_noted_under_way(-1);
	count_passage(function, RETURNED);
	return true;
}

static __always_inline bool is_under_way(int function)
{
	u64 key = (bpf_get_current_pid_tgid() << 32 >> 24) | function;

	return calls.lookup(&key) != NULL;
}

/* ---- ksmd's look at one page ---- */

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

/* ---- merging ---- */

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

/* ---- leaving the trees ---- */

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

/* ---- migration ---- */

/* PAGE_MAPPING_KSM, later FOLIO_MAPPING_KSM: the low two bits of a KSM page's mapping. */
#define MAPPING_KSM 3ULL

static __always_inline u64 node_of_ksm_page(u64 page)
{
#ifdef PAGE_MAPPING
	u64 mapping = read_u64(page + PAGE_MAPPING);

	return (mapping & MAPPING_KSM) == MAPPING_KSM ? mapping & ~MAPPING_KSM : 0;
#else
	return 0;
#endif
}

/*
 * Whoever migrates: (new, old), pages or folios, both locked. It is told of a KSM page only
 * (mm/migrate.c: folio_migrate_flags calls it for every folio from 5.17 on, and it returns at
 * once where there is no stable_node).
 */
static __always_inline u64 enter_ksm_migrate_page(u64 *args)
{
	u64 stable_node = node_of_ksm_page(args[0]);

	return kpfn_of(stable_node ? stable_node : node_of_ksm_page(args[1]));
}

#ifdef EMIT_REMOVE_MIGRATION_PTES
/* The old page, by the new one, until its mappings point to that. */
BPF_TABLE("lru_hash", u64, u64, moved_from, 4096);
#endif

static __always_inline void leave_ksm_migrate_page(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_REMOVE_MIGRATION_PTES
	u64 new_page = args[0];
	u64 old_page = args[1];

	if (node_of_ksm_page(new_page))
		moved_from.update(&new_page, &old_page);
#endif
#ifdef EMIT_KSM_MIGRATE_PAGE
	u64 stable_node = node_of_ksm_page(args[0]);
	struct ksm_event *event;

	if (!stable_node)
		return;
	event = begin(KSM_MIGRATE_PAGE);
	if (!event)
		return;
	event->pfn = pfn_of(args[1]);
	event->new_pfn = pfn_of(args[0]);
	event->stable_node = stable_node;
	event->kpfn_before = call->note;
	event->kpfn_after = kpfn_of(stable_node);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* ---- where there are no tracepoints: mms and passes ---- */

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

/* ---- how the bodies are reached ---- */

/* A program of bcc's that is attached to a function's entry or exit is told by its name. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define FENTRY(function, body, nargs, enter)                                       \
	int JOIN(KFUNC_PREFIX, function)(u64 *ctx)                                 \
	{                                                                          \
		u64 args[6] = {};                                                  \
		if (!is_recording())                                               \
			return 0;                                                  \
		bpf_probe_read_kernel(args, 8 * (nargs), ctx);                     \
		count_passage(FUNCTION_##body, ENTERED);                           \
		enter;                                                             \
		return 0;                                                          \
	}

/* The context holds the arguments, and behind them the result. */
#define FEXIT(function, body, nargs, take)                                         \
	int JOIN(KRETFUNC_PREFIX, function)(u64 *ctx)                              \
	{                                                                          \
		u64 args[7] = {};                                                  \
		struct call call = {};                                             \
		if (!is_recording())                                               \
			return 0;                                                  \
		bpf_probe_read_kernel(args, 8 * ((nargs) + 1), ctx);               \
		count_passage(FUNCTION_##body, RETURNED);                          \
		take;                                                              \
		call.ctx = ctx;                                                    \
		leave_##body(args, args[nargs], &call);                            \
		return 0;                                                          \
	}

/*
 * Without the call that copies the arguments, for what happens once per page or more often. The
 * verifier knows these arguments as pointers: a body may add a constant to them, and no more.
 */
#define FENTRY_DIRECT(function, body, nargs, enter)                                \
	int JOIN(KFUNC_PREFIX, function)(u64 *ctx)                                 \
	{                                                                          \
		u64 args[4];                                                       \
		if (!is_recording())                                               \
			return 0;                                                  \
		DIRECT_ARGUMENTS_##nargs                                           \
		count_passage(FUNCTION_##body, ENTERED);                           \
		enter;                                                             \
		return 0;                                                          \
	}

#define FEXIT_DIRECT(function, body, nargs)                                        \
	int JOIN(KRETFUNC_PREFIX, function)(u64 *ctx)                              \
	{                                                                          \
		u64 args[4];                                                       \
		struct call call = {};                                             \
		if (!is_recording())                                               \
			return 0;                                                  \
		DIRECT_ARGUMENTS_##nargs                                           \
		count_passage(FUNCTION_##body, RETURNED);                          \
		call.ctx = ctx;                                                    \
		leave_##body(args, ctx[nargs], &call);                             \
		return 0;                                                          \
	}

#define DIRECT_ARGUMENTS_1 args[0] = ctx[0];
#define DIRECT_ARGUMENTS_2 DIRECT_ARGUMENTS_1 args[1] = ctx[1];
#define DIRECT_ARGUMENTS_3 DIRECT_ARGUMENTS_2 args[2] = ctx[2];
#define DIRECT_ARGUMENTS_4 DIRECT_ARGUMENTS_3 args[3] = ctx[3];

/* Functions most of whose calls are none of KSM's: see take_filtered. */
#define FENTRY_FILTERED(function, body, nargs, enter)                              \
	int JOIN(KFUNC_PREFIX, function)(u64 *ctx)                                 \
	{                                                                          \
		u64 args[4] = {};                                                  \
		if (!is_recording())                                               \
			return 0;                                                  \
		DIRECT_ARGUMENTS_##nargs                                           \
		enter;                                                             \
		return 0;                                                          \
	}

#define FEXIT_FILTERED(function, body, nargs)                                      \
	int JOIN(KRETFUNC_PREFIX, function)(u64 *ctx)                              \
	{                                                                          \
		struct call call = {};                                             \
		if (!is_recording())                                               \
			return 0;                                                  \
		if (take_filtered(FUNCTION_##body, &call))                         \
			leave_##body(call.args, ctx[nargs], &call);                \
		return 0;                                                          \
	}

#define KENTRY_FILTERED(body, enter)                                               \
	int kentry_##body(struct pt_regs *ctx)                                     \
	{                                                                          \
		u64 args[4] = {ctx->di, ctx->si, ctx->dx, ctx->cx};                \
		if (!is_recording())                                               \
			return 0;                                                  \
		enter;                                                             \
		return 0;                                                          \
	}

#define KEXIT_FILTERED(body)                                                       \
	int kexit_##body(struct pt_regs *ctx)                                      \
	{                                                                          \
		struct call call = {};                                             \
		u64 result = ctx->ax;                                              \
		if (!is_recording())                                               \
			return 0;                                                  \
		if (take_filtered(FUNCTION_##body, &call))                         \
			leave_##body(call.args, result, &call);                    \
		return 0;                                                          \
	}

#define KENTRY(body, enter)                                                        \
	int kentry_##body(struct pt_regs *ctx)                                     \
	{                                                                          \
		u64 args[4] = {ctx->di, ctx->si, ctx->dx, ctx->cx};                \
		if (!is_recording())                                               \
			return 0;                                                  \
		count_passage(FUNCTION_##body, ENTERED);                           \
		enter;                                                             \
		return 0;                                                          \
	}

#define KEXIT(body)                                                                \
	int kexit_##body(struct pt_regs *ctx)                                      \
	{                                                                          \
		struct call call = {};                                             \
		u64 result = ctx->ax;                                              \
		if (!is_recording())                                               \
			return 0;                                                  \
		count_passage(FUNCTION_##body, RETURNED);                          \
		if (take_call(FUNCTION_##body, &call)) {                           \
			call.ctx = ctx;                                            \
			leave_##body(call.args, result, &call);                    \
		}                                                                  \
		return 0;                                                          \
	}

/* Inside ksm_scan_thread, which is ksmd: the values are where the recipe says. */
#define SITE(body, first, second)                                                  \
	int site_##body(struct pt_regs *ctx)                                       \
	{                                                                          \
		u64 args[2] = {first, second};                                     \
		if (!is_recording())                                               \
			return 0;                                                  \
		count_passage(FUNCTION_##body, ENTERED);                           \
		enter_##body(args);                                                \
		return 0;                                                          \
	}
