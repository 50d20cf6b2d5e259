"""Drains a BPF ring buffer by mapping it: batches of events as slices of the ring.

The layout is the kernel's (kernel/bpf/ringbuf.c): one page with the consumer's position, one
with the producer's, then the data area, mapped twice in a row so that a batch that wraps is
still one slice. Each record has a header of 8 bytes whose first word holds the length, a busy
and a discard bit. All our records are equally long, so the ring is an array of slots.
"""

from __future__ import annotations

import mmap

import numpy as np

from ksmtrace.errors import BackendUnavailable
from ksmtrace.events import EVENT_DTYPE, PAYLOAD_BYTES, SLOT_BYTES, Events

_BUSY_OR_DISCARDED = np.uint32(0xC0000000)  # BPF_RINGBUF_BUSY_BIT | BPF_RINGBUF_DISCARD_BIT
_BUSY = np.uint32(0x80000000)
_SLOT_DTYPE = np.dtype(
    [("length", "<u4"), ("page_offset", "<u4"), ("payload", f"V{PAYLOAD_BYTES}")]
)


class Ring:
    """The consumer's side of one BPF ring buffer map.

    Reads and writes of the positions are single aligned 8-byte accesses; on x86 these have the
    order that the protocol needs (a load-acquire of the producer's position, a store-release of
    the consumer's).

    Args:
        map_fd: file descriptor of the BPF_MAP_TYPE_RINGBUF map; it is duplicated.
        ring_bytes: size of its data area, a power of two and a multiple of the page size.

    Raises:
        BackendUnavailable: the map cannot be mapped.
    """

    def __init__(self, map_fd: int, ring_bytes: int) -> None:
        page = mmap.PAGESIZE
        try:
            self._consumer = mmap.mmap(map_fd, page, mmap.MAP_SHARED)
            self._producer = mmap.mmap(
                map_fd, page + 2 * ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except (OSError, ValueError) as error:
            raise BackendUnavailable(f"the event ring cannot be mapped: {error}") from error
        self.ring_bytes = ring_bytes
        self._slot_mask = ring_bytes // SLOT_BYTES - 1
        self._consumer_position = np.frombuffer(self._consumer, np.uint64, 1)
        self._producer_position = np.frombuffer(self._producer, np.uint64, 1)
        self._slots = np.frombuffer(self._producer, _SLOT_DTYPE, offset=page)

    def drain(self, most: int | None = None) -> Events:
        """Take the events that are complete, oldest first, and free their slots.

        Args:
            most: take at most this many slots; None takes all.

        Returns:
            A copy, shape (n,), of :data:`ksmtrace.events.EVENT_DTYPE`.
        """
        begin = int(self._consumer_position[0])
        waiting = (int(self._producer_position[0]) - begin) // SLOT_BYTES
        if most is not None:
            waiting = min(waiting, most)
        first = (begin // SLOT_BYTES) & self._slot_mask
        slots = self._slots[first : first + waiting]
        marks = slots["length"] & _BUSY_OR_DISCARDED
        marked = np.flatnonzero(marks)
        if marked.size:
            busy = marked[(marks[marked] & _BUSY) != 0]
            if busy.size:  # a slot still being written ends what may be read
                slots = slots[: busy[0]]
                marks = marks[: busy[0]]
            taken = slots["payload"][marks == 0]
        else:
            taken = slots["payload"].copy()
        if len(slots):
            self._consumer_position[0] = begin + len(slots) * SLOT_BYTES
        events: Events = taken.view(EVENT_DTYPE)
        return events

    @property
    def fill(self) -> float:
        """How full the ring is, from 0 to 1."""
        used = int(self._producer_position[0]) - int(self._consumer_position[0])
        return used / self.ring_bytes

    def close(self) -> None:
        """Unmap the ring; batches already taken stay valid."""
        del self._slots, self._producer_position, self._consumer_position
        self._producer.close()
        self._consumer.close()
