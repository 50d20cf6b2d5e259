// SPDX-License-Identifier: GPL-2.0-only
/*
 * Waits for locks that concern KSM, and ksmd's holds. One text with ksm.c.
 *
 * The tracepoints fire for every lock of the system, so each program first
 * asks whether the lock, or the task, is one of KSM's: most end there.
 *
 * Defines from the plan, each only where known or wanted:
 *   EMIT_LOCK_WAIT, EMIT_LOCK_HOLD, EMIT___FOLIO_LOCK, EMIT_RMAP_WALK_KSM,
 *   EMIT_KSM_MEMORY_CALLBACK, EMIT_GET_KSM_PAGE
 *   KSM_THREAD_MUTEX_ADDRESS        the mutex, where kallsyms has objects, else
 *   KSM_TEXT_BEGIN, KSM_TEXT_END, MUTEX_TEXT_BEGIN, MUTEX_TEXT_END
 *                                   by which it is recognised: see called_by_ksm
 *   HOLDS_OF_MMAP_LOCK              programs on mmap_lock:* say when ksmd holds one
 *   offsets of struct mutex, rw_semaphore, mm_struct and task_struct
 */

/* flags of contention_begin: LCB_F_* (include/trace/events/lock.h). */
#define LCB_SPIN 1
#define LCB_READ 2
#define LCB_WRITE 4
#define LCB_RT 8
#define LCB_PERCPU 16
#define LCB_MUTEX 32

/* The low bits of an owner are flags, in a mutex and in an rw_semaphore. */
#define OWNER_MASK (~7ULL)
#define RWSEM_READER_OWNED 1ULL
#define PF_EXITING 4
#define TASK_INTERRUPTIBLE 1

enum { LOCK_WAITED, LOCK_HELD, NR_LOCK_SIDES };
enum { TALLY_TIMES, TALLY_TOTAL_NS, TALLY_WORST_NS, NR_LOCK_TALLIES };
#define LOCK_SLOTS 64
BPF_MAPPED_ARRAY(lock_tallies, u64, NR_LOCKS * NR_LOCK_SIDES * NR_LOCK_TALLIES);
BPF_MAPPED_ARRAY(lock_histograms, u64, NR_LOCKS * NR_LOCK_SIDES * LOCK_SLOTS);
/* bcc's BPF_STACK_TRACE rounds its size with a function of the kernel's headers. */
BPF_TABLE("stacktrace", int, struct bpf_stacktrace, stacks, 1024);

/* A wait under way, by the waiting thread. */
struct lock_wait {
	u64 lock_address;
	u64 begun_ns;
	u32 holder_pid;
	u8 lock;
	u8 flags;
};
BPF_HASH(lock_waits, u32, struct lock_wait, 8192);

struct locking {
	/* how many are in lock_waits: mostly none, and then no end of a wait is looked up */
	s64 nr_waits;
	u64 ksm_thread_mutex;
	/* the one mmap_lock that ksmd holds: it never holds two */
	u64 held_address;
	u64 held_since_ns;
	u32 held_waiters;
	/* ksmd's batch */
	u32 batch_waiters;
	u64 batch_since_ns;
	u64 ksmd_task;
	u32 asleep;
};
BPF_ARRAY(locking, struct locking, 1);

static __always_inline struct locking *now_locking(void)
{
	int key = 0;

	return locking.lookup(&key);
}

/*
 * Count a wait or a hold that is over. True where it is at least half as long as the longest so
 * far: such ones are worth a stack.
 */
static __always_inline bool count_lock(u8 lock, int side, u64 duration_ns)
{
	int first = (lock * NR_LOCK_SIDES + side) * NR_LOCK_TALLIES;
	int slot = (lock * NR_LOCK_SIDES + side) * LOCK_SLOTS +
		   (duration_ns ? bpf_log2l(duration_ns) : 0);
	int key = first + TALLY_TIMES;
	u64 *counted = lock_tallies.lookup(&key);
	u64 worst_ns;

	if (counted)
		__sync_fetch_and_add(counted, 1);
	key = first + TALLY_TOTAL_NS;
	counted = lock_tallies.lookup(&key);
	if (counted)
		__sync_fetch_and_add(counted, duration_ns);
	counted = lock_histograms.lookup(&slot);
	if (counted)
		__sync_fetch_and_add(counted, 1);
	key = first + TALLY_WORST_NS;
	counted = lock_tallies.lookup(&key);
	if (!counted)
		return false;
	worst_ns = *counted;
	if (duration_ns > worst_ns)
		*counted = duration_ns;
	return duration_ns >= worst_ns / 2;
}

/* ---- waits ---- */

#ifdef EMIT_LOCK_WAIT

/* The task that a lock names as its owner, 0 where there is none. */
static __always_inline u64 owner_of(u64 lock_address, bool is_mutex)
{
	u64 owner = 0;

	if (is_mutex) {
#ifdef MUTEX_OWNER
		owner = read_u64(lock_address + MUTEX_OWNER);
#endif
	} else {
#ifdef RWSEM_OWNER
		owner = read_u64(lock_address + RWSEM_OWNER);
#endif
	}
	return owner;
}

static __always_inline u32 tgid_of(u64 task)
{
	u32 pid = 0;

#ifdef TASK_TGID
	if (task)
		bpf_probe_read_kernel(&pid, sizeof(pid), (void *)(task + TASK_TGID));
#endif
	return pid;
}

static __always_inline bool is_ksmd(u32 pid)
{
#ifdef KSMD_PID
	return pid == KSMD_PID;
#else
	return false;
#endif
}

/*
 * Whether it was mm/ksm.c that called mutex_lock: it has one mutex only. In the stack, its
 * function comes right behind those of kernel/locking/mutex.c.
 */
static __always_inline bool called_by_ksm(void *ctx)
{
#if !defined(KSM_THREAD_MUTEX_ADDRESS) && defined(KSM_TEXT_BEGIN) && defined(KSM_TEXT_END) && \
	defined(MUTEX_TEXT_BEGIN) && defined(MUTEX_TEXT_END)
	u64 frames[8] = {};
	bool locks = false;
	int i;

	if (bpf_get_stack(ctx, frames, sizeof(frames), 0) < 0)
		return false;
#pragma unroll
	for (i = 0; i < 8; i++) {
		if (frames[i] >= MUTEX_TEXT_BEGIN && frames[i] < MUTEX_TEXT_END)
			locks = true;
		else if (locks)
			return frames[i] >= KSM_TEXT_BEGIN && frames[i] < KSM_TEXT_END;
	}
#endif
	return false;
}

static __always_inline bool is_ksm_thread_mutex(void *ctx, struct locking *at, u64 lock_address,
						u32 owner_pid)
{
#ifdef KSM_THREAD_MUTEX_ADDRESS
	return lock_address == KSM_THREAD_MUTEX_ADDRESS;
#else
	if (at->ksm_thread_mutex)
		return lock_address == at->ksm_thread_mutex;
	/* Not met yet. ksmd has a part in nearly every wait for it. */
	if (!in_ksmd() && !is_ksmd(owner_pid))
		return false;
	if (!called_by_ksm(ctx))
		return false;
	at->ksm_thread_mutex = lock_address;
	return true;
#endif
}

static __always_inline bool begin_mutex_wait(void *ctx, struct locking *at, u64 lock_address,
					     struct lock_wait *wait)
{
	u64 owner;

#ifdef KSM_THREAD_MUTEX_ADDRESS
	if (lock_address != KSM_THREAD_MUTEX_ADDRESS && !in_ksmd())
		return false;
#else
	if (at->ksm_thread_mutex && lock_address != at->ksm_thread_mutex && !in_ksmd())
		return false;
#endif
	owner = owner_of(lock_address, true) & OWNER_MASK;
	wait->holder_pid = tgid_of(owner);
	if (is_ksm_thread_mutex(ctx, at, lock_address, wait->holder_pid))
		wait->lock = LOCK_KSM_THREAD_MUTEX;
	else if (in_ksmd())
		wait->lock = LOCK_OTHER;
	else
		return false;
	wait->flags = WAIT_EXCLUSIVE;
	if (wait->holder_pid)
		wait->flags |= WAIT_HOLDER_OWNS;
	if (wait->lock == LOCK_KSM_THREAD_MUTEX && is_ksmd(wait->holder_pid))
		__sync_fetch_and_add(&at->batch_waiters, 1);
	return true;
}

/* Whether the task is in the middle of a walk, which takes the locks of anon_vmas. */
static __always_inline bool in_rmap_walk_ksm(void)
{
#ifdef EMIT_RMAP_WALK_KSM
	return is_under_way(FUNCTION_rmap_walk_ksm);
#else
	return false;
#endif
}

/* Whether the task is in __ksm_exit, which takes the mmap_lock only to wait until ksmd is gone. */
static __always_inline bool in___ksm_exit(void)
{
#ifdef WITH___KSM_EXIT
	return is_under_way(FUNCTION___ksm_exit);
#else
	return false;
#endif
}

static __always_inline bool begin_rwsem_wait(struct locking *at, u64 lock_address, u32 how,
					     struct lock_wait *wait)
{
	bool held = at->held_address == lock_address;
	bool walks = !held && in_rmap_walk_ksm();
	bool leaves = !held && !walks && in___ksm_exit();
	u64 owner;

	/*
	 * ksmd takes each mmap_lock to read, and no other rw_semaphore; an anon_vma's to write,
	 * to split a huge page (mm/huge_memory.c).
	 */
	if (in_ksmd())
		wait->lock = how & LCB_READ ? LOCK_MMAP_LOCK : LOCK_ANON_VMA;
	else if (held || leaves)
		wait->lock = LOCK_MMAP_LOCK;
	else if (walks)
		wait->lock = LOCK_ANON_VMA;
	owner = owner_of(lock_address, false);
	wait->holder_pid = tgid_of(owner & OWNER_MASK);
	/* ksmd may hold it unseen: then it was the last to read. */
	if (!in_ksmd() && !held && !walks && !leaves) {
		if (!is_ksmd(wait->holder_pid))
			return false;
		wait->lock = owner & RWSEM_READER_OWNED ? LOCK_MMAP_LOCK : LOCK_ANON_VMA;
	}
	wait->flags = how & LCB_WRITE ? WAIT_EXCLUSIVE : 0;
	if (held && !in_ksmd()) {
		wait->flags |= WAIT_KSMD_HELD;
		__sync_fetch_and_add(&at->held_waiters, 1);
#ifdef KSMD_PID
		wait->holder_pid = KSMD_PID;
#endif
	} else if (leaves || (owner & OWNER_MASK) == bpf_get_current_task()) {
		/* It was itself the last to read, and has left; for an exit see kernel/exit.c:exit_mm. */
		wait->holder_pid = 0;
	} else if (wait->holder_pid) {
		wait->flags |= owner & RWSEM_READER_OWNED ? WAIT_HOLDER_READ_LAST :
							    WAIT_HOLDER_OWNS;
	}
	return true;
}

static __always_inline bool begin_lock_wait(void *ctx, u64 lock_address, u32 how)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct lock_wait wait = {};
	struct lock_wait *known;
	struct locking *at;

	/* Spinning alone is no wait of these; for a mutex it is how one begins. */
	if (!(how & LCB_MUTEX) && (how & (LCB_SPIN | LCB_PERCPU | LCB_RT)))
		return false;
	if (!(how & (LCB_MUTEX | LCB_READ | LCB_WRITE)))
		return false;
	at = now_locking();
	if (!at)
		return false;
	if (at->nr_waits > 0) {
		/* A mutex tells of each spell of spinning and sleeping anew. */
		known = lock_waits.lookup(&tid);
		if (known && known->lock_address == lock_address)
			return false;
	}
	if (how & LCB_MUTEX) {
		if (!begin_mutex_wait(ctx, at, lock_address, &wait))
			return false;
	} else if (!begin_rwsem_wait(at, lock_address, how, &wait)) {
		return false;
	}
	wait.lock_address = lock_address;
	wait.begun_ns = bpf_ktime_get_ns();
	if (!lock_waits.insert(&tid, &wait))
		__sync_fetch_and_add(&at->nr_waits, 1);
	else
		lock_waits.update(&tid, &wait);
	return true;
}

static __always_inline void end_lock_wait(void *ctx, u64 lock_address, s32 err)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct locking *at = now_locking();
	struct lock_wait *known;
	struct lock_wait wait;
	struct ksm_event *event;
	u64 duration_ns;
	u32 task_flags = 0;
	s16 stack = -1;

	if (!at || at->nr_waits <= 0)
		return;
	known = lock_waits.lookup(&tid);
	if (!known || known->lock_address != lock_address)
		return;
	wait = *known;
	lock_waits.delete(&tid);
	__sync_fetch_and_add(&at->nr_waits, -1);
	duration_ns = bpf_ktime_get_ns() - wait.begun_ns;
	if (count_lock(wait.lock, LOCK_WAITED, duration_ns))
		stack = stacks.get_stackid(ctx, 0);
	if (wait.lock == LOCK_KSM_THREAD_MUTEX && in_ksmd()) {
		/* Its batch begins only now. */
		at->batch_since_ns = bpf_ktime_get_ns();
		at->batch_waiters = 0;
	}
#ifdef TASK_FLAGS
	bpf_probe_read_kernel(&task_flags, sizeof(task_flags),
			      (void *)(bpf_get_current_task() + TASK_FLAGS));
#endif
	event = begin(LOCK_WAIT);
	if (!event)
		return;
	event->err = err;
	event->lock_address = lock_address;
	bpf_get_current_comm(event->comm, COMM_BYTES);
	event->holder_pid = wait.holder_pid;
	event->stack = stack;
	event->lock = wait.lock;
	event->lock_flags = wait.flags | (task_flags & PF_EXITING ? WAIT_EXITING : 0);
	event->duration_ns = duration_ns;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
}

/* Whoever waits: (void *lock, unsigned int flags). */
ON_TRACEPOINT(contention_begin)
{
	begin_lock_wait(ctx, ctx->args[0], ctx->args[1]);
	return 0;
}

/* The same task, when it has the lock or gives up: (void *lock, int ret). */
ON_TRACEPOINT(contention_end)
{
	end_lock_wait(ctx, ctx->args[0], ctx->args[1]);
	return 0;
}
#endif

#if defined(NR_FUNCTIONS) && defined(EMIT_LOCK_WAIT)
/* The slow paths themselves, where they have no tracepoints: (lock), (sem, ...), (sem, ...). */
static __always_inline u64 enter___mutex_lock_slowpath(u64 *args)
{
	return begin_lock_wait(NULL, args[0], LCB_MUTEX);
}

static __always_inline void leave___mutex_lock_slowpath(u64 *args, u64 result, struct call *call)
{
	if (call->note)
		end_lock_wait(call->ctx, args[0], 0);
}

static __always_inline u64 enter_rwsem_down_read_slowpath(u64 *args)
{
	return begin_lock_wait(NULL, args[0], LCB_READ);
}

static __always_inline void leave_rwsem_down_read_slowpath(u64 *args, u64 result,
							   struct call *call)
{
	if (call->note)
		end_lock_wait(call->ctx, args[0], 0);
}

static __always_inline u64 enter_rwsem_down_write_slowpath(u64 *args)
{
	return begin_lock_wait(NULL, args[0], LCB_WRITE);
}

static __always_inline void leave_rwsem_down_write_slowpath(u64 *args, u64 result,
							    struct call *call)
{
	if (call->note)
		end_lock_wait(call->ctx, args[0], 0);
}
#endif

/* ---- ksmd's holds ---- */

#ifdef EMIT_LOCK_HOLD
static __always_inline void end_hold(void *ctx, u8 lock, u64 lock_address, u64 since_ns,
				     u32 waiters)
{
	u64 duration_ns = bpf_ktime_get_ns() - since_ns;
	bool is_long = count_lock(lock, LOCK_HELD, duration_ns);
	struct ksm_event *event;

	if (!is_long && !waiters)
		return;
	event = begin(LOCK_HOLD);
	if (!event)
		return;
	event->lock_address = lock_address;
	event->waiters = waiters;
	event->stack = is_long ? stacks.get_stackid(ctx, 0) : -1;
	event->lock = lock;
	event->lock_flags = lock == LOCK_KSM_THREAD_MUTEX ? WAIT_EXCLUSIVE : 0;
	event->duration_ns = duration_ns;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
}

#if defined(HOLDS_OF_MMAP_LOCK) && defined(MM_MMAP_LOCK)
/* Whoever has taken an mmap_lock: (struct mm_struct *mm, bool write, bool success). */
ON_TRACEPOINT(mmap_lock_acquire_returned)
{
	struct locking *at;

	if (!in_ksmd())
		return 0;
	at = now_locking();
	if (!at || !(u8)ctx->args[2])
		return 0;
	at->held_waiters = 0;
	at->held_since_ns = bpf_ktime_get_ns();
	at->held_address = ctx->args[0] + MM_MMAP_LOCK;
	return 0;
}

/* Whoever is about to release one: (struct mm_struct *mm, bool write). */
ON_TRACEPOINT(mmap_lock_released)
{
	struct locking *at;
	u64 lock_address = ctx->args[0] + MM_MMAP_LOCK;

	if (!in_ksmd())
		return 0;
	at = now_locking();
	if (!at || at->held_address != lock_address)
		return 0;
	at->held_address = 0;
	end_hold(ctx, LOCK_MMAP_LOCK, lock_address, at->held_since_ns, at->held_waiters);
	return 0;
}
#endif
#endif

/*
 * (bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int prev_state),
 * in prev's context: ksmd leaves its CPU, or gets one.
 */
ON_TRACEPOINT(sched_switch)
{
	struct locking *at;

#ifdef EMIT_GET_KSM_PAGE
	struct under_way *lookup = now_under_way();

	if (lookup && lookup->lookup_tid &&
	    lookup->lookup_tid == (u32)bpf_get_current_pid_tgid())
		lookup->lookup_lost_cpu = 1;
#endif
#ifdef EMIT_LOCK_HOLD
	at = now_locking();
	if (!at)
		return 0;
	/* It sleeps interruptibly after a batch, and nowhere in one (mm/ksm.c:ksm_scan_thread). */
	if (at->asleep && ctx->args[2] == at->ksmd_task) {
		at->asleep = 0;
		at->batch_waiters = 0;
		at->batch_since_ns = bpf_ktime_get_ns();
	}
#endif
	if (!in_ksmd())
		return 0;
#ifdef SCAN_ENDS_AT_SWITCH
	struct under_way *scanning = now_under_way();

	/* Right after a pass it leaves its CPU, so the end is seen a few microseconds late. */
	if (scanning)
		stop_scan_if_over(scanning);
#endif
#if defined(EMIT_LOCK_HOLD) || defined(VISITS_WATCHED)
	if ((ctx->args[0] & 1) || !(ctx->args[3] & TASK_INTERRUPTIBLE))
		return 0;
#endif
#ifdef VISITS_WATCHED
	struct under_way *visiting = now_under_way();

	/* Else a writer to run may free the rmap_item before ksmd goes on. */
	if (visiting)
		end_visit_once(visiting);
#endif
#ifdef EMIT_LOCK_HOLD
	at->ksmd_task = ctx->args[1];
	at->asleep = 1;
	if (!at->batch_since_ns)
		return 0;
	end_hold(ctx, LOCK_KSM_THREAD_MUTEX, at->ksm_thread_mutex, at->batch_since_ns,
		 at->batch_waiters);
	at->batch_since_ns = 0;
#endif
	return 0;
}

/* ---- functions ---- */

#ifdef NR_FUNCTIONS
/* Whoever waits: (struct folio *), before 5.16 (struct page *); a KSM page is no part of one. */
static __always_inline u64 enter___folio_lock(u64 *args)
{
	return in_ksmd() || node_of_ksm_page(args[0]);
}

static __always_inline void leave___folio_lock(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT___FOLIO_LOCK
	u64 duration_ns = bpf_ktime_get_ns() - call->entered_ns;
	struct ksm_event *event;
	s16 stack = -1;

	if (!call->note)
		return;
#ifdef EMIT_GET_KSM_PAGE
	struct under_way *at = now_under_way();

	/* It may have lost its CPU only for the lock. */
	if (at && at->lookup_tid == (u32)bpf_get_current_pid_tgid()) {
		at->lookup_waited_ns += duration_ns;
		at->lookup_lost_cpu = 0;
	}
#endif
	if (count_lock(LOCK_FOLIO, LOCK_WAITED, duration_ns))
		stack = stacks.get_stackid(call->ctx, 0);
	event = begin(__FOLIO_LOCK);
	if (!event)
		return;
	event->lock_address = args[0];
	bpf_get_current_comm(event->comm, COMM_BYTES);
	event->stack = stack;
	event->lock = LOCK_FOLIO;
	event->lock_flags = WAIT_EXCLUSIVE;
	event->duration_ns = duration_ns;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* A look-up that spends this time by itself has spun, or an interrupt has come in between. */
#define LONG_LOOKUP_NS 20000

static __always_inline void end_lookup(u64 stable_node, s64 result, struct call *call)
{
#ifdef EMIT_GET_KSM_PAGE
	struct under_way *at = now_under_way();
	u64 now_ns = bpf_ktime_get_ns();
	struct ksm_event *event;
	u64 duration_ns;
	s16 stack = -1;

	if (!at || at->lookup_tid != (u32)bpf_get_current_pid_tgid())
		return;
	at->lookup_tid = 0;
	duration_ns = (at->lookup_ended_ns ? at->lookup_ended_ns : now_ns) - at->lookup_begun_ns -
		      at->lookup_waited_ns;
	count_slot(HISTOGRAM_GET_KSM_PAGE_NS, duration_ns);
	if (duration_ns < LONG_LOOKUP_NS || at->lookup_lost_cpu)
		return;
	if (count_lock(LOCK_REFCOUNT, LOCK_WAITED, duration_ns))
		stack = stacks.get_stackid(call->ctx, 0);
	event = begin(GET_KSM_PAGE);
	if (!event)
		return;
	if (result == -EBUSY)
		event->err = -EBUSY;
	event->lock_address = stable_node;
	bpf_get_current_comm(event->comm, COMM_BYTES);
	event->stack = stack;
	event->lock = LOCK_REFCOUNT;
	event->lock_flags = WAIT_EXCLUSIVE;
	event->duration_ns = duration_ns;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* Whoever looks for the mappings of a KSM page: (page or folio, rwc). One more than the sharers. */
static __always_inline u64 enter_rmap_walk_ksm(u64 *args)
{
#ifdef STABLE_NODE_LENGTH
	u64 stable_node = node_of_ksm_page(args[0]);
	s32 sharers = 0;

	if (stable_node && !bpf_probe_read_kernel(&sharers, sizeof(sharers),
						  (void *)(stable_node + STABLE_NODE_LENGTH)))
		return sharers + 1;
#endif
	return 0;
}

static __always_inline void leave_rmap_walk_ksm(u64 *args, u64 result, struct call *call)
{
	mappings_are_back(args[0]);
#ifdef EMIT_RMAP_WALK_KSM
	struct ksm_event *event;

	if (!call->entered_ns)
		return;
	event = begin(RMAP_WALK_KSM);
	if (!event)
		return;
	event->sharers = call->note - 1;
	bpf_get_current_comm(event->comm, COMM_BYTES);
	event->pfn = pfn_of(args[0]);
	event->duration_ns = event->ts_ns - call->entered_ns;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* Whoever takes memory offline or online: (nb, unsigned long action, arg). */
static __always_inline void leave_ksm_memory_callback(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_KSM_MEMORY_CALLBACK
	struct ksm_event *event = begin(KSM_MEMORY_CALLBACK);

	if (!event)
		return;
	event->action = args[1];
	bpf_get_current_comm(event->comm, COMM_BYTES);
	event->duration_ns = call->entered_ns ? event->ts_ns - call->entered_ns : 0;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}
#endif
