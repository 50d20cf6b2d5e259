"""Make a small real kernel memory: ``make_kcore.py DIRECTORY``, as root in a guest.

    ksmtrace vm run -k 6.12 -w tests/golden/kcore -- .venv/bin/python \\
        tests/golden/kcore/make_kcore.py tests/golden/kcore/6.12

Two processes map 3 contents 5 and 11 times and 2 pages of their own, with max_page_sharing=3; the
pages of kernel memory that a walk of KSM's structures reads are written as an ELF core file, beside
the lines of kallsyms and the types of BTF that it looks up, and the files of sysfs. Elsewhere than
in a guest, save KSM's knobs first.
"""

import ctypes
import importlib.util
import itertools
import lzma
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

from ksmtrace.kernel.ksm_code import FUNCTIONS
from ksmtrace.kernel.ksm_layout import MEMBERS, SYMBOLS
from ksmtrace.kernel.ksm_memory import KsmMemoryReader
from ksmtrace.kernel.memory import KernelMemory
from ksmtrace.kernel.sysfs import read_ksm

PAGE = mmap.PAGESIZE


def process(copies: int) -> int:
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        memory = mmap.mmap(-1, (3 * copies + 2) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for index in range(3 * copies):
            memory[index * PAGE : index * PAGE + 3] = b"%03d" % (index // copies)
        for index in range(3 * copies, 3 * copies + 2):
            memory[index * PAGE : index * PAGE + 16] = os.urandom(16)
        memory.madvise(mmap.MADV_MERGEABLE)
        ctypes.CDLL(None).prctl(15, b"golden %d" % copies, 0, 0, 0)
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    return pid


def knob(name: str, value: int) -> None:
    path = Path("/sys/kernel/mm/ksm", name)
    if path.exists():
        path.write_text(str(value))


# The lines that are looked up, and behind each function the one that says where it ends.
def kallsyms() -> str:
    lines = Path("/proc/kallsyms").read_text().splitlines(keepends=True)
    named = sorted((line.split()[0], line) for line in lines if line.split()[1] in "tTwW")
    kept = {line for line in lines if line.split()[2] in SYMBOLS}
    for (_, line), (_, following) in itertools.pairwise(named):
        if line.split()[2] in FUNCTIONS:
            kept |= {line, following}
    return "".join(line for line in lines if line in kept)


def core_file(pages: dict[int, bytes]) -> bytes:
    numbers = sorted(pages)
    runs = [
        [number for _, number in group]
        for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    content = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(runs), 0, 0, 0),
    )
    offset = len(content) + 56 * len(runs)
    for run in runs:
        size = len(run) * PAGE
        content += struct.pack("<IIQQQQQQ", 1, 7, offset, run[0] * PAGE, 0, size, size, PAGE)
        offset += size
    return content + b"".join(pages[number] for number in numbers)


def reduce_btf(reduced: Path) -> None:
    path = Path(__file__).parents[1] / "trees/reduce_btf.py"
    spec = importlib.util.spec_from_file_location("reduce_btf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STRUCTS |= {way[0] for ways in MEMBERS.values() for way in ways}
    module.main(Path("/sys/kernel/btf/vmlinux"), reduced)


def main(directory: Path) -> None:
    for name, value in (
        *(("run", 2), ("run", 0), ("max_page_sharing", 3), ("smart_scan", 0)),
        *(("sleep_millisecs", 0), ("pages_to_scan", 1000)),
    ):
        knob(name, value)
    children = [process(5), process(11)]
    knob("run", 1)
    deadline = time.monotonic() + 30
    while read_ksm()["pages_sharing"] != 3 * 5 * 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    knob("run", 0)

    # Nothing changes while ksmd rests: what is read once is kept.
    KernelMemory.forget = lambda self: None
    with KsmMemoryReader.open() as opened:
        memory = opened.read()
        assert memory.consistent
        assert not memory.torn
        pages = {number: bytes(page) for number, page in opened.memory._pages.items()}
    for part in ("proc", "sys/kernel/btf", "sys/kernel/mm/ksm"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    (directory / "proc/kcore.xz").write_bytes(lzma.compress(core_file(pages), preset=9))
    (directory / "proc/kallsyms").write_text(kallsyms())
    for path in Path("/sys/kernel/mm/ksm").iterdir():
        (directory / "sys/kernel/mm/ksm" / path.name).write_text(path.read_text())
    reduce_btf(directory / "sys/kernel/btf/vmlinux")
    print(
        f"{len(pages)} pages;",
        {name: value for name, value in memory.counters.items() if value is not None},
        memory.cursor,
        len(memory.stable_nodes),
    )
    for pid in children:
        os.kill(pid, signal.SIGKILL)


main(Path(sys.argv[1]))
