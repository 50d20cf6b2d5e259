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
#define NR_KINDS 22

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
		struct { u32 run; };
		struct { u32 pad_nid[1]; s32 nid; };
		struct { u64 kpfn_before; };
		struct { u32 pad_rmap_item[2]; u64 rmap_item; };
		struct { u32 pad_kpfn_after[2]; u64 kpfn_after; };
		struct { u32 pad_chain[2]; u64 chain; };
		struct { u32 pad_task_pid[2]; u32 task_pid; };
		struct { u32 pad_ksmd_cpu_ns[2]; u64 ksmd_cpu_ns; };
		struct { u32 pad_scan_time[2]; s64 scan_time; };
		struct { u32 pad_comm[2]; char comm[COMM_BYTES]; };
		struct { u32 pad_ksm_zero_pages[2]; u64 ksm_zero_pages; };
		struct { u32 pad_address[4]; u64 address; };
		struct { u32 pad_new_pfn[4]; u64 new_pfn; };
		struct { u32 pad_ksmd_run_delay_ns[4]; u64 ksmd_run_delay_ns; };
		struct { u32 pad_pages_to_scan[4]; u64 pages_to_scan; };
		struct { u32 pad_pfn[6]; u64 pfn; };
		struct { u32 pad_end_address[6]; u64 end_address; };
		struct { u32 pad_ksm_merging_pages[6]; u64 ksm_merging_pages; };
		struct { u32 pad_ksm_page[8]; u64 ksm_page; };
		struct { u32 pad_ksm_rmap_items[8]; u64 ksm_rmap_items; };
		struct { u32 pad_stable_node[8]; u64 stable_node; };
		struct { u32 pad_duration_ns[8]; u64 duration_ns; };
		struct { u32 pad_outcome[8]; u32 outcome; };
		struct { u32 pad_flags_before[8]; u32 flags_before; };
		struct { u32 pad_checksum_changed[9]; u32 checksum_changed; };
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
_Static_assert(__builtin_offsetof(struct ksm_event, run) == 16, "run");
_Static_assert(__builtin_offsetof(struct ksm_event, nid) == 20, "nid");
_Static_assert(__builtin_offsetof(struct ksm_event, kpfn_before) == 16, "kpfn_before");
_Static_assert(__builtin_offsetof(struct ksm_event, rmap_item) == 24, "rmap_item");
_Static_assert(__builtin_offsetof(struct ksm_event, kpfn_after) == 24, "kpfn_after");
_Static_assert(__builtin_offsetof(struct ksm_event, chain) == 24, "chain");
_Static_assert(__builtin_offsetof(struct ksm_event, task_pid) == 24, "task_pid");
_Static_assert(__builtin_offsetof(struct ksm_event, ksmd_cpu_ns) == 24, "ksmd_cpu_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, scan_time) == 24, "scan_time");
_Static_assert(__builtin_offsetof(struct ksm_event, comm) == 24, "comm");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_zero_pages) == 24, "ksm_zero_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, address) == 32, "address");
_Static_assert(__builtin_offsetof(struct ksm_event, new_pfn) == 32, "new_pfn");
_Static_assert(__builtin_offsetof(struct ksm_event, ksmd_run_delay_ns) == 32, "ksmd_run_delay_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, pages_to_scan) == 32, "pages_to_scan");
_Static_assert(__builtin_offsetof(struct ksm_event, pfn) == 40, "pfn");
_Static_assert(__builtin_offsetof(struct ksm_event, end_address) == 40, "end_address");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_merging_pages) == 40, "ksm_merging_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_page) == 48, "ksm_page");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_rmap_items) == 48, "ksm_rmap_items");
_Static_assert(__builtin_offsetof(struct ksm_event, stable_node) == 48, "stable_node");
_Static_assert(__builtin_offsetof(struct ksm_event, duration_ns) == 48, "duration_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, outcome) == 48, "outcome");
_Static_assert(__builtin_offsetof(struct ksm_event, flags_before) == 48, "flags_before");
_Static_assert(__builtin_offsetof(struct ksm_event, checksum_changed) == 52, "checksum_changed");
_Static_assert(__builtin_offsetof(struct ksm_event, nodes) == 52, "nodes");

#endif
