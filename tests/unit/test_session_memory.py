"""The kernel's memory read anew while ksmd is at work, as a capture does it."""

from types import SimpleNamespace

import pytest

from ksmtrace.capture import session
from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.ksm_memory import KsmMemoryReader

LOST = KernelInterfaceError("KSM's structures changed during each of 1 readings")
TORN, WHOLE = SimpleNamespace(consistent=False), SimpleNamespace(consistent=True)


class Reader:
    """Reads what it is told to, the last for ever."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.closed = self.opened = 0

    def open(self):
        self.opened += 1
        return self

    def read(self, attempts):
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self):
        self.closed += 1


@pytest.fixture
def capture(monkeypatch):
    def of(*outcomes):
        reader = Reader(*outcomes)
        monkeypatch.setattr(KsmMemoryReader, "open", reader.open)
        made = session.Capture.__new__(session.Capture)
        made._memory, made._drain = None, lambda: iter(["drained"])
        return made, reader

    return of


def result_of(generator):
    """Run it to its end; returns what it yields, and what it returns."""
    yielded = []
    while True:
        try:
            yielded.append(next(generator))
        except StopIteration as end:
            return yielded, end.value


def test_until_a_reading_is_of_one_moment(capture):
    made, reader = capture(TORN, LOST, TORN, WHOLE, TORN)
    yielded, (begin_ns, memory) = result_of(made._read_memory())
    # The ring is emptied before each further try.
    assert yielded == 3 * ["drained"]
    assert memory is WHOLE
    assert reader.outcomes == [TORN]
    assert begin_ns > 0


def test_for_as_long_as_patience_lasts(capture, monkeypatch):
    monkeypatch.setattr(session, "MEMORY_PATIENCE_NS", 20_000_000)
    made, _ = capture(TORN)
    assert result_of(made._read_memory())[1][1] is TORN
    made, _ = capture(LOST)
    with pytest.raises(KernelInterfaceError, match="changed during"):
        result_of(made._read_memory())


def test_symbols_are_looked_up_once(capture):
    made, reader = capture(WHOLE)
    result_of(made._read_memory())
    result_of(made._read_memory())
    assert (reader.opened, reader.closed) == (1, 0)
    made._close_memory()
    assert reader.closed == 1
