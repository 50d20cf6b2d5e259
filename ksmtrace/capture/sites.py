"""Recipes: where the functions that a kernel build has inlined can still be observed.

A recipe belongs to one build of the kernel, told by its GNU build-id, and is used for no other.
Reads and validates only; ksmtrace.capture.resolve makes recipes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ksmtrace.errors import CannotRun

FORMAT = 1
"""Version of the file's form; a file of any other is refused."""

REGISTERS = (
    *("ax", "dx", "cx", "bx", "si", "di", "bp", "sp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""Register names as kprobe events spell them, in the order of DWARF's numbers on x86-64."""

_BUILD_ID = re.compile(r"[0-9a-f]{16,64}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,127}")
_MAX_FILE_BYTES = 4 << 20
_MAX_SYMBOL_BYTES = 1 << 20
_MAX_LINE = 1 << 24

T = TypeVar("T")


class RecipeError(CannotRun):
    """A file that is no valid recipe."""


@dataclass(frozen=True)
class Location:
    """Where a value is at the moment a probe fires.

    Attributes:
        register: one of :data:`REGISTERS`.
        offset: bytes to add to the register.
        in_memory: True where the value lies in memory at that sum, False where the sum is it.
    """

    register: str
    offset: int = 0
    in_memory: bool = False

    @property
    def fetch_argument(self) -> str | None:
        """Return it as kprobe events spell it; None where they cannot say it.

        They have no way to say "register plus a number": ``-40(%cx)`` is memory there.
        """
        if self.in_memory:
            return f"{self.offset:+d}(%{self.register})"
        return None if self.offset else f"%{self.register}"

    def as_json(self) -> dict[str, Any]:
        """Return ``{"register"}``, with ``offset`` for memory or ``add`` for a sum."""
        plain: dict[str, Any] = {"register": self.register}
        if self.in_memory:
            plain["offset"] = self.offset
        elif self.offset:
            plain["add"] = self.offset
        return plain


@dataclass(frozen=True)
class Frame:
    """A function that a point of the code lies in by the source, inlined or not.

    Attributes:
        function: its name.
        line: line of its file: of the next inner frame's call, or of the point itself.
    """

    function: str
    line: int


@dataclass(frozen=True)
class Site:
    """Where an inlined copy of a function begins.

    Attributes:
        function: the function that was inlined.
        symbol: the function of its own that holds the copy.
        offset: bytes from the symbol to the copy's first instruction.
        arguments: where the function's own parameters are at that point, by name; one that the
            compiler has optimised away is missing.
        surrounding: the same for parameters and variables of the enclosing functions, those of
            the nearest function first where a name occurs twice.
        frames: innermost first; the first is the function itself with the line it begins at,
            the last is the symbol.
    """

    function: str
    symbol: str
    offset: int
    arguments: Mapping[str, Location] = field(hash=False)
    surrounding: Mapping[str, Location] = field(hash=False)
    frames: tuple[Frame, ...]

    def location(self, *names: str) -> Location | None:
        """Return where the first of these names that is known is, own parameters first."""
        for known in (self.arguments, self.surrounding):
            for name in names:
                if name in known:
                    return known[name]
        return None


@dataclass(frozen=True)
class Call:
    """A call of a visible function out of code that was inlined into another.

    Attributes:
        callee: the function called.
        symbol: the function of its own that holds the call.
        return_offset: bytes from the symbol to the instruction after the call: what a probe
            on the callee's entry finds as return address.
        frames: innermost first; the first has the line of the call, the last is the symbol.
    """

    callee: str
    symbol: str
    return_offset: int
    frames: tuple[Frame, ...]

    @property
    def caller(self) -> str:
        """Return the function that makes the call by the source."""
        return self.frames[0].function

    def is_within(self, function: str) -> bool:
        """Return whether the call is made in that function or in one inlined into it."""
        return any(frame.function == function for frame in self.frames)


@dataclass(frozen=True)
class Recipe:
    """What is known about one build of the kernel.

    Attributes:
        build_id: GNU build-id of vmlinux in hex.
        release: as ``uname -r``; for people.
        version: as ``uname -v``, with the package's version on Debian; for people.
        sites: by function, then by symbol and offset.
        calls: by symbol and offset.
    """

    build_id: str
    release: str
    version: str
    sites: tuple[Site, ...]
    calls: tuple[Call, ...]

    def sites_of(self, function: str) -> tuple[Site, ...]:
        """Return every inlined copy of a function; empty where it has a symbol or is unknown."""
        return tuple(site for site in self.sites if site.function == function)

    def calls_to(self, callee: str, within: str | None = None) -> tuple[Call, ...]:
        """Return the calls of a function, by source line; ``within`` narrows to one caller."""
        found = [call for call in self.calls if call.callee == callee]
        if within is not None:
            found = [call for call in found if call.is_within(within)]
        return tuple(sorted(found, key=lambda call: (call.frames[0].line, call.return_offset)))

    def call_at(self, symbol: str, return_offset: int) -> Call | None:
        """Return the call that returns to that address."""
        return self._calls_by_return.get((symbol, return_offset))

    @cached_property
    def _calls_by_return(self) -> dict[tuple[str, int], Call]:
        return {(call.symbol, call.return_offset): call for call in self.calls}

    def as_text(self) -> str:
        """Write the recipe as JSON, one line per site and call, so that a diff can be read."""
        head = {
            "format": FORMAT,
            "build_id": self.build_id,
            "release": self.release,
            "version": self.version,
        }
        sites = [
            {
                "function": site.function,
                "symbol": site.symbol,
                "offset": site.offset,
                "arguments": _plain_locations(site.arguments),
                "surrounding": _plain_locations(site.surrounding),
                "frames": _plain_frames(site.frames),
            }
            for site in self.sites
        ]
        calls = [
            {
                "callee": call.callee,
                "symbol": call.symbol,
                "return_offset": call.return_offset,
                "frames": _plain_frames(call.frames),
            }
            for call in self.calls
        ]
        lines = [f'  "{key}": {json.dumps(value)}' for key, value in head.items()]
        for key, rows in (("sites", sites), ("calls", calls)):
            body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
            lines.append(f'  "{key}": [\n{body}\n  ]' if rows else f'  "{key}": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain_locations(locations: Mapping[str, Location]) -> dict[str, Any]:
    return {name: location.as_json() for name, location in locations.items()}


def _plain_frames(frames: tuple[Frame, ...]) -> list[list[Any]]:
    return [[frame.function, frame.line] for frame in frames]


def user_directory() -> Path:
    """Return where this user's own recipes are kept; it need not exist."""
    # The XDG specification has relative values ignored.
    base = Path(os.environ.get("XDG_DATA_HOME") or "")
    if not base.is_absolute():
        base = Path.home() / ".local" / "share"
    return base / "ksmtrace" / "recipes"


def find_recipe(build_id: str | None, directory: Path | None = None) -> Recipe | None:
    """Return the recipe for exactly this build: the user's own, else the one shipped, else None.

    Args:
        build_id: GNU build-id in hex; None (the kernel does not tell) finds nothing.
        directory: of the user's recipes, by default :func:`user_directory`.

    Raises:
        RecipeError: there is one, but it is malformed or for another build.
    """
    if build_id is None or not _BUILD_ID.fullmatch(build_id):
        return None
    name = f"{build_id}.json"
    path = (directory or user_directory()) / name
    text = None if _is_closed(path) else _read(path)
    if text is None:
        shipped = resources.files("ksmtrace.capture") / "recipes" / name
        if not shipped.is_file():
            return None
        return parse_recipe(shipped.read_text("utf-8"), name, build_id)
    return parse_recipe(text, str(path), build_id)


def read_recipe(path: Path) -> Recipe:
    """Read one recipe, whose file must be named after the build-id in it.

    Raises:
        RecipeError: the file is absent, unreadable, malformed, or has another build's name.
    """
    text = _read(path)
    if text is None:
        raise RecipeError(f"there is no {path}")
    return parse_recipe(text, str(path), path.stem)


def shipped_recipes() -> list[Recipe]:
    """Return every recipe that comes with ksmtrace, by release."""
    folder = resources.files("ksmtrace.capture") / "recipes"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    recipes = [
        parse_recipe((folder / name).read_text("utf-8"), name, name.removesuffix(".json"))
        for name in names
        if name.endswith(".json")
    ]
    return sorted(recipes, key=_by_release)


def user_recipe_files(directory: Path | None = None) -> list[Path]:
    """Return the files of this user's own recipes, unread."""
    return sorted((directory or user_directory()).glob("*.json"))


def write_recipe(recipe: Recipe, directory: Path) -> Path:
    """Write a recipe under its build-id, in one step; returns the file."""
    path = directory / f"{recipe.build_id}.json"
    fresh = directory / f".{recipe.build_id}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(recipe.as_text(), "utf-8")
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be written: {error.strerror}", "choose another place with -o"
        ) from error
    return path


def _by_release(recipe: Recipe) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", recipe.release)], recipe.version


def _is_closed(path: Path) -> bool:
    """Tell whether the file is in a directory closed to this user, as root's home is to others."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> str | None:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RecipeError(f"{path} is no recipe: larger than {_MAX_FILE_BYTES} bytes")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no recipe: not UTF-8") from error


def parse_recipe(text: str, source: str, build_id: str) -> Recipe:
    """Validate and return a recipe.

    Args:
        text: JSON, in the form that :meth:`Recipe.as_text` writes (docs/sites.md).
        source: what to call it in an error.
        build_id: the build it must be for.

    Raises:
        RecipeError: not valid, or for another build.
    """
    reading = _Reading(source)
    try:
        document = json.loads(text, object_pairs_hook=reading.no_key_twice)
    except (ValueError, RecursionError) as error:
        reading.fail("it", f"is not JSON ({error})")
    keys = ("format", "build_id", "release", "version", "sites", "calls")
    # Before all else: another format may have other keys.
    if isinstance(document, dict) and document.get("format", FORMAT) != FORMAT:
        reading.fail("format", f"is {document['format']!r}, and this ksmtrace reads {FORMAT}")
    top = reading.members(document, "it", keys)
    reading.whole(top["format"], "format", FORMAT, FORMAT)
    found = reading.matching(top["build_id"], "build_id", _BUILD_ID)
    if found != build_id:
        raise RecipeError(
            f"{source} is refused: it is the recipe of build {found}, not of {build_id}",
            "a recipe serves exactly one build; make one with `ksmtrace sites resolve VMLINUX`",
        )
    recipe = Recipe(
        found,
        reading.text(top["release"], "release"),
        reading.text(top["version"], "version"),
        reading.each(top["sites"], "sites", reading.site),
        reading.each(top["calls"], "calls", reading.call),
    )
    if len(recipe._calls_by_return) != len(recipe.calls):
        reading.fail("calls", "has one return address twice")
    places = {(site.function, site.symbol, site.offset) for site in recipe.sites}
    if len(places) != len(recipe.sites):
        reading.fail("sites", "has one site twice")
    return recipe


class _Reading:
    """Checks plain JSON against the form, and says where it departs from it."""

    def __init__(self, source: str) -> None:
        self._source = source

    def fail(self, where: str, what: str) -> NoReturn:
        raise RecipeError(
            f"{self._source} is no valid recipe: {where} {what}",
            "remove the file, or make it anew with `ksmtrace sites resolve VMLINUX`",
        )

    def no_key_twice(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return members

    def members(self, value: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(where, "is not an object")
        for key in keys:
            if key not in value:
                self.fail(where, f"lacks {key!r}")
        for key in value:
            if key not in keys:
                self.fail(where, f"has an unknown key {key!r}")
        return value

    def each(self, value: Any, where: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
        if not isinstance(value, list):
            self.fail(where, "is not a list")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    def whole(self, value: Any, where: str, least: int, most: int) -> int:
        # True is an int to Python, and no number here.
        if type(value) is not int or not least <= value <= most:
            self.fail(where, f"is {value!r}, not a whole number from {least} to {most}")
        return value

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value.isprintable():
            self.fail(where, f"is {value!r}, not a line of text")
        return value

    def matching(self, value: Any, where: str, pattern: re.Pattern[str]) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.fail(where, f"is {value!r}")
        return value

    def name(self, value: Any, where: str) -> str:
        return self.matching(value, where, _IDENTIFIER)

    def site(self, value: Any, where: str) -> Site:
        keys = ("function", "symbol", "offset", "arguments", "surrounding", "frames")
        site = self.members(value, where, keys)
        symbol = self.name(site["symbol"], f"{where}.symbol")
        function = self.name(site["function"], f"{where}.function")
        frames = self.frames(site["frames"], f"{where}.frames", symbol)
        if frames[0].function != function:
            self.fail(f"{where}.frames", f"does not begin with {function}")
        return Site(
            function,
            symbol,
            self.whole(site["offset"], f"{where}.offset", 0, _MAX_SYMBOL_BYTES),
            self.locations(site["arguments"], f"{where}.arguments"),
            self.locations(site["surrounding"], f"{where}.surrounding"),
            frames,
        )

    def call(self, value: Any, where: str) -> Call:
        call = self.members(value, where, ("callee", "symbol", "return_offset", "frames"))
        symbol = self.name(call["symbol"], f"{where}.symbol")
        return Call(
            self.name(call["callee"], f"{where}.callee"),
            symbol,
            self.whole(call["return_offset"], f"{where}.return_offset", 1, _MAX_SYMBOL_BYTES),
            self.frames(call["frames"], f"{where}.frames", symbol),
        )

    def frames(self, value: Any, where: str, symbol: str) -> tuple[Frame, ...]:
        frames = self.each(value, where, self.frame)
        if not frames or frames[-1].function != symbol:
            self.fail(where, f"does not end with {symbol}")
        return frames

    def frame(self, value: Any, where: str) -> Frame:
        if not isinstance(value, list) or len(value) != 2:
            self.fail(where, "is not a pair of function and line")
        function, line = value
        return Frame(self.name(function, where), self.whole(line, where, 0, _MAX_LINE))

    def locations(self, value: Any, where: str) -> Mapping[str, Location]:
        if not isinstance(value, dict):
            self.fail(where, "is not an object")
        return {
            self.name(name, where): self.location(item, f"{where}.{name}")
            for name, item in value.items()
        }

    def location(self, value: Any, where: str) -> Location:
        if not isinstance(value, dict) or not {"register"} <= set(value):
            self.fail(where, "is not an object with a register")
        kind = next((key for key in ("offset", "add") if key in value), None)
        self.members(value, where, ("register", *([kind] if kind else [])))
        register = value["register"]
        if register not in REGISTERS:
            self.fail(f"{where}.register", f"is {register!r}, no register of x86-64")
        reach = _MAX_SYMBOL_BYTES
        offset = self.whole(value[kind], f"{where}.{kind}", -reach, reach) if kind else 0
        return Location(register, offset, kind == "offset")
