/* Generated from ksmtrace/events.py by scripts/generate: do not edit. */
#ifndef KSMTRACE_EVENTS_H
#define KSMTRACE_EVENTS_H

#define KSM_START_SCAN 1
#define KSM_STOP_SCAN 2
#define KSM_ENTER 3
#define KSM_EXIT 4
#define KSM_MERGE_ONE_PAGE 5
#define KSM_MERGE_WITH_KSM_PAGE 6
#define KSM_REMOVE_KSM_PAGE 7
#define KSM_REMOVE_RMAP_ITEM 8
#define KSM_ADVISOR 9
#define TRY_TO_MERGE_ONE_PAGE 10
#define BREAK_KSM 11
#define KSM_MIGRATE_PAGE 12
#define CMP_AND_MERGE_PAGE 13
#define STABLE_TREE_SEARCH 14
#define STABLE_TREE_APPEND 15
#define REMOVE_RMAP_ITEM_FROM_TREE 16
#define REMOVE_NODE_FROM_STABLE_TREE 17
#define STABLE_TREE_INSERT 18
#define ALLOC_STABLE_NODE_CHAIN 19
#define FREE_STABLE_NODE_CHAIN 20
#define RUN_STORE 21
#define MERGE_FAILURE 22
#define PAGE_OUTCOMES 23
#define SHOULD_SKIP_RMAP_ITEM 24
#define LOCK_WAIT 26
#define LOCK_HOLD 27
#define __FOLIO_LOCK 28
#define RMAP_WALK_KSM 29
#define KSM_MEMORY_CALLBACK 30
#define GET_KSM_PAGE 31
#define DO_WP_PAGE 32
#define KSM_MIGHT_NEED_TO_COPY 33
#define BREAK_COW 34
#define REMOVE_MIGRATION_PTES 35
#define SPLIT_HUGE_PAGE_TO_LIST 36
#define NR_KINDS 37

#define IN_KSMD 1
#define HAS_ADDRESS 2
#define PID_IS_OWNER 4
#define HAS_COUNTS 8
#define BYPASS 16
#define NODE_FREED 32
#define FIRST_SHARER 64
#define LAST_SHARER 128

#define SEARCH_NONE 0
#define SEARCH_FOUND 1
#define SEARCH_SAME_PAGE 2
#define SEARCH_BUSY 3

#define LOCK_KSM_THREAD_MUTEX 0
#define LOCK_MMAP_LOCK 1
#define LOCK_ANON_VMA 2
#define LOCK_OTHER 3
#define LOCK_FOLIO 4
#define LOCK_REFCOUNT 5
#define NR_LOCKS 6

#define WAIT_EXCLUSIVE 1
#define WAIT_EXITING 2
#define WAIT_HOLDER_OWNS 4
#define WAIT_HOLDER_READ_LAST 8
#define WAIT_KSMD_HELD 16

#define COW_WRITE 0
#define COW_KERNEL 1
#define COW_REMOTE 2
#define COW_UNMERGE 3

#define PAGE_UNKNOWN 0
#define PAGE_FIRST_VISIT 1
#define PAGE_CHANGED 2
#define PAGE_UNIQUE 3
#define PAGE_MERGED 4
#define PAGE_MERGED_PAIR 5
#define PAGE_FORKED 6
#define PAGE_IN_PLACE 7
#define PAGE_ZERO_PAGE 8
#define PAGE_FAILED 9
#define PAGE_BUSY 10
#define PAGE_SAME_PAGE 11
#define PAGE_OTHER_NODE 12
#define PAGE_SKIPPED 13
#define PAGE_GONE 14
#define PAGE_MM_EXITS 15
#define NR_PAGE_OUTCOMES 16

#define STEP_IN_VMA 1
#define STEP_SPLIT 2
#define STEP_WRITE_PROTECT 4
#define STEP_WRITE_PROTECTED 8
#define STEP_IDENTICAL 16
#define STEP_ZERO_PAGE 32
#define STEP_MM_EXITS 64
#define STEP_PAGE_KNOWN 128
#define STEP_AT_ENTRY 256
#define STEP_MAPCOUNT_KNOWN 512
#define STEP_AFTER_THE_FACT 1024
#define STEP_DIFFERENT 2048
#define STEP_NOT_MAPPED 4096
#define STEP_NOT_ANONYMOUS 8192

#define COMM_BYTES 16

struct ksm_event {
	u64 ts_ns;
	u8 kind;
	u8 flags;
	s16 err;
	u32 pid;
	union {
		u64 body[5];
		struct { u64 mm; };
		struct { s32 seq; };
		struct { u32 pad_rmap_entries[1]; u32 rmap_entries; };
		struct { u32 cpu_percent; };
		struct { s32 sharers; };
		struct { u64 lock_address; };
		struct { u32 action; };
		struct { u32 page_flags; };
		struct { u32 run; };
		struct { u32 pad_nid[1]; s32 nid; };
		struct { u32 pad_refcount[1]; s32 refcount; };
		struct { u64 kpfn_before; };
		struct { u32 pad_rmap_item[2]; u64 rmap_item; };
		struct { u32 pad_kpfn_after[2]; u64 kpfn_after; };
		struct { u32 pad_chain[2]; u64 chain; };
		struct { u32 pad_waiters[2]; u32 waiters; };
		struct { u32 pad_task_pid[2]; u32 task_pid; };
		struct { u32 pad_cause[3]; u32 cause; };
		struct { u32 pad_ksmd_cpu_ns[2]; u64 ksmd_cpu_ns; };
		struct { u32 pad_scan_time[2]; s64 scan_time; };
		struct { u32 pad_comm[2]; char comm[COMM_BYTES]; };
		struct { u32 pad_ksm_zero_pages[2]; u64 ksm_zero_pages; };
		struct { u32 pad_address[4]; u64 address; };
		struct { u32 pad_new_pfn[4]; u64 new_pfn; };
		struct { u32 pad_ksmd_run_delay_ns[4]; u64 ksmd_run_delay_ns; };
		struct { u32 pad_pages_to_scan[4]; u64 pages_to_scan; };
		struct { u32 pad_unknown_pages[2]; u16 unknown_pages; };
		struct { u8 pad_first_visit_pages[10]; u16 first_visit_pages; };
		struct { u32 pad_changed_pages[3]; u16 changed_pages; };
		struct { u8 pad_unique_pages[14]; u16 unique_pages; };
		struct { u32 pad_merged_pages[4]; u16 merged_pages; };
		struct { u8 pad_merged_pair_pages[18]; u16 merged_pair_pages; };
		struct { u32 pad_forked_pages[5]; u16 forked_pages; };
		struct { u8 pad_in_place_pages[22]; u16 in_place_pages; };
		struct { u32 pad_zero_page_pages[6]; u16 zero_page_pages; };
		struct { u8 pad_failed_pages[26]; u16 failed_pages; };
		struct { u32 pad_busy_pages[7]; u16 busy_pages; };
		struct { u8 pad_same_page_pages[30]; u16 same_page_pages; };
		struct { u32 pad_other_node_pages[8]; u16 other_node_pages; };
		struct { u8 pad_skipped_pages[34]; u16 skipped_pages; };
		struct { u32 pad_gone_pages[9]; u16 gone_pages; };
		struct { u8 pad_mm_exits_pages[38]; u16 mm_exits_pages; };
		struct { u32 pad_pfn[6]; u64 pfn; };
		struct { u32 pad_holder_pid[6]; u32 holder_pid; };
		struct { u32 pad_stack[7]; s16 stack; };
		struct { u8 pad_lock[30]; u8 lock; };
		struct { u8 pad_lock_flags[31]; u8 lock_flags; };
		struct { u32 pad_end_address[6]; u64 end_address; };
		struct { u32 pad_ksm_merging_pages[6]; u64 ksm_merging_pages; };
		struct { u32 pad_ksm_page[8]; u64 ksm_page; };
		struct { u32 pad_ksm_rmap_items[8]; u64 ksm_rmap_items; };
		struct { u32 pad_stable_node[8]; u64 stable_node; };
		struct { u32 pad_duration_ns[8]; u64 duration_ns; };
		struct { u32 pad_age[8]; u32 age; };
		struct { u32 pad_outcome[8]; u32 outcome; };
		struct { u32 pad_mapcount[8]; s32 mapcount; };
		struct { u32 pad_flags_before[8]; u32 flags_before; };
		struct { u32 pad_checksum_changed[9]; u32 checksum_changed; };
		struct { u32 pad_remaining_skips[9]; u32 remaining_skips; };
		struct { u32 pad_steps[9]; u16 steps; };
		struct { u8 pad_order[38]; u8 order; };
		struct { u8 pad_split_err[39]; s8 split_err; };
		struct { u32 pad_nodes[9]; u32 nodes; };
	};
};

_Static_assert(sizeof(struct ksm_event) == 56,
	       "an event and its ring header must fill a 64-byte slot");
_Static_assert(__builtin_offsetof(struct ksm_event, ts_ns) == 0, "ts_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, kind) == 8, "kind");
_Static_assert(__builtin_offsetof(struct ksm_event, flags) == 9, "flags");
_Static_assert(__builtin_offsetof(struct ksm_event, err) == 10, "err");
_Static_assert(__builtin_offsetof(struct ksm_event, pid) == 12, "pid");
_Static_assert(__builtin_offsetof(struct ksm_event, mm) == 16, "mm");
_Static_assert(__builtin_offsetof(struct ksm_event, seq) == 16, "seq");
_Static_assert(__builtin_offsetof(struct ksm_event, rmap_entries) == 20, "rmap_entries");
_Static_assert(__builtin_offsetof(struct ksm_event, cpu_percent) == 16, "cpu_percent");
_Static_assert(__builtin_offsetof(struct ksm_event, sharers) == 16, "sharers");
_Static_assert(__builtin_offsetof(struct ksm_event, lock_address) == 16, "lock_address");
_Static_assert(__builtin_offsetof(struct ksm_event, action) == 16, "action");
_Static_assert(__builtin_offsetof(struct ksm_event, page_flags) == 16, "page_flags");
_Static_assert(__builtin_offsetof(struct ksm_event, run) == 16, "run");
_Static_assert(__builtin_offsetof(struct ksm_event, nid) == 20, "nid");
_Static_assert(__builtin_offsetof(struct ksm_event, refcount) == 20, "refcount");
_Static_assert(__builtin_offsetof(struct ksm_event, kpfn_before) == 16, "kpfn_before");
_Static_assert(__builtin_offsetof(struct ksm_event, rmap_item) == 24, "rmap_item");
_Static_assert(__builtin_offsetof(struct ksm_event, kpfn_after) == 24, "kpfn_after");
_Static_assert(__builtin_offsetof(struct ksm_event, chain) == 24, "chain");
_Static_assert(__builtin_offsetof(struct ksm_event, waiters) == 24, "waiters");
_Static_assert(__builtin_offsetof(struct ksm_event, task_pid) == 24, "task_pid");
_Static_assert(__builtin_offsetof(struct ksm_event, cause) == 28, "cause");
_Static_assert(__builtin_offsetof(struct ksm_event, ksmd_cpu_ns) == 24, "ksmd_cpu_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, scan_time) == 24, "scan_time");
_Static_assert(__builtin_offsetof(struct ksm_event, comm) == 24, "comm");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_zero_pages) == 24, "ksm_zero_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, address) == 32, "address");
_Static_assert(__builtin_offsetof(struct ksm_event, new_pfn) == 32, "new_pfn");
_Static_assert(__builtin_offsetof(struct ksm_event, ksmd_run_delay_ns) == 32, "ksmd_run_delay_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, pages_to_scan) == 32, "pages_to_scan");
_Static_assert(__builtin_offsetof(struct ksm_event, unknown_pages) == 24, "unknown_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, first_visit_pages) == 26, "first_visit_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, changed_pages) == 28, "changed_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, unique_pages) == 30, "unique_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, merged_pages) == 32, "merged_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, merged_pair_pages) == 34, "merged_pair_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, forked_pages) == 36, "forked_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, in_place_pages) == 38, "in_place_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, zero_page_pages) == 40, "zero_page_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, failed_pages) == 42, "failed_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, busy_pages) == 44, "busy_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, same_page_pages) == 46, "same_page_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, other_node_pages) == 48, "other_node_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, skipped_pages) == 50, "skipped_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, gone_pages) == 52, "gone_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, mm_exits_pages) == 54, "mm_exits_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, pfn) == 40, "pfn");
_Static_assert(__builtin_offsetof(struct ksm_event, holder_pid) == 40, "holder_pid");
_Static_assert(__builtin_offsetof(struct ksm_event, stack) == 44, "stack");
_Static_assert(__builtin_offsetof(struct ksm_event, lock) == 46, "lock");
_Static_assert(__builtin_offsetof(struct ksm_event, lock_flags) == 47, "lock_flags");
_Static_assert(__builtin_offsetof(struct ksm_event, end_address) == 40, "end_address");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_merging_pages) == 40, "ksm_merging_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_page) == 48, "ksm_page");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_rmap_items) == 48, "ksm_rmap_items");
_Static_assert(__builtin_offsetof(struct ksm_event, stable_node) == 48, "stable_node");
_Static_assert(__builtin_offsetof(struct ksm_event, duration_ns) == 48, "duration_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, age) == 48, "age");
_Static_assert(__builtin_offsetof(struct ksm_event, outcome) == 48, "outcome");
_Static_assert(__builtin_offsetof(struct ksm_event, mapcount) == 48, "mapcount");
_Static_assert(__builtin_offsetof(struct ksm_event, flags_before) == 48, "flags_before");
_Static_assert(__builtin_offsetof(struct ksm_event, checksum_changed) == 52, "checksum_changed");
_Static_assert(__builtin_offsetof(struct ksm_event, remaining_skips) == 52, "remaining_skips");
_Static_assert(__builtin_offsetof(struct ksm_event, steps) == 52, "steps");
_Static_assert(__builtin_offsetof(struct ksm_event, order) == 54, "order");
_Static_assert(__builtin_offsetof(struct ksm_event, split_err) == 55, "split_err");
_Static_assert(__builtin_offsetof(struct ksm_event, nodes) == 52, "nodes");

#endif
