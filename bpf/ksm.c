// SPDX-License-Identifier: GPL-2.0-only
/*
 * The programs on the ksm:* tracepoints, one per kind of event.
 *
 * They are raw tracepoint programs: these cost less than perf-backed ones and
 * get the tracepoint's own arguments (TP_PROTO in include/trace/events/ksm.h).
 *
 * Defines from the plan (ksmtrace/capture/plan.py), each only where known:
 *   RING_PAGES              size of the ring in 4096-byte pages, a power of two
 *   KSMD_PID                ksmd's pid
 *   RMAP_ITEM_ADDRESS, MM_OWNER, TASK_TGID, MM_KSM_MERGING_PAGES,
 *   MM_KSM_RMAP_ITEMS, MM_KSM_ZERO_PAGES, TASK_SUM_EXEC_RUNTIME, TASK_RUN_DELAY
 *                           offsets from the running kernel's BTF
 */
#include "events.h"

/* Submit without waking the consumer: it polls, and a wake-up costs ksmd more
 * than the event does.
 */
#define RB_NO_WAKEUP 1

struct tally {
	u64 produced;
	u64 dropped;
};

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
/*
 * Mapped by the consumer. To read a map with bpf(2) would not only cost more: the kernel runs
 * no kprobe's program on a CPU that is in the middle of such a call, even of a task that has
 * lost the CPU meanwhile (kernel/trace/bpf_trace.c:trace_call_bpf, bpf_prog_active).
 */
#define BPF_MAPPED_ARRAY(name, type, nr) \
	BPF_F_TABLE("array", int, type, name, nr, BPF_F_MMAPABLE)
BPF_MAPPED_ARRAY(tallies, struct tally, NR_KINDS);

/*
 * 1 while all programs are attached. To attach them takes seconds, and what a part of them sees of
 * a ksmd at work contradicts itself: so none does anything before, nor while they are detached.
 */
BPF_MAPPED_ARRAY(all_attached, u64, 1);

static __always_inline bool is_recording(void)
{
	int key = 0;
	u64 *attached = all_attached.lookup(&key);

	return attached && *attached;
}

#define ON_TRACEPOINT(tracepoint)                                                      \
	static __always_inline int take_##tracepoint(struct bpf_raw_tracepoint_args *ctx); \
	int on_##tracepoint(struct bpf_raw_tracepoint_args *ctx)                       \
	{                                                                              \
		return is_recording() ? take_##tracepoint(ctx) : 0;                    \
	}                                                                              \
	static __always_inline int take_##tracepoint(struct bpf_raw_tracepoint_args *ctx)

#if defined(EMIT_PAGE_OUTCOMES) || defined(VISITS_WATCHED)
/* In visits.c. */
static __always_inline void pass_ends(void);
#endif

#ifdef FAILURES_AFTER_THE_FACT
/* In outcomes.c. */
static __always_inline void after_merge(u64 ksm_page, u64 pfn, u64 rmap_item, u64 mm, s64 err);
#endif

/*
 * Reserve a slot and fill the head. NULL where the ring is full: the event is
 * then counted as dropped.
 */
static __always_inline struct ksm_event *begin(u8 kind)
{
	u64 ts_ns = bpf_ktime_get_ns();
	int key = kind;
	struct tally *tally = tallies.lookup(&key);
	struct ksm_event *event;

	if (!tally)
		return NULL;
	__sync_fetch_and_add(&tally->produced, 1);
	event = ring.ringbuf_reserve(sizeof(struct ksm_event));
	if (!event) {
		__sync_fetch_and_add(&tally->dropped, 1);
		return NULL;
	}
	event->ts_ns = ts_ns;
	event->kind = kind;
	event->flags = 0;
	event->err = 0;
	event->pid = bpf_get_current_pid_tgid() >> 32;
	event->body[0] = 0;
	event->body[1] = 0;
	event->body[2] = 0;
	event->body[3] = 0;
	event->body[4] = 0;
#ifdef KSMD_PID
	if (event->pid == KSMD_PID)
		event->flags |= IN_KSMD;
#endif
	return event;
}

static __always_inline bool in_ksmd(void)
{
#ifdef KSMD_PID
	return bpf_get_current_pid_tgid() >> 32 == KSMD_PID;
#else
	return false;
#endif
}

static __always_inline u64 read_u64(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static __always_inline void pid_is_owner(struct ksm_event *event, u64 mm)
{
#if defined(MM_OWNER) && defined(TASK_TGID)
	u64 owner = 0;
	u32 pid = 0;

	bpf_probe_read_kernel(&owner, sizeof(owner), (void *)(mm + MM_OWNER));
	if (owner && !bpf_probe_read_kernel(&pid, sizeof(pid), (void *)(owner + TASK_TGID)) && pid) {
		event->pid = pid;
		event->flags |= PID_IS_OWNER;
	}
#endif
	event->mm = mm;
}

static __always_inline void add_rmap_item(struct ksm_event *event, u64 rmap_item)
{
	event->rmap_item = rmap_item;
#ifdef RMAP_ITEM_ADDRESS
	if (!bpf_probe_read_kernel(&event->address, sizeof(event->address),
				   (void *)(rmap_item + RMAP_ITEM_ADDRESS)))
		event->flags |= HAS_ADDRESS;
#endif
}

static __always_inline void add_mm_counts(struct ksm_event *event, u64 mm)
{
#if defined(MM_KSM_MERGING_PAGES) && defined(MM_KSM_RMAP_ITEMS)
	if (!bpf_probe_read_kernel(&event->ksm_merging_pages, 8,
				   (void *)(mm + MM_KSM_MERGING_PAGES)) &&
	    !bpf_probe_read_kernel(&event->ksm_rmap_items, 8, (void *)(mm + MM_KSM_RMAP_ITEMS)))
		event->flags |= HAS_COUNTS;
#endif
}

static __always_inline void add_pass(struct ksm_event *event, u64 seq, u64 rmap_entries)
{
	event->seq = seq;
	event->rmap_entries = rmap_entries;
#if defined(TASK_SUM_EXEC_RUNTIME) && defined(TASK_RUN_DELAY)
	u64 task = bpf_get_current_task();

	if (!bpf_probe_read_kernel(&event->ksmd_cpu_ns, 8,
				   (void *)(task + TASK_SUM_EXEC_RUNTIME)) &&
	    !bpf_probe_read_kernel(&event->ksmd_run_delay_ns, 8, (void *)(task + TASK_RUN_DELAY)))
		event->flags |= HAS_COUNTS;
#endif
}

/* ksmd, cursor at the head of the mm list, under ksm_thread_mutex: (int seq, u32 rmap_entries). */
ON_TRACEPOINT(ksm_start_scan)
{
	struct ksm_event *event = begin(KSM_START_SCAN);

	if (!event)
		return 0;
	add_pass(event, ctx->args[0], ctx->args[1]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* ksmd, just before ksm_scan.seqnr++, under ksm_thread_mutex: (int seq, u32 rmap_entries). */
ON_TRACEPOINT(ksm_stop_scan)
{
	struct ksm_event *event;

#if defined(EMIT_PAGE_OUTCOMES) || defined(VISITS_WATCHED)
	pass_ends();
#endif
	event = begin(KSM_STOP_SCAN);
	if (!event)
		return 0;
	add_pass(event, ctx->args[0], ctx->args[1]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* The end of __ksm_enter, in the task that registers (for fork: the parent): (void *mm). */
ON_TRACEPOINT(ksm_enter)
{
	struct ksm_event *event = begin(KSM_ENTER);

	if (!event)
		return 0;
	pid_is_owner(event, ctx->args[0]);
	bpf_get_current_comm(event->comm, COMM_BYTES);
	add_mm_counts(event, ctx->args[0]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* The end of __ksm_exit, in whichever task dropped the last reference: (void *mm). */
ON_TRACEPOINT(ksm_exit)
{
	struct ksm_event *event = begin(KSM_EXIT);
	u64 mm = ctx->args[0];

	if (!event)
		return 0;
	pid_is_owner(event, mm);
	add_mm_counts(event, mm);
#ifdef MM_KSM_ZERO_PAGES
	bpf_probe_read_kernel(&event->ksm_zero_pages, 8, (void *)(mm + MM_KSM_ZERO_PAGES));
#endif
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* ksmd, in try_to_merge_with_zero_page: (ulong pfn, void *rmap_item, void *mm, int err). */
ON_TRACEPOINT(ksm_merge_one_page)
{
	struct ksm_event *event = begin(KSM_MERGE_ONE_PAGE);

	if (!event)
		return 0;
	event->err = ctx->args[3];
	event->pfn = ctx->args[0];
	pid_is_owner(event, ctx->args[2]);
	add_rmap_item(event, ctx->args[1]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/*
 * ksmd, every exit of try_to_merge_with_ksm_page, after mmap_read_unlock:
 * (void *ksm_page, ulong pfn, void *rmap_item, void *mm, int err).
 */
ON_TRACEPOINT(ksm_merge_with_ksm_page)
{
	struct ksm_event *event = begin(KSM_MERGE_WITH_KSM_PAGE);

	if (!event)
		return 0;
	event->err = ctx->args[4];
	event->pfn = ctx->args[1];
	event->ksm_page = ctx->args[0];
	pid_is_owner(event, ctx->args[3]);
	add_rmap_item(event, ctx->args[2]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#ifdef FAILURES_AFTER_THE_FACT
	after_merge(ctx->args[0], ctx->args[1], ctx->args[2], ctx->args[3], (s32)ctx->args[4]);
#endif
	return 0;
}

/* remove_node_from_stable_tree, before unlinking: (ulong pfn). ksmd, a writer of run, or hotplug. */
ON_TRACEPOINT(ksm_remove_ksm_page)
{
	struct ksm_event *event = begin(KSM_REMOVE_KSM_PAGE);

	if (!event)
		return 0;
	event->pfn = ctx->args[0];
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* The same function, for each sharer but the node's last: (ulong pfn, void *rmap_item, void *mm). */
ON_TRACEPOINT(ksm_remove_rmap_item)
{
	struct ksm_event *event = begin(KSM_REMOVE_RMAP_ITEM);

	if (!event)
		return 0;
	event->pfn = ctx->args[0];
	pid_is_owner(event, ctx->args[2]);
	add_rmap_item(event, ctx->args[1]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* ksmd, before ksm_stop_scan: (s64 scan_time, ulong pages_to_scan, unsigned int cpu_percent). */
ON_TRACEPOINT(ksm_advisor)
{
	struct ksm_event *event = begin(KSM_ADVISOR);

	if (!event)
		return 0;
	event->scan_time = ctx->args[0];
	event->pages_to_scan = ctx->args[1];
	event->cpu_percent = ctx->args[2];
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}
