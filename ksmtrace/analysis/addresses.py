"""Follows through the events what is known by a kernel address, which may be used again.

The order of the events is the order in which the kernel acted: all that these functions are
asked about happens under ksm_thread_mutex, and the ring keeps that order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ksmtrace.events import KIND_BY_NAME, Events

Places = npt.NDArray[np.int64]
"""Indexes into a recording's events, rising, shape (n,)."""


def places_of(events: Events, *names: str) -> Places:
    """Return where the events of the named kinds are."""
    numbers = [KIND_BY_NAME[name].number for name in names]
    return np.flatnonzero(np.isin(events["kind"], numbers))


def next_place(events: Events, field: str, chosen: Places, later: Places) -> Places:
    """Return per chosen event the place of the first later one with the same value of a field.

    Args:
        events: all events, shape (n,).
        field: the field that must be equal.
        chosen: the events that are followed, shape (m,).
        later: the events that may follow; may hold the chosen ones, none of which follows itself.

    Returns:
        Places of shape (m,); n where nothing follows.
    """
    none = len(events)
    if not len(later):
        return np.full(len(chosen), none)
    # np.unique's own inverse would take twice the memory.
    values = np.unique(events[field][later])
    following = np.searchsorted(values, events[field][later])
    following *= none + 1
    following += later
    following.sort()
    wanted = events[field][chosen]
    number = np.searchsorted(values, wanted)
    at = np.searchsorted(following, number * (none + 1) + chosen, side="right")
    nearest = np.r_[following, np.iinfo(np.int64).max][at]
    followed = values[np.minimum(number, len(values) - 1)] == wanted
    followed &= nearest // (none + 1) == number
    return np.where(followed, nearest % (none + 1), none)


def number_lives(events: Events, field: str, chosen: Places, ends: Places) -> Places:
    """Number the lives of what is known by an address.

    Args:
        events: all events, shape (n,).
        field: the field that holds the address, in the chosen events and in the ends.
        chosen: the events to number, shape (m,).
        ends: the events that end a life at their address.

    Returns:
        Per chosen event the number of its life, shape (m,): equal for equal addresses with no
        end between them.
    """
    places = np.r_[chosen, ends]
    is_end = np.r_[np.zeros(len(chosen), bool), np.ones(len(ends), bool)]
    addresses = events[field][places]
    order = np.lexsort((places, addresses))
    addresses = addresses[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (addresses[1:] != addresses[:-1]) | is_end[order][:-1]
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(begins)
    return numbers[: len(chosen)]
