// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the programs on functions of mm/ksm.c share, and those on places inside
 * ksm_scan_thread into which the compiler has inlined such functions: what is
 * under way, what is counted, and how a body is reached. One text with ksm.c;
 * the bodies follow, a file per subject (ksmtrace/capture/bcc_backend.py).
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
