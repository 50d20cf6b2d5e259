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
#define NR_KINDS 10

#define IN_KSMD 1
#define HAS_ADDRESS 2
#define PID_IS_OWNER 4
#define HAS_COUNTS 8

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
		struct { u32 pad_rmap_item[2]; u64 rmap_item; };
		struct { u32 pad_ksmd_cpu_ns[2]; u64 ksmd_cpu_ns; };
		struct { u32 pad_scan_time[2]; s64 scan_time; };
		struct { u32 pad_comm[2]; char comm[COMM_BYTES]; };
		struct { u32 pad_ksm_zero_pages[2]; u64 ksm_zero_pages; };
		struct { u32 pad_address[4]; u64 address; };
		struct { u32 pad_ksmd_run_delay_ns[4]; u64 ksmd_run_delay_ns; };
		struct { u32 pad_pages_to_scan[4]; u64 pages_to_scan; };
		struct { u32 pad_pfn[6]; u64 pfn; };
		struct { u32 pad_ksm_merging_pages[6]; u64 ksm_merging_pages; };
		struct { u32 pad_ksm_page[8]; u64 ksm_page; };
		struct { u32 pad_ksm_rmap_items[8]; u64 ksm_rmap_items; };
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
_Static_assert(__builtin_offsetof(struct ksm_event, rmap_item) == 24, "rmap_item");
_Static_assert(__builtin_offsetof(struct ksm_event, ksmd_cpu_ns) == 24, "ksmd_cpu_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, scan_time) == 24, "scan_time");
_Static_assert(__builtin_offsetof(struct ksm_event, comm) == 24, "comm");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_zero_pages) == 24, "ksm_zero_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, address) == 32, "address");
_Static_assert(__builtin_offsetof(struct ksm_event, ksmd_run_delay_ns) == 32, "ksmd_run_delay_ns");
_Static_assert(__builtin_offsetof(struct ksm_event, pages_to_scan) == 32, "pages_to_scan");
_Static_assert(__builtin_offsetof(struct ksm_event, pfn) == 40, "pfn");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_merging_pages) == 40, "ksm_merging_pages");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_page) == 48, "ksm_page");
_Static_assert(__builtin_offsetof(struct ksm_event, ksm_rmap_items) == 48, "ksm_rmap_items");

#endif
