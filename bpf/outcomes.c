// SPDX-License-Identifier: GPL-2.0-only
/*
 * Why a merge failed: what can be seen of try_to_merge_with_ksm_page on its way, and
 * of the page. One text with ksm.c and functions.c, between the two.
 *
 * Defines from the plan, each only where known or wanted:
 *   EMIT_MERGE_FAILURE                      the event is wanted
 *   FAILURES_AFTER_THE_FACT                 there is no program on any function: see on_failure
 *   WITH_MM_FIND_PMD                        there is a program on it
 *   PG_HEAD                                 number of that bit in page.flags
 *   PTE_PFN_MASK                            the part of a page table's entry that is an address
 *   offsets as in ksm.c
 */

/* ksmd and ksmd alone merges. */
struct evidence {
	/* the page that a merge is tried of; 0: none is under way */
	u64 page;
	u32 steps;
	u32 page_flags;
	s32 refcount;
	s32 mapcount;
	u32 order;
	s32 split_err;
};
BPF_ARRAY(evidences, struct evidence, 1);

static __always_inline struct evidence *evidence_at_hand(void)
{
	int key = 0;

	return evidences.lookup(&key);
}

#if defined(PAGE_FLAGS) && defined(PAGE_REFCOUNT) && defined(PAGE_MAPCOUNT) && \
	defined(PAGE_LRU)
/* PAGE_MAPPING_ANON, later FOLIO_MAPPING_ANON. */
#define MAPPING_ANON 1ULL
/* What the struct pages of one folio take at most. */
#define LARGEST_FOLIO_BYTES (1ULL << 24)

static __always_inline s32 read_s32(u64 address)
{
	s32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

/*
 * Over page.lru lies compound_head: a tail page has bit 0 set, and in the rest the address of the
 * first page, or in newer kernels a mask that gives it (include/linux/page-flags.h:_compound_head).
 */
static __always_inline u64 first_page_of(u64 page)
{
	u64 head = read_u64(page + PAGE_LRU);

	if (!(head & 1))
		return page;
	if (head - 1 <= page && page - (head - 1) < LARGEST_FOLIO_BYTES)
		return head - 1;
	return page & head;
}

static __always_inline void read_page(struct evidence *evidence, u64 page)
{
	u64 first = first_page_of(page);
	u8 order = 0;

	evidence->page_flags = read_s32(first + PAGE_FLAGS);
	evidence->refcount = read_s32(first + PAGE_REFCOUNT);
	evidence->mapcount = 0;
	evidence->order = 0;
	evidence->steps |= STEP_PAGE_KNOWN;
	evidence->steps &= ~(STEP_AT_ENTRY | STEP_MAPCOUNT_KNOWN | STEP_NOT_ANONYMOUS);
#ifdef PAGE_MAPPING
	if (!(read_u64(first + PAGE_MAPPING) & MAPPING_ANON))
		evidence->steps |= STEP_NOT_ANONYMOUS;
#endif
#ifdef PG_HEAD
	if (evidence->page_flags & (1U << PG_HEAD)) {
#if defined(FOLIO_ORDER)
		bpf_probe_read_kernel(&order, 1, (void *)(first + FOLIO_ORDER));
#elif defined(PAGE_COMPOUND_ORDER) && defined(STRUCT_PAGE_BYTES)
		bpf_probe_read_kernel(&order, 1,
				      (void *)(first + STRUCT_PAGE_BYTES + PAGE_COMPOUND_ORDER));
#elif defined(FOLIO_FLAGS_1)
		/* Its low 8 bits (include/linux/mm.h:folio_large_order). */
		bpf_probe_read_kernel(&order, 1, (void *)(first + FOLIO_FLAGS_1));
#endif
		evidence->order = order;
#ifdef FOLIO_LARGE_MAPCOUNT
		evidence->mapcount = read_s32(first + FOLIO_LARGE_MAPCOUNT) + 1;
		evidence->steps |= STEP_MAPCOUNT_KNOWN;
#endif
		return;
	}
#endif
	evidence->mapcount = read_s32(first + PAGE_MAPCOUNT) + 1;
	evidence->steps |= STEP_MAPCOUNT_KNOWN;
}
#else
static __always_inline void read_page(struct evidence *evidence, u64 page)
{
}
#endif

#ifdef EMIT_MERGE_FAILURE
static __always_inline void emit_failure(struct evidence *evidence, s64 err, u64 pfn, u64 rmap_item,
					 u64 mm)
{
	struct ksm_event *event = begin(MERGE_FAILURE);

	if (!event)
		return;
	/* The owner first: it writes mm, where the page's fields go. */
	pid_is_owner(event, mm);
	if (rmap_item)
		add_rmap_item(event, rmap_item);
#ifdef MM_USERS
	u32 users = 1;

	if (!bpf_probe_read_kernel(&users, sizeof(users), (void *)(mm + MM_USERS)) && !users)
		evidence->steps |= STEP_MM_EXITS;
#endif
	event->err = err;
	event->pfn = pfn;
	event->page_flags = evidence->page_flags;
	event->refcount = evidence->refcount;
	event->mapcount = evidence->mapcount;
	event->order = evidence->order;
	event->split_err = evidence->split_err;
	event->steps = evidence->steps;
	ring.ringbuf_submit(event, RB_NO_WAKEUP);
}
#endif

/* ---- where functions can be seen ---- */

static __always_inline void merge_begins(u64 page)
{
	struct evidence *evidence = evidence_at_hand();

	if (!evidence)
		return;
	evidence->page = page;
	evidence->steps = 0;
	evidence->page_flags = 0;
	evidence->refcount = 0;
	evidence->mapcount = 0;
	evidence->order = 0;
	evidence->split_err = 0;
}

/* try_to_merge_one_page has been entered. */
static __always_inline void merge_is_tried(u64 page)
{
	struct evidence *evidence = evidence_at_hand();

	if (!evidence)
		return;
	evidence->steps = STEP_IN_VMA;
	read_page(evidence, page);
	evidence->steps |= STEP_AT_ENTRY;
}

static __always_inline void merge_ends(s64 err, u64 pfn, u64 rmap_item, u64 mm, u32 zero_page)
{
	struct evidence *evidence = evidence_at_hand();

	if (!evidence)
		return;
	evidence->page = 0;
	if (!err)
		return;
	evidence->steps |= zero_page;
#ifdef WITH_MM_FIND_PMD
	if ((evidence->steps & (STEP_WRITE_PROTECTED | STEP_IDENTICAL)) == STEP_WRITE_PROTECTED)
		evidence->steps |= STEP_DIFFERENT;
#endif
#ifdef EMIT_MERGE_FAILURE
	emit_failure(evidence, err, pfn, rmap_item, mm);
#endif
}

/* ksmd has split a large folio, or tried to, whose lock it holds. */
static __always_inline void split_ends(s64 err)
{
	struct evidence *evidence = evidence_at_hand();

	if (!evidence || !evidence->page)
		return;
	evidence->steps |= STEP_SPLIT;
	evidence->split_err = err;
	if (err)
		read_page(evidence, evidence->page);
}

/* ---- where there is only the tracepoint ---- */

#if defined(FAILURES_AFTER_THE_FACT) && defined(STRUCT_PAGE_BYTES) && defined(MM_PGD) && \
	defined(RMAP_ITEM_ADDRESS) && defined(PTE_PFN_MASK)
#define ADDRESS_MASK_4K (~0xfffULL)
#define GIB (1ULL << 30)
/* Kernel addresses with 4 levels of page tables (Documentation/arch/x86/x86_64/mm.rst). */
#define LOWEST_WITH_4_LEVELS 0xffff800000000000ULL
#define ENTRY_PRESENT 1
#define ENTRY_LARGE 0x80
#define CANDIDATES_A_TIME 16
#define MOST_CANDIDATES 4096

/*
 * Where the kernel keeps struct pages, and physical memory: the symbols are hidden here. The first
 * is told by any event that has a page and its frame. The second, which is at a multiple of 1 GiB
 * (arch/x86/mm/kaslr.c), is tried out: from there the page tables lead to the frame that is known,
 * of a page that has just merged or was the first of a pair.
 */
struct placement {
	u64 pages;
	u64 memory;
	u64 candidates;
};
BPF_ARRAY(placement, struct placement, 1);

/* The frame that an address of an mm maps; 0: none. */
static __always_inline u64 frame_at(u64 mm, u64 address, u64 memory)
{
	u64 table = read_u64(mm + MM_PGD);
	u32 shift = table >= LOWEST_WITH_4_LEVELS ? 39 : 48;
	int i;

	for (i = 0; i < 5; i++) {
		u64 entry = read_u64(table + ((address >> shift) & 511) * 8);

		if (!(entry & ENTRY_PRESENT))
			return 0;
		if (shift == 12)
			return (entry & PTE_PFN_MASK) >> 12;
		if (shift <= 30 && (entry & ENTRY_LARGE))
			return ((entry & PTE_PFN_MASK) >> 12 & ~((1ULL << (shift - 12)) - 1)) +
			       (address >> 12 & ((1ULL << (shift - 12)) - 1));
		table = memory + (entry & PTE_PFN_MASK);
		shift -= 9;
	}
	return 0;
}

static __always_inline void find_memory(struct placement *at, u64 pfn, u64 mm, u64 address)
{
	u64 highest;
	int i;

	if (at->memory || at->candidates >= MOST_CANDIDATES)
		return;
	highest = read_u64(mm + MM_PGD) & ~(GIB - 1);
	for (i = 0; i < CANDIDATES_A_TIME; i++) {
		u64 memory = highest - (at->candidates + i) * GIB;

		if (frame_at(mm, address, memory) == pfn) {
			at->memory = memory;
			return;
		}
	}
	at->candidates += CANDIDATES_A_TIME;
}

/* After every try_to_merge_with_ksm_page, by its tracepoint: see on_ksm_merge_with_ksm_page. */
static __always_inline void after_merge(u64 ksm_page, u64 pfn, u64 rmap_item, u64 mm, s64 err)
{
	int key = 0;
	struct placement *at = placement.lookup(&key);
	struct evidence evidence = {.steps = STEP_AFTER_THE_FACT};
	u64 address = read_u64(rmap_item + RMAP_ITEM_ADDRESS) & ADDRESS_MASK_4K;

	if (!at)
		return;
	if (ksm_page)
		at->pages = ksm_page - pfn * STRUCT_PAGE_BYTES;
	if (!err || !ksm_page)
		find_memory(at, pfn, mm, address);
	if (!err)
		return;
	/* With a KSM page the frame is that one's, and what did not merge is where it is mapped. */
	if (ksm_page)
		pfn = at->memory ? frame_at(mm, address, at->memory) : 0;
	if (ksm_page && at->memory && !pfn)
		evidence.steps |= STEP_NOT_MAPPED;
	if (at->pages && pfn)
		read_page(&evidence, at->pages + pfn * STRUCT_PAGE_BYTES);
	emit_failure(&evidence, err, pfn, rmap_item, mm);
}
#elif defined(FAILURES_AFTER_THE_FACT)
static __always_inline void after_merge(u64 ksm_page, u64 pfn, u64 rmap_item, u64 mm, s64 err)
{
}
#endif
