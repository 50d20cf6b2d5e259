"""The kernel's own type information (BTF): members, offsets, functions, tracepoints by name.

Reads /sys/kernel/btf/vmlinux as Documentation/bpf/btf.rst describes the format. Only what is
asked for is decoded: a kernel has some 130,000 types, of which ksmtrace needs a dozen.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError
from ksmtrace.kernel.files import ROOT, read_file

PATH = "sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_PTR, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF = 2, 4, 5, 6, 7, 8
_VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO = 9, 10, 11, 12, 13
_TYPE_TAG = 18
_LAST_KIND = 19
_TRANSPARENT = frozenset({_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG})

# Length of a type's record in 32-bit words: fixed part by kind, and words per entry of vlen.
_FIXED_WORDS = [3] * 32
for _kind in (1, 14, 17):  # INT, VAR, DECL_TAG
    _FIXED_WORDS[_kind] = 4
_FIXED_WORDS[3] = 6  # ARRAY
_ENTRY_WORDS = [0] * 32
for _kind, _words in ((4, 3), (5, 3), (6, 2), (13, 2), (15, 3), (19, 3)):
    _ENTRY_WORDS[_kind] = _words  # STRUCT, UNION, ENUM, FUNC_PROTO, DATASEC, ENUM64


@dataclass(frozen=True)
class Member:
    """One member of a struct or union, those of unnamed parts included.

    Attributes:
        name: its name.
        offset_bits: from the beginning of the struct asked about.
        bitfield_bits: width of a bitfield, 0 for an ordinary member.
        type_id: BTF id of its type.
    """

    name: str
    offset_bits: int
    bitfield_bits: int
    type_id: int


class Btf:
    """BTF of one kernel.

    Every method raises KernelInterfaceError where the bytes contradict the format.
    """

    def __init__(self, content: bytes) -> None:
        if len(content) < _HEADER.size:
            raise _malformed("shorter than a header")
        magic, version, _, length, type_off, type_len, str_off, str_len = _HEADER.unpack_from(
            content
        )
        if magic != _MAGIC:
            raise _malformed(f"magic {magic:#x}, not {_MAGIC:#x} in {sys.byteorder}-endian order")
        if version != 1:
            raise _malformed(f"version {version}, and only 1 is known")
        types, strings = length + type_off, length + str_off
        if type_off % 4 or type_len % 4:
            raise _malformed("types are not aligned")
        if length < _HEADER.size or max(types + type_len, strings + str_len) > len(content):
            raise _malformed(f"sections reach beyond the end at {len(content)} bytes")
        self._words = memoryview(content)[types : types + type_len].cast("I")
        self._strings = content[strings : strings + str_len]
        self._known_members: dict[int, Mapping[str, Member]] = {}
        if self._strings and (self._strings[0] or self._strings[-1]):
            raise _malformed("strings are not terminated")

    @classmethod
    def read(cls, root: Path = ROOT) -> Btf:
        """Read the running kernel's BTF; world-readable on every kernel that has it.

        Raises:
            KernelFeatureMissing: this kernel has none.
            KernelInterfaceError: it is unreadable or malformed.
        """
        content = read_file(f"{root}/{PATH}")
        if content is None:
            raise KernelFeatureMissing(
                f"there is no /{PATH}", "boot a kernel with CONFIG_DEBUG_INFO_BTF=y"
            )
        return cls(content)

    # Where each type's record begins, in words; the type with id n is at [n - 1].
    @cached_property
    def _starts(self) -> list[int]:
        words, fixed, entry = self._words, _FIXED_WORDS, _ENTRY_WORDS
        starts: list[int] = []
        append = starts.append
        at, end = 0, len(words)
        try:
            while at < end:
                append(at)
                info = words[at + 1]
                kind = info >> 24 & 31
                at += fixed[kind] + entry[kind] * (info & 0xFFFF)
        except IndexError:
            raise _malformed("the last type is cut off") from None
        if at != end:
            raise _malformed("the last type is cut off")
        return starts

    # The first word of every type, where its name is in the strings; searched as bytes.
    @cached_property
    def _name_offsets(self) -> bytes:
        return array("I", map(self._words.__getitem__, self._starts)).tobytes()

    @cached_property
    def _named(self) -> frozenset[int]:
        return frozenset(memoryview(self._name_offsets).cast("I"))

    def _start(self, type_id: int) -> int:
        if not 0 < type_id <= len(self._starts):
            raise _malformed(f"there is no type {type_id}")
        return self._starts[type_id - 1]

    def _kind(self, start: int) -> int:
        kind = self._words[start + 1] >> 24 & 31
        if not 0 < kind <= _LAST_KIND:
            raise _malformed(f"kind {kind} is unknown")
        return kind

    def _name(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if end < 0:
            raise _malformed(f"there is no string at {offset}")
        return self._strings[offset:end].decode(errors="replace")

    def _find(self, name: str, kinds: tuple[int, ...]) -> Iterator[int]:
        # By bytes, not type by type: find the string, then the types that begin with its offset.
        # A string may be the tail of another; but "page" is the tail of hundreds that are no type's
        # name, and searching for each of those takes longer than everything else.
        wanted = name.encode() + b"\0"
        offset = self._strings.find(wanted) if name else -1
        while offset >= 0:
            reference = struct.pack("=I", offset)
            at = self._name_offsets.find(reference) if offset in self._named else -1
            while at >= 0:
                type_id = at // 4 + 1
                if at % 4 == 0 and self._kind(self._starts[type_id - 1]) in kinds:
                    yield type_id
                at = self._name_offsets.find(reference, at + 1)
            offset = self._strings.find(wanted, offset + 1)

    def _record_ids(self, name: str, having: tuple[str, ...]) -> list[int]:
        return [
            type_id
            for type_id in self._find(name, (_STRUCT, _UNION))
            if all(member in self._members(type_id) for member in having)
        ]

    def _only(self, name: str, having: tuple[str, ...]) -> int | None:
        ids = self._record_ids(name, having)
        layouts = {(self._size(i), tuple(self._members(i).values())) for i in ids}
        if len(layouts) > 1:
            raise KernelInterfaceError(
                f"BTF has {len(ids)} different structs named {name}; name a member to tell them by"
            )
        return ids[0] if ids else None

    def _size(self, type_id: int) -> int:
        return self._words[self._start(type_id) + 2]

    def _members(self, type_id: int) -> Mapping[str, Member]:
        if type_id not in self._known_members:
            self._known_members[type_id] = MappingProxyType(self._decode_members(type_id))
        return self._known_members[type_id]

    def _decode_members(self, type_id: int) -> dict[str, Member]:
        found: dict[str, Member] = {}
        visited = {type_id}
        pending = [(type_id, 0)]
        while pending:
            current, base = pending.pop()
            start = self._start(current)
            info = self._words[start + 1]
            has_widths = info >> 31
            for at in range(start + 3, start + 3 + 3 * (info & 0xFFFF), 3):
                name_offset, member_type, offset = self._words[at : at + 3]
                width = offset >> 24 if has_widths else 0
                position = base + (offset & 0xFFFFFF if has_widths else offset)
                if name_offset:
                    name = self._name(name_offset)
                    found.setdefault(name, Member(name, position, width, member_type))
                    continue
                # C finds the members of an unnamed struct or union in the enclosing one. The same
                # unnamed type twice would declare its names twice, so one visit is enough; and
                # damaged bytes that go in circles end.
                inner = self._record(member_type)
                if inner is not None and inner not in visited:
                    visited.add(inner)
                    pending.append((inner, position))
        return found

    # The struct or union behind typedefs and qualifiers; None where the type is another.
    def _record(self, type_id: int) -> int | None:
        for _ in range(32):
            if type_id == 0:
                return None
            start = self._start(type_id)
            kind = self._kind(start)
            if kind in (_STRUCT, _UNION):
                return type_id
            if kind not in _TRANSPARENT:
                return None
            type_id = self._words[start + 2]
        raise _malformed("typedefs go in circles")

    def members(self, name: str, having: tuple[str, ...] = ()) -> Mapping[str, Member] | None:
        """List a struct's or union's members, those of its unnamed parts included.

        Args:
            name: without ``struct``.
            having: members by which to tell it from another of the same name: Linux 5.10 has two
                ``struct mm_slot``, in mm/ksm.c and mm/khugepaged.c.

        Returns:
            Members by name; None where there is no such struct.

        Raises:
            KernelInterfaceError: several structs of that name differ.
        """
        type_id = self._only(name, having)
        return None if type_id is None else self._members(type_id)

    def struct_size(self, name: str, having: tuple[str, ...] = ()) -> int | None:
        """Look up sizeof a struct or union, in bytes; None where there is no such struct."""
        type_id = self._only(name, having)
        return None if type_id is None else self._size(type_id)

    def offset(self, names: str | tuple[str, ...], path: str) -> int | None:
        """Look up offsetof, in bytes.

        Args:
            names: the struct's name, or the names it has had: the first that has the member is
                taken.
            path: a member, or members joined with dots through nested structs
                (``se.sum_exec_runtime``). The first also tells structs of one name apart.

        Returns:
            The offset; None where no such struct has such a member.

        Raises:
            KernelInterfaceError: the member is a bitfield, or several structs of that name have
                it at different places.
        """
        steps = path.split(".")
        for name in (names,) if isinstance(names, str) else names:
            offsets = {
                offset
                for type_id in self._record_ids(name, tuple(steps[:1]))
                if (offset := self._path_offset(type_id, name, steps)) is not None
            }
            if len(offsets) > 1:
                raise KernelInterfaceError(f"BTF has several structs {name} with a member {path}")
            if offsets:
                return offsets.pop()
        return None

    def _path_offset(self, type_id: int, name: str, steps: list[str]) -> int | None:
        bits = 0
        current: int | None = type_id
        for step in steps:
            member = None if current is None else self._members(current).get(step)
            if member is None:
                return None
            if member.bitfield_bits or member.offset_bits % 8:
                raise KernelInterfaceError(f"{name}.{step} is a bitfield and has no offset")
            bits += member.offset_bits
            current = self._record(member.type_id)
        return bits // 8

    def enumerators(self, name: str) -> Mapping[str, int] | None:
        """List an enum's names and values; None where there is no such enum of 32 bits.

        Raises:
            KernelInterfaceError: several enums of that name differ.
        """
        found: dict[str, int] | None = None
        for type_id in self._find(name, (_ENUM,)):
            start = self._start(type_id)
            entries = self._words[start + 3 : start + 3 + 2 * (self._words[start + 1] & 0xFFFF)]
            values = {self._name(entries[at]): entries[at + 1] for at in range(0, len(entries), 2)}
            if found is not None and found != values:
                raise KernelInterfaceError(f"BTF has several different enums {name}")
            found = values
        return found

    def function_ids(self, name: str) -> tuple[int, ...]:
        """List the BTF ids of the functions of one name; empty where it was inlined or is absent.

        A function that BTF lists has a symbol of its own and is what fentry attaches to.
        """
        return tuple(self._find(name, (_FUNC,)))

    def function_arguments(self, name: str) -> int | None:
        """Count the parameters that a function is declared with.

        A FUNC's type is its FUNC_PROTO, which has one entry per parameter, and one more for
        ``...`` (Documentation/bpf/btf.rst).

        Returns:
            The number, 0 for ``(void)``; None where the function was inlined or is absent.

        Raises:
            KernelInterfaceError: several functions of that name differ.
        """
        counts = {
            count
            for type_id in self._find(name, (_FUNC,))
            if (count := self._parameters(self._referred(type_id))) is not None
        }
        if len(counts) > 1:
            raise KernelInterfaceError(f"BTF has several different functions {name}")
        return counts.pop() if counts else None

    def tracepoints(self, prefix: str) -> tuple[str, ...]:
        """List the tracepoints whose names begin with a prefix, sorted."""
        wanted = b"\0btf_trace_" + prefix.encode()
        names = set()
        at = self._strings.find(wanted)
        while at >= 0:
            name = self._name(at + 1)
            if any(self._find(name, (_TYPEDEF,))):
                names.add(name.removeprefix("btf_trace_"))
            at = self._strings.find(wanted, at + 1)
        return tuple(sorted(names))

    def tracepoint_arguments(self, name: str) -> int | None:
        """Count the arguments that a tracepoint hands to a raw tracepoint program.

        Every tracepoint has ``typedef void (*btf_trace_NAME)(void *__data, TP_PROTO)``
        (include/trace/bpf_probe.h:__BPF_DECLARE_TRACE); ``__data`` is not counted.

        Returns:
            The number; None where this kernel has no such tracepoint.
        """
        counts = {
            count
            for type_id in self._find(f"btf_trace_{name}", (_TYPEDEF,))
            if (count := self._tracepoint_parameters(type_id)) is not None
        }
        if len(counts) > 1:
            raise KernelInterfaceError(f"BTF has several different tracepoints {name}")
        return counts.pop() - 1 if counts else None

    def _tracepoint_parameters(self, typedef_id: int) -> int | None:
        pointer_id = self._referred(typedef_id)
        if self._kind(self._start(pointer_id)) != _PTR:
            return None
        # None for a prototype without even __data, which is then no tracepoint's.
        return self._parameters(self._referred(pointer_id)) or None

    def _referred(self, type_id: int) -> int:
        return self._words[self._start(type_id) + 2]

    def _parameters(self, prototype_id: int) -> int | None:
        prototype = self._start(prototype_id)
        if self._kind(prototype) != _FUNC_PROTO:
            return None
        return self._words[prototype + 1] & 0xFFFF


def _malformed(what: str) -> KernelInterfaceError:
    return KernelInterfaceError(f"the kernel's BTF is malformed: {what}")
