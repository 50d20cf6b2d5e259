// SPDX-License-Identifier: GPL-2.0-only
/*
 * The programs on what KSM costs others: copies of KSM pages on write and at swap-in, merges
 * that ksmd undoes, migrations, and huge pages that ksmd splits. One text with functions.c,
 * whose bodies and macros these follow.
 *
 * Defines from the plan besides those of functions.c:
 *   PTE_PFN_MASK, PTE_PRESENT, PTE_DIRTY
 *                           bits of a page table entry
 *   PHYSICAL_MASK_ADDRESS   the kernel's physical_mask, where it has that variable
 *   FAULT_VMA, FAULT_ADDRESS, FAULT_FLAGS, FAULT_PTE, PAGE_LRU
 *                           offsets from the running kernel's BTF
 */

#define EAGAIN 11
#define ENOMEM 12
#define EFAULT 14
#define MAX_ERRNO 4095
#define PAGE_SHIFT 12

/* enum fault_flag and vm_fault_reason (include/linux/mm_types.h), the same from 5.10 to 7.3. */
#define FAULT_FLAG_USER 0x40
#define FAULT_FLAG_REMOTE 0x80
#define VM_FAULT_OOM 0x1
#define VM_FAULT_RETRY 0x400
#define VM_FAULT_ERROR 0x873

/* ---- copies on write ---- */

/*
 * Any task, for any write-protected page: (struct vm_fault *). Its page is not looked up yet, so
 * we do that. What is no KSM page costs four reads. On return args are what leave_do_wp_page
 * needs, because the vma may be gone by then: mm, address, cause.
 */
static __always_inline u64 enter_do_wp_page(u64 *args)
{
#ifdef EMIT_DO_WP_PAGE
	u64 fault = args[0];
	u64 pte = read_u64(fault + FAULT_PTE);
	/* Under PROT_NONE the frame's address is inverted (asm/pgtable-invert.h). */
	u64 frame = (pte & PTE_PRESENT ? pte : ~pte) & PTE_PFN_MASK;
	u64 mapping = 0;
	u32 flags = 0;
	u64 page;

#ifdef PHYSICAL_MASK_ADDRESS
	frame &= read_u64(PHYSICAL_MASK_ADDRESS);
#endif
	page = read_u64(VMEMMAP_BASE_ADDRESS) + (frame >> PAGE_SHIFT) * STRUCT_PAGE_BYTES;
	if (bpf_probe_read_kernel(&mapping, sizeof(mapping), (void *)(page + PAGE_MAPPING)))
		return 0;
	if (!mapping) {
		/* Of what has no mapping, only KSM's zero pages are dirty (include/linux/ksm.h). */
		if (pte & PTE_DIRTY)
			count_shared(COUNT_ZERO_PAGE_COWS);
		return 0;
	}
	/* A part of a huge page has something else in the place of its mapping. */
	if ((mapping & MAPPING_KSM) != MAPPING_KSM || read_u64(page + PAGE_LRU) & 1)
		return 0;
	bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(fault + FAULT_FLAGS));
	args[1] = read_u64(fault + FAULT_ADDRESS);
	args[0] = read_u64(read_u64(fault + FAULT_VMA) + VMA_MM);
	if (is_under_way(FUNCTION_break_ksm))
		args[2] = COW_UNMERGE;
	else if (flags & FAULT_FLAG_REMOTE)
		args[2] = COW_REMOTE;
	else
		args[2] = flags & FAULT_FLAG_USER ? COW_WRITE : COW_KERNEL;
	return frame >> PAGE_SHIFT;
#else
	return 0;
#endif
}

static __always_inline void leave_do_wp_page(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_DO_WP_PAGE
	struct ksm_event *event;
	u32 fault = result;

	/* Not between begin and the question whether it gave one: 6.1 would forget the answer. */
	count_shared_slot(HISTOGRAM_COW_NS, bpf_ktime_get_ns() - call->entered_ns);
	event = begin(DO_WP_PAGE);
	if (!event)
		return;
	if (fault & VM_FAULT_OOM)
		event->err = -ENOMEM;
	else if (fault & VM_FAULT_ERROR)
		event->err = -EFAULT;
	else if (fault & VM_FAULT_RETRY)
		event->err = -EAGAIN;
	event->task_pid = event->pid;
	event->cause = args[2];
	event->address = args[1] & ADDRESS_MASK;
	event->flags |= HAS_ADDRESS;
	event->pfn = call->note;
	event->duration_ns = event->ts_ns - call->entered_ns;
	pid_is_owner(event, args[0]);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* ksmd: (rmap_item). */
static __always_inline void leave_break_cow(u64 *args, u64 result, struct call *call)
{
#ifdef EMIT_BREAK_COW
	struct ksm_event *event = begin(BREAK_COW);

	if (!event)
		return;
	event->duration_ns = call->entered_ns ? event->ts_ns - call->entered_ns : 0;
	add_place(event, args[0], 0, 0);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* ---- swap-in ---- */

/* Whoever swaps in: (page or folio, vma, address); the same page, another, NULL, or an error. */
static __always_inline void leave_ksm_might_need_to_copy(u64 *args, u64 result,
							 struct call *call)
{
#ifdef EMIT_KSM_MIGHT_NEED_TO_COPY
	struct ksm_event *event;

	if (result == args[0])
		return;
	event = begin(KSM_MIGHT_NEED_TO_COPY);
	if (!event)
		return;
	if (!result)
		event->err = -ENOMEM;
	else if (result >= (u64)-MAX_ERRNO)
		event->err = result;
	event->task_pid = event->pid;
	event->address = args[2] & ADDRESS_MASK;
	event->flags |= HAS_ADDRESS;
	event->pfn = pfn_of(args[0]);
#ifdef VMA_MM
	pid_is_owner(event, read_u64(args[1] + VMA_MM));
#endif
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}

/* ---- migration: how long nobody can get at the page ---- */

/* When the mappings of a KSM page were taken away, by its address. */
BPF_TABLE("lru_hash", u64, u64, unmapped_ns, 4096);

/* Whoever migrates or (before 5.14) reclaims: (page or folio, flags), locked. */
static __always_inline u64 enter_try_to_migrate(u64 *args)
{
	u64 mapping = 0;
	u64 page = args[0];
	u64 now_ns;

#ifdef PAGE_MAPPING
	mapping = read_u64(page + PAGE_MAPPING);
#endif
	if ((mapping & MAPPING_KSM) != MAPPING_KSM)
		return 0;
	now_ns = bpf_ktime_get_ns();
	unmapped_ns.update(&page, &now_ns);
	return 1;
}

/*
 * A KSM page has been walked over: (page or folio), locked. The first walk after a move is that of
 * mm/migrate.c:remove_migration_ptes, whose call there the compiler may have inlined.
 */
static __always_inline void mappings_are_back(u64 page)
{
#ifdef EMIT_REMOVE_MIGRATION_PTES
	u64 *old_page = moved_from.lookup(&page);
	struct ksm_event *event;
	u64 stable_node;
	u64 *since_ns;
	u64 from;

	/* Nearly every walk is another: reclaim's, or one that takes mappings away. */
	if (!old_page)
		return;
	from = *old_page;
	moved_from.delete(&page);
	stable_node = node_of_ksm_page(page);
	since_ns = unmapped_ns.lookup(&from);
	if (!stable_node || !since_ns)
		return;
	event = begin(REMOVE_MIGRATION_PTES);
	if (event) {
		event->duration_ns = event->ts_ns - *since_ns;
		event->pfn = pfn_of(from);
		event->new_pfn = pfn_of(page);
		event->task_pid = event->pid;
#ifdef STABLE_NODE_LENGTH
		bpf_probe_read_kernel(&event->sharers, 4,
				      (void *)(stable_node + STABLE_NODE_LENGTH));
#endif
		ring.ringbuf_submit(event, RB_NO_WAKEUP);
	}
	unmapped_ns.delete(&from);
#endif
}

/* ---- huge pages ---- */

/* (page, list[, order]), of which ksmd's calls alone are meant; 0, or a negative errno. */
static __always_inline u64 enter_split_huge_page_to_list(u64 *args)
{
	return in_ksmd() ? args[0] : 0;
}

static __always_inline void leave_split_huge_page_to_list(u64 *args, u64 result,
							  struct call *call)
{
#ifdef WITH_SPLIT_HUGE_PAGE_TO_LIST
	if (call->note)
		split_ends((s32)result);
#endif
#ifdef EMIT_SPLIT_HUGE_PAGE_TO_LIST
	struct under_way *at = now_under_way();
	struct ksm_event *event;

	if (!call->note)
		return;
	event = begin(SPLIT_HUGE_PAGE_TO_LIST);
	if (!event)
		return;
	event->err = result;
	event->pfn = pfn_of(call->note);
	event->duration_ns = event->ts_ns - call->entered_ns;
	if (at && at->merging)
		add_place(event, at->merging, 0, 0);
	else if (at && at->looking)
		add_place(event, at->rmap_item, at->mm, at->address);
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
#endif
}
