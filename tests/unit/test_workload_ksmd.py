"""ksmd pass by pass, on a kernel that is made up."""

import pytest

from ksmtrace.workload import ksmd
from ksmtrace.workload.ksmd import Ksmd


class Kernel:
    """The files of KSM: a pass frees some rmap_items; without any to free, none is counted."""

    def __init__(self, items: int, freed: int) -> None:
        self.items = items
        self.freed = freed
        self.values: dict[str, int | str | None] = {"full_scans": 7, "max_page_sharing": 256}
        self.now_s = 0.0

    def read(self) -> dict[str, int | str | None]:
        self.now_s += 0.1
        return {**self.values, "pages_volatile": self.items}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def set(self, **knobs: int | str) -> None:
        if knobs.get("run") == ksmd.SCAN and self.freed:
            self.items = max(self.items - self.freed, 0)
            self.values["full_scans"] = int(self.values["full_scans"] or 0) + 1
        self.values.update(knobs)

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def of(monkeypatch):
    def make(items: int, freed: int) -> tuple[Kernel, Ksmd]:
        kernel = Kernel(items, freed)
        monkeypatch.setattr(ksmd, "read_ksm", kernel.read)
        monkeypatch.setattr(ksmd.time, "monotonic", lambda: kernel.now_s)
        return kernel, Ksmd(kernel, kernel)

    return make


def test_what_is_left_is_forgotten_pass_by_pass(of):
    kernel, it = of(items=31, freed=7)
    assert it.forget(60) is None
    assert (kernel.items, it.nr_kept, it.nr_passes) == (0, 0, 5)


def test_what_is_never_forgotten_is_waited_for_once(of):
    kernel, it = of(items=31, freed=0)
    unmet = it.forget(60)
    assert unmet is not None
    assert unmet.is_stuck
    assert "31 left" in unmet.waited_for
    took_s = kernel.now_s
    assert took_s < 30
    assert it.forget(60) is None
    assert kernel.now_s - took_s < 1
    kernel.items, kernel.freed = 42, 11
    assert it.forget(60) is None
    assert kernel.items == 31


def test_a_bound_that_is_too_short_is_not_the_kernels_doing(of):
    _, it = of(items=31, freed=1)
    unmet = it.forget(3)
    assert unmet is not None
    assert not unmet.is_stuck
