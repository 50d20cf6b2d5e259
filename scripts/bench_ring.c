/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Appended to bpf/ksm.c by scripts/bench_ring: an event source that is faster
 * than any consumer. Run with BPF_PROG_TEST_RUN, so nothing is attached.
 *
 * Defines: SAMPLES, a power of two; BURST, the most events per run.
 */
BPF_ARRAY(samples, struct ksm_event, SAMPLES);

/*
 * (u64 first, u64 count, u64 submit_flags): the events number first to
 * first + count - 1 of an endless repetition of the samples, stamped with the
 * time as it is.
 */
int bench_burst(struct bpf_raw_tracepoint_args *ctx)
{
	u64 first = ctx->args[0];
	u64 count = ctx->args[1];
	u64 submit_flags = ctx->args[2];
	struct ksm_event *sample;
	struct ksm_event *event;
	int key;
	u64 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < BURST; i++) {
		if (i >= count)
			break;
		key = (first + i) & (SAMPLES - 1);
		sample = samples.lookup(&key);
		if (!sample)
			break;
		event = begin(sample->kind);
		if (!event)
			continue;
		event->flags = sample->flags;
		event->err = sample->err;
		event->pid = sample->pid;
		event->body[0] = sample->body[0];
		event->body[1] = sample->body[1];
		event->body[2] = sample->body[2];
		event->body[3] = sample->body[3];
		event->body[4] = sample->body[4];
		ring.ringbuf_submit(event, submit_flags);
	}
	return 0;
}
