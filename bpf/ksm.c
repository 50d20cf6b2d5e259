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
int on_ksm_start_scan(struct bpf_raw_tracepoint_args *ctx)
{
	struct ksm_event *event = begin(KSM_START_SCAN);

	if (!event)
		return 0;
	add_pass(event, ctx->args[0], ctx->args[1]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* ksmd, just before ksm_scan.seqnr++, under ksm_thread_mutex: (int seq, u32 rmap_entries). */
int on_ksm_stop_scan(struct bpf_raw_tracepoint_args *ctx)
{
	struct ksm_event *event = begin(KSM_STOP_SCAN);

	if (!event)
		return 0;
	add_pass(event, ctx->args[0], ctx->args[1]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* The end of __ksm_enter, in the task that registers (for fork: the parent): (void *mm). */
int on_ksm_enter(struct bpf_raw_tracepoint_args *ctx)
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
int on_ksm_exit(struct bpf_raw_tracepoint_args *ctx)
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
int on_ksm_merge_one_page(struct bpf_raw_tracepoint_args *ctx)
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
int on_ksm_merge_with_ksm_page(struct bpf_raw_tracepoint_args *ctx)
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
	return 0;
}

/* remove_node_from_stable_tree, before unlinking: (ulong pfn). ksmd, a writer of run, or hotplug. */
int on_ksm_remove_ksm_page(struct bpf_raw_tracepoint_args *ctx)
{
	struct ksm_event *event = begin(KSM_REMOVE_KSM_PAGE);

	if (!event)
		return 0;
	event->pfn = ctx->args[0];
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
	return 0;
}

/* The same function, for each sharer but the node's last: (ulong pfn, void *rmap_item, void *mm). */
int on_ksm_remove_rmap_item(struct bpf_raw_tracepoint_args *ctx)
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
int on_ksm_advisor(struct bpf_raw_tracepoint_args *ctx)
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
