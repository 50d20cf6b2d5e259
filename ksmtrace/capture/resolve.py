"""Makes the recipe of one kernel build from its vmlinux with debug information.

``perf probe`` says where the inlined copies begin; DWARF says what they are inlined into and where
the variables are, and the disassembly which visible functions they call. Reads one compilation
unit, mm/ksm.c: parsing all of a kernel's debug information would take minutes.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ksmtrace.capture.sites import REGISTERS, Call, Frame, Location, Recipe, Site
from ksmtrace.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SITE_FUNCTIONS = (
    "cmp_and_merge_page",
    "stable_tree_search",
    "unstable_tree_search_insert",
    "try_to_merge_two_pages",
    "stable_tree_insert",
    "try_to_merge_with_zero_page",
    "should_skip_rmap_item",
    "calc_checksum",
    "scan_get_next_rmap_item",
    "get_next_rmap_item",
    "remove_trailing_rmap_items",
    "__stable_node_chain",
)
"""Functions of mm/ksm.c whose inlined copies are sought."""

CONFIRMED_FUNCTIONS = SITE_FUNCTIONS[:5]
"""Those that perf is asked for in any case; each costs it a second or two."""

SURROUNDING = (
    *("rmap_item", "tree_rmap_item", "page", "folio", "tree_page", "tree_folio"),
    *("kpage", "kfolio", "stable_node", "mm_slot", "mm"),
)
"""Parameters and variables of the enclosing functions that a recipe keeps."""

SCAN_THREAD = "ksm_scan_thread"
UNIT = "mm/ksm.c"

_PERF_SECONDS = 120
_PERF_LINE = re.compile(r"p:\S+ (?P<symbol>[\w.]+)\+(?P<offset>\d+)(?P<arguments>.*)")
_PERF_ARGUMENT = re.compile(
    r"(?P<name>\w+)=(?:%(?P<held>\w+)|(?P<offset>[+-]\d+)\(%(?P<base>\w+)\)):\w+"
)
_BANNER = re.compile(rb"Linux version (\S+) [^\n\0]*?(#[^\n\0]*)\n")
_SYMBOL = np.dtype(
    [
        *(("name", "<u4"), ("type", "u1"), ("other", "u1")),
        *(("section", "<u2"), ("address", "<u8"), ("bytes", "<u8")),
    ]
)
_LOCAL, _FUNCTION = 0, 2
_OP_REGISTER = re.compile(r"DW_OP_(?P<based>b)?reg(?P<number>\d+)")
# Put in by the compiler or patched away at boot: no function that anyone probes.
_NO_CALLEE = re.compile(r"__fentry__|__x86_.*|__SC[TK]__.*|__pfx_.*|__cfi_.*|srso_.*|__tsan_.*")
_NO_DEBUG_HINT = (
    "Debian's is in the package linux-image-RELEASE-dbg; "
    "your own build needs CONFIG_DEBUG_INFO_DWARF_TOOLCHAIN_DEFAULT=y"
)


def resolve(vmlinux: Path, confirmed: Collection[str] = CONFIRMED_FUNCTIONS) -> Recipe:
    """Make the recipe of the kernel that this vmlinux is of.

    Args:
        vmlinux: the linked kernel with DWARF; not the bzImage that boots.
        confirmed: functions whose sites perf must confirm: of :data:`SITE_FUNCTIONS`. Those of
            the others rest on this module's reading of DWARF alone.

    Raises:
        UsageError: the file is no such thing.
        BackendUnavailable: perf or pyelftools is missing or failed.
    """
    perf = shutil.which("perf")
    if perf is None:
        raise BackendUnavailable("perf is not installed", "on Debian: apt-get install linux-perf")
    try:
        with vmlinux.open("rb") as file:
            kernel = _Kernel(vmlinux, file)
            try:
                unit = _Unit(kernel)
                copies = [copy for copy in unit.copies if copy.function in SITE_FUNCTIONS]
                calls = tuple(unit.calls())
            except _import("elftools.common.exceptions", "pyelftools").DWARFError as error:
                raise UsageError(f"{vmlinux} has malformed debug information: {error}") from error
            sites = tuple(_Sites(perf, vmlinux, kernel, copies).resolve(confirmed))
            return Recipe(kernel.build_id, *kernel.banner(), sites, calls)
    except OSError as error:
        raise UsageError(
            f"{vmlinux} cannot be read: {error.strerror}",
            "VMLINUX is the kernel's uncompressed image: of the build's own tree, or Debian's "
            "linux-image-...-dbg",
        ) from error


@dataclass(frozen=True)
class _Variable:
    name: str
    is_parameter: bool
    die: Any


@dataclass(frozen=True)
class _Scope:
    """A function, inlined or not, as an interval of addresses in one symbol."""

    function: str
    # Line that the enclosing scope calls it at; that of its declaration where none does.
    call_line: int
    line: int
    entry: int
    ranges: tuple[tuple[int, int], ...]
    parent: _Scope | None
    is_of_unit: bool
    variables: tuple[_Variable, ...]

    def holds(self, address: int) -> bool:
        return any(low <= address < high for low, high in self.ranges)

    def frames(self, line: int) -> tuple[Frame, ...]:
        frames = [Frame(self.function, line)]
        scope = self
        while scope.parent is not None:
            frames.append(Frame(scope.parent.function, scope.call_line))
            scope = scope.parent
        return tuple(frames)


@dataclass(frozen=True)
class _Copy:
    function: str
    symbol: str
    scope: _Scope
    located: Mapping[str, Location]
    surrounding: Mapping[str, Location]


class _Kernel:
    """The vmlinux as an ELF file: its symbols, its code, and its debug information, unparsed."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        elffile = _import("elftools.elf.elffile", "pyelftools")
        errors = _import("elftools.common.exceptions", "pyelftools")
        self.path = path
        self._file = file
        try:
            self.elf = elffile.ELFFile(file)
            # Reading section names already touches most of the file's structure.
            self._names = {section.name for section in self.elf.iter_sections()}
            self._symbols, self._strings = self._read_symbols()
            self.build_id = self._read_build_id()
        except (errors.ELFError, struct.error, UnicodeDecodeError) as error:
            raise UsageError(
                f"{path} is no ELF file", "give the vmlinux; a bzImage or vmlinuz is packed"
            ) from error
        if self.elf["e_machine"] != "EM_X86_64" or self.elf["e_type"] != "ET_EXEC":
            machine, kind = self.elf["e_machine"], self.elf["e_type"]
            raise UsageError(f"{path} is no x86-64 vmlinux ({machine}, {kind})")
        if self.address(SCAN_THREAD) is None:
            raise UsageError(
                f"{path} has no {UNIT} in it: there is no function {SCAN_THREAD}",
                "build the kernel with CONFIG_KSM=y",
            )
        if not {".debug_info", ".zdebug_info"} & self._names:
            raise UsageError(f"{path} has no debug information", _NO_DEBUG_HINT)
        # A linked kernel's sections hold final values; applying the relocations that --emit-relocs
        # has kept beside them would take minutes.
        self.dwarf = self.elf.get_dwarf_info(relocate_dwarf_sections=False)

    def _read_symbols(self) -> tuple[NDArray[Any], bytes]:
        table = self.elf.get_section_by_name(".symtab")
        if table is None or self.elf.elfclass != 64 or not self.elf.little_endian:
            raise UsageError(
                f"{self.path} has no 64-bit symbol table", "give a vmlinux that is not stripped"
            )
        symbols = np.frombuffer(table.data(), dtype=_SYMBOL)
        return symbols, self.elf.get_section(table["sh_link"]).data()

    def _read_build_id(self) -> str:
        for section in self.elf.iter_sections("SHT_NOTE"):
            for note in section.iter_notes():
                # Numbers of kinds are the owner's own: Xen's notes use the same.
                if note["n_name"] == "GNU" and note["n_type"] == "NT_GNU_BUILD_ID":
                    return str(note["n_desc"])
        raise UsageError(
            f"{self.path} has no build-id, which a recipe is kept under",
            "link the kernel with --build-id, as its own Makefile does",
        )

    def _named(self, name: str) -> NDArray[Any]:
        # A name may be the tail of a longer one's entry, so every occurrence counts.
        needle, found, at = name.encode() + b"\0", [], -1
        while (at := self._strings.find(needle, at + 1)) >= 0:
            found.append(at)
        return self._symbols[np.isin(self._symbols["name"], found)]

    def address(self, name: str) -> int | None:
        rows = self._named(name)
        return int(rows["address"][0]) if len(rows) else None

    def section_of(self, name: str) -> str:
        return str(self.elf.get_section(int(self._named(name)["section"][0])).name)

    def symbol_at(self, address: int) -> str | None:
        """Return the function that begins there: of several names a global one, the shortest."""
        rows = self._symbols[self._symbols["address"] == address]
        rows = rows[(rows["type"] & 15) <= _FUNCTION]
        names = []
        for name, type_ in zip(rows["name"], rows["type"], strict=True):
            text = self._strings[name : self._strings.index(b"\0", name)].decode()
            names.append((int(type_) >> 4 == _LOCAL, len(text), text))
        return min(names)[2] if names else None

    def code(self, low: int, high: int) -> bytes:
        code = self._bytes_at(low, high - low)
        if len(code) != high - low:
            raise UsageError(
                f"{self.path} holds debug information only, and none of the code",
                "give the vmlinux itself, from before its debug information was split off",
            )
        return code

    def banner(self) -> tuple[str, str]:
        """Return release and version as uname would on the running kernel."""
        address = self.address("linux_banner")
        found = None
        if address is not None:
            found = _BANNER.match(self._bytes_at(address, 1024))
        if found is None:
            return "", ""
        release, version = (part.decode("utf-8", "replace") for part in found.groups())
        return release, version

    def _bytes_at(self, address: int, count: int) -> bytes:
        for segment in self.elf.iter_segments("PT_LOAD"):
            into = address - segment["p_vaddr"]
            if 0 <= into < segment["p_filesz"]:
                self._file.seek(segment["p_offset"] + into)
                return self._file.read(min(count, segment["p_filesz"] - into))
        return b""


class _Unit:
    """The compilation unit mm/ksm.c: its functions and all that is inlined into them."""

    def __init__(self, kernel: _Kernel) -> None:
        self._kernel = kernel
        self._unit = self._find()
        self._locations = _import("elftools.dwarf.locationlists", "pyelftools").LocationParser(
            kernel.dwarf.location_lists()
        )
        expressions = _import("elftools.dwarf.dwarf_expr", "pyelftools")
        self._expressions = expressions.DWARFExprParser(self._unit.structs)
        top = self._unit.get_top_DIE()
        low = top.attributes.get("DW_AT_low_pc")
        self._base = 0 if low is None else int(low.value)
        # Per function of its own: all scopes in it, itself first.
        self._trees: list[tuple[str, list[_Scope]]] = []
        for die in top.iter_children():
            if die.tag == "DW_TAG_subprogram" and (ranges := self._ranges(die)):
                scopes: list[_Scope] = []
                self._add_scope(die, None, ranges, scopes)
                symbol = kernel.symbol_at(scopes[0].entry)
                # Code for the boot is gone when anyone could probe it.
                if symbol is not None and not kernel.section_of(symbol).startswith(".init"):
                    self._trees.append((symbol, scopes))
        if not self._trees:
            raise UsageError(
                f"the debug information of {kernel.path} has no functions of {UNIT}",
                "build the kernel without CONFIG_DEBUG_INFO_SPLIT",
            )
        self._frame_bases = {
            symbol: _FrameBase(kernel.dwarf, scopes[0].entry) for symbol, scopes in self._trees
        }

    def _find(self) -> Any:
        dwarf = self._kernel.dwarf
        address = self._kernel.address(SCAN_THREAD)
        table = dwarf.get_aranges()
        offset = None if table is None else table.cu_offset_at_addr(address)
        if offset is not None:
            return dwarf.get_CU_at(offset)
        # Clang writes no table of addresses by default.
        for unit in dwarf.iter_CUs():
            name = unit.get_top_DIE().attributes.get("DW_AT_name")
            if name is not None and name.value.endswith(UNIT.encode()):
                return unit
        raise UsageError(
            f"the debug information of {self._kernel.path} leaves out {UNIT}", _NO_DEBUG_HINT
        )

    @property
    def copies(self) -> Iterator[_Copy]:
        """Every inlined copy of a function that mm/ksm.c defines."""
        for symbol, scopes in self._trees:
            for scope in scopes:
                if scope.parent is not None and scope.is_of_unit:
                    yield _Copy(
                        scope.function,
                        symbol,
                        scope,
                        self._located(symbol, scope, scope.entry, parameters=True),
                        self._surrounding(symbol, scope),
                    )

    def calls(self) -> Iterator[Call]:
        """Every direct call in a function that another of mm/ksm.c was inlined into."""
        lines = self._lines()
        # Only where it is needed: it takes a tenth of a second to import.
        import capstone

        decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        for symbol, scopes in sorted(self._trees, key=lambda tree: tree[0]):
            if not any(scope.is_of_unit for scope in scopes[1:]):
                continue
            own = scopes[0]
            for low, high in own.ranges:
                code = self._kernel.code(low, high)
                for address, size, mnemonic, operand in decoder.disasm_lite(code, low):
                    if mnemonic != "call" or not operand.startswith("0x"):
                        continue
                    callee = self._kernel.symbol_at(int(operand, 16))
                    if callee is None or _NO_CALLEE.fullmatch(callee):
                        continue
                    # Scopes are in depth-first order, so the last that holds it is the innermost.
                    scope = next(scope for scope in reversed(scopes) if scope.holds(address))
                    frames = scope.frames(lines(address))
                    yield Call(callee, symbol, address + size - own.entry, frames)

    def _lines(self) -> Callable[[int], int]:
        program = self._kernel.dwarf.line_program_for_CU(self._unit)
        states = [entry.state for entry in program.get_entries() if entry.state is not None]
        # Of several rows for one address the last is in force; sorting keeps their order, and puts
        # a sequence's end before the beginning of the next.
        states.sort(key=lambda state: (state.address, not state.end_sequence))
        addresses = np.array([state.address for state in states], dtype=np.uint64)

        def line(address: int) -> int:
            at = int(np.searchsorted(addresses, np.uint64(address), "right")) - 1
            return int(states[at].line) if at >= 0 else 0

        return line

    def _add_scope(
        self,
        die: Any,
        parent: _Scope | None,
        ranges: tuple[tuple[int, int], ...],
        scopes: list[_Scope],
    ) -> None:
        origin = _origin(die)
        low = die.attributes.get("DW_AT_low_pc")
        entry = die.attributes.get("DW_AT_entry_pc")
        start = ranges[0][0] if low is None else int(low.value)
        if entry is not None:
            # In DWARF 5 it may be a distance from the lowest address.
            start = int(entry.value) + (0 if entry.form.startswith(("DW_FORM_addr",)) else start)
        blocks = list(self._blocks(die))
        scope = _Scope(
            _text(origin, "DW_AT_name"),
            _number(die, "DW_AT_call_line"),
            _number(origin, "DW_AT_decl_line"),
            start,
            ranges,
            parent,
            self._file_of(origin) == Path(UNIT).name,
            tuple(
                _Variable(name, child.tag == "DW_TAG_formal_parameter", child)
                for child in blocks
                if child.tag in ("DW_TAG_formal_parameter", "DW_TAG_variable")
                and (name := _text(_origin(child), "DW_AT_name"))
            ),
        )
        scopes.append(scope)
        for child in blocks:
            # A copy without code of its own, all optimised away, cannot be observed.
            if child.tag == "DW_TAG_inlined_subroutine" and (inner := self._ranges(child)):
                self._add_scope(child, scope, inner, scopes)

    def _blocks(self, die: Any) -> Iterator[Any]:
        # Braces in the source are scopes to DWARF, but no functions.
        for child in die.iter_children():
            if child.tag == "DW_TAG_lexical_block":
                yield from self._blocks(child)
            else:
                yield child

    def _file_of(self, origin: Any) -> str:
        number = origin.attributes.get("DW_AT_decl_file")
        if number is None:
            return ""
        program = self._kernel.dwarf.line_program_for_CU(self._unit)
        # DWARF 5 counts files from 0, those before it from 1.
        first = 0 if program.header.version >= 5 else 1
        files = program.header.file_entry
        at = number.value - first
        return Path(files[at].name.decode()).name if 0 <= at < len(files) else ""

    def _ranges(self, die: Any) -> tuple[tuple[int, int], ...]:
        low = die.attributes.get("DW_AT_low_pc")
        high = die.attributes.get("DW_AT_high_pc")
        if low is not None and high is not None:
            is_address = high.form.startswith("DW_FORM_addr")
            return ((low.value, high.value if is_address else low.value + high.value),)
        found = die.attributes.get("DW_AT_ranges")
        if found is None:
            return ()
        lists = self._kernel.dwarf.range_lists()
        base, pairs = self._base, []
        for entry in lists.get_range_list_at_offset(found.value, cu=self._unit):
            if hasattr(entry, "base_address"):
                base = entry.base_address
            else:
                start = 0 if getattr(entry, "is_absolute", False) else base
                pairs.append((start + entry.begin_offset, start + entry.end_offset))
        return tuple(pair for pair in pairs if pair[0] < pair[1])

    def _surrounding(self, symbol: str, scope: _Scope) -> dict[str, Location]:
        found: dict[str, Location] = {}
        outer = scope.parent
        while outer is not None:
            if outer.is_of_unit:
                for name, place in self._located(symbol, outer, scope.entry, False).items():
                    if name in SURROUNDING:
                        found.setdefault(name, place)
            outer = outer.parent
        return found

    def _located(
        self, symbol: str, scope: _Scope, address: int, parameters: bool
    ) -> dict[str, Location]:
        found: dict[str, Location] = {}
        for variable in scope.variables:
            if parameters and not variable.is_parameter:
                # Nothing has been assigned to it where its function begins.
                continue
            location = self._location(symbol, variable, address)
            if location is not None:
                found[variable.name] = location
        return found

    def _location(self, symbol: str, variable: _Variable, address: int) -> Location | None:
        attribute = variable.die.attributes.get("DW_AT_location")
        if attribute is None:
            return None
        version = self._unit["version"]
        if not self._locations.attribute_has_location(attribute, version):
            return None
        parsed = self._locations.parse_from_attribute(attribute, version, variable.die)
        expression = getattr(parsed, "loc_expr", None)
        if expression is not None:
            # One place for its whole life is in memory, and says nothing about whether anything
            # has been stored there yet; a parameter's has.
            return self._evaluate(symbol, expression, address) if variable.is_parameter else None
        base = self._base
        for entry in parsed:
            if hasattr(entry, "base_address"):
                base = entry.base_address
            elif hasattr(entry, "loc_expr"):
                start = 0 if entry.is_absolute else base
                if start + entry.begin_offset <= address < start + entry.end_offset:
                    return self._evaluate(symbol, entry.loc_expr, address)
        return None

    def _evaluate(self, symbol: str, expression: list[int], address: int) -> Location | None:
        operations = self._expressions.parse_expr(expression)
        is_value = bool(operations) and operations[-1].op_name == "DW_OP_stack_value"
        if is_value:
            operations = operations[:-1]
        if not operations:
            return None
        first, *others = operations
        if any(operation.op_name != "DW_OP_plus_uconst" for operation in others):
            return None
        added = sum(operation.args[0] for operation in others)
        if first.op_name == "DW_OP_fbreg":
            base = self._frame_bases[symbol].at(address)
            if base is None:
                return None
            register, offset = base
            return Location(register, offset + first.args[0] + added, not is_value)
        named = _OP_REGISTER.fullmatch(first.op_name)
        if named is None or int(named["number"]) >= len(REGISTERS):
            return None
        register = REGISTERS[int(named["number"])]
        if named["based"]:
            return Location(register, first.args[0] + added, not is_value)
        return None if others or is_value else Location(register)


class _FrameBase:
    """The canonical frame address of one function, by address, from .debug_frame."""

    def __init__(self, dwarf: Any, entry: int) -> None:
        self._rows: list[tuple[int, str, int]] = []
        section = dwarf.debug_frame_sec
        found = None if section is None else _find_frame(section.stream.getvalue(), entry)
        if found is None:
            return
        callframe = _import("elftools.dwarf.callframe", "pyelftools")
        structs = _import("elftools.dwarf.structs", "pyelftools")
        only = callframe.CallFrameInfo(
            io.BytesIO(found), len(found), 0, structs.DWARFStructs(True, 32, 8)
        )
        for item in only.get_entries():
            if isinstance(item, callframe.FDE):
                for row in item.get_decoded().table:
                    rule = row["cfa"]
                    if rule.reg is not None and rule.reg < len(REGISTERS):
                        self._rows.append((row["pc"], REGISTERS[rule.reg], rule.offset))

    def at(self, address: int) -> tuple[str, int] | None:
        rows = [row for row in self._rows if row[0] <= address]
        return rows[-1][1:] if rows else None


def _find_frame(section: bytes, entry: int) -> bytes | None:
    # A section of its own for one function: parsing all the kernel's takes ten seconds.
    start = struct.pack("<Q", entry)
    at = -1
    while (at := section.find(start, at + 1)) >= 0:
        if at < 8:
            continue
        size, owner = struct.unpack_from("<II", section, at - 8)
        if owner + 8 > len(section) or at - 4 + size > len(section):
            continue
        owner_size, marker = struct.unpack_from("<II", section, owner)
        if marker == 0xFFFFFFFF and owner_size < 4096:
            common = section[owner : owner + 4 + owner_size]
            return common + section[at - 8 : at - 4] + bytes(4) + section[at : at - 4 + size]
    return None


class _Sites:
    """Turns copies into sites, with perf as the second witness of each."""

    def __init__(self, perf: str, vmlinux: Path, kernel: _Kernel, copies: list[_Copy]) -> None:
        self._perf = perf
        self._vmlinux = vmlinux
        self._kernel = kernel
        self._copies = copies

    def resolve(self, confirmed: Collection[str]) -> list[Site]:
        functions = {copy.function for copy in self._copies}
        asked = sorted(functions.intersection(confirmed))
        with ThreadPoolExecutor(max_workers=2) as pool:
            sites = [site for sites in pool.map(self._confirmed, asked) for site in sites]
        for copy in self._copies:
            if copy.function not in asked:
                sites.append(self._site(copy, copy.located))
        order = {name: index for index, name in enumerate(SITE_FUNCTIONS)}
        return sorted(sites, key=lambda site: (order[site.function], site.symbol, site.offset))

    def _offset(self, copy: _Copy) -> int:
        return copy.scope.entry - (self._kernel.address(copy.symbol) or 0)

    def _site(self, copy: _Copy, arguments: Mapping[str, Location]) -> Site:
        frames = copy.scope.frames(copy.scope.line)
        offset = self._offset(copy)
        return Site(copy.function, copy.symbol, offset, arguments, copy.surrounding, frames)

    def _confirmed(self, function: str) -> list[Site]:
        copies = {
            (copy.symbol, self._offset(copy)): copy
            for copy in self._copies
            if copy.function == function
        }
        names = sorted({name for copy in copies.values() for name in copy.located})
        try:
            lines = self._ask(function, *names)
        except BackendUnavailable:
            # perf gives up on a whole probe for one variable that it cannot find.
            if not names:
                raise
            lines = self._ask(function)
        sites = []
        for line in lines:
            copy = copies.get((line["symbol"], int(line["offset"])))
            if copy is not None:
                seen = _perf_arguments(line["arguments"])
                arguments = {
                    name: location
                    for name, location in copy.located.items()
                    if _agree(location, seen.get(name))
                }
                sites.append(self._site(copy, arguments))
        return sites

    def _ask(self, function: str, *variables: str) -> list[re.Match[str]]:
        definition = " ".join([function, *variables])
        command = [self._perf, "probe", f"--vmlinux={self._vmlinux}", "-D", definition]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_PERF_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BackendUnavailable(f"perf probe failed: {error}") from error
        if done.returncode != 0:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise BackendUnavailable(
                f"perf probe does not find {function}: {said[0] if said else 'no message'}",
                "does this work: " + " ".join(map(shlex.quote, command)),
            )
        return [found for line in done.stdout.splitlines() if (found := _PERF_LINE.match(line))]


def _perf_arguments(text: str) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for match in _PERF_ARGUMENT.finditer(text):
        register = match["held"] or match["base"]
        found.setdefault(match["name"], (register, int(match["offset"] or 0)))
    return found


def _agree(location: Location, seen: tuple[str, int] | None) -> bool:
    # perf writes a register plus a number, as container_of makes one, as memory at that sum
    # (it passes over DW_OP_stack_value), so only register and number can be compared.
    return seen is None or seen == (location.register, location.offset)


def _origin(die: Any) -> Any:
    while (attribute := die.attributes.get("DW_AT_abstract_origin")) is not None:
        die = die.get_DIE_from_attribute(attribute.name)
    return die


def _text(die: Any, attribute: str) -> str:
    found = die.attributes.get(attribute)
    return "" if found is None else found.value.decode()


def _number(die: Any, attribute: str) -> int:
    found = die.attributes.get(attribute)
    return 0 if found is None else int(found.value)


def _import(module: str, package: str) -> Any:
    import importlib

    with contextlib.suppress(ImportError):
        return importlib.import_module(module)
    raise BackendUnavailable(
        f"the Python package {package} is not installed",
        "install ksmtrace with what reading a vmlinux takes: pip install 'ksmtrace[sites]'",
    )
