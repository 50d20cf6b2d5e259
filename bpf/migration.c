// SPDX-License-Identifier: GPL-2.0-only
/* KSM pages move to another frame. One text with functions.c. */

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
