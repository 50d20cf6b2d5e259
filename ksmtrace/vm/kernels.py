"""The kernels that guests boot: from a Debian package, or an image that somebody built."""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import CannotRun, UsageError
from ksmtrace.vm import packages
from ksmtrace.vm.cache import Notify, cache_directory

_SERIES = re.compile(r"[0-9]+\.(?:[0-9]+|x)")
_RELEASE = re.compile(r"[0-9]+\.[0-9]+[0-9a-z.+~-]*-amd64")


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel.

    Attributes:
        release: what ``uname -r`` says in the guest.
        vmlinuz: the bzImage.
        modules: the directory ``lib/modules/RELEASE``; None where all is built in.
        system_map: the symbol table, None where it does not come along.
    """

    release: str
    vmlinuz: Path
    modules: Path | None
    system_map: Path | None

    @property
    def build_id(self) -> str | None:
        """Return the GNU build-id of vmlinux in hex, None where it cannot be read."""
        return read_build_id(self.vmlinuz)


def find_kernel(
    what: str, modules: Path | None = None, notify: Notify = lambda text: None
) -> Kernel:
    """Return the kernel that ``what`` names, fetched where need be.

    Args:
        what: a Debian series (``6.12``, or ``7.x`` for the newest 7), a Debian kernel's release
            (``6.1.0-57-amd64``), or a path to a bzImage.
        modules: the modules of that bzImage, where they are not in its own directory tree.
        notify: is told what takes time.
    """
    if _SERIES.fullmatch(what) or _RELEASE.fullmatch(what):
        if modules is not None:
            raise UsageError("a Debian kernel brings its own modules", "leave --modules out")
        return kernel_in(packages.fetch(what, notify))
    path = Path(what)
    if not path.is_file():
        raise UsageError(
            f"{what!r} is neither a kernel series nor a file",
            "give 5.10, 6.1, 6.12, 7.x, ..., or the path of a bzImage",
        )
    return _kernel_at(path.resolve(), modules)


def kernel_in(root: Path) -> Kernel:
    """Return the one kernel in an unpacked package.

    Newer packages have everything below usr/lib/modules, and an image that is not signed has
    `.unsigned` at the end of its name.
    """
    images = [*root.glob("boot/vmlinuz-*"), *root.glob("lib/modules/*/vmlinuz*")]
    if len(images) != 1:
        raise CannotRun(f"{root} holds {len(images)} kernels", f"rm -r {root}")
    release = read_release(images[0])
    modules = root / "lib" / "modules" / release
    maps = [root / "boot" / f"System.map-{release}", modules / "System.map"]
    return Kernel(release, images[0], modules, next((path for path in maps if path.exists()), None))


def _kernel_at(vmlinuz: Path, modules: Path | None) -> Kernel:
    release = read_release(vmlinuz)
    if modules is None:
        modules = _modules_beside(vmlinuz, release)
    else:
        inner = modules / "lib" / "modules" / release
        modules = (inner if inner.is_dir() else modules).resolve()
        if not (modules / "modules.order").exists():
            raise UsageError(
                f"{modules} holds no modules", f"give lib/modules/{release} or what it is in"
            )
    maps = [vmlinuz.with_name(f"System.map-{release}"), vmlinuz.with_name("System.map")]
    tree = vmlinuz.parents[3] if vmlinuz.match("arch/*/boot/bzImage") else None
    if tree is not None:
        maps.append(tree / "System.map")
    system_map = next((path for path in maps if path.exists()), None)
    if modules is not None and tree is None:
        vmlinuz = _beside_modules(vmlinuz, modules, release)
    return Kernel(release, vmlinuz, modules, system_map)


def _modules_beside(vmlinuz: Path, release: str) -> Path | None:
    for directory in vmlinuz.parents:
        # The second is where virtme-ng lays out the modules of a build tree.
        for name in (f"lib/modules/{release}", ".virtme_mods/lib/modules/0.0.0"):
            if (directory / name).is_dir():
                return directory / name
    return None


# virtme-ng looks for modules in the directories above the image only.
def _beside_modules(vmlinuz: Path, modules: Path, release: str) -> Path:
    name = hashlib.sha256(f"{vmlinuz}\n{modules}".encode()).hexdigest()[:16]
    root = cache_directory() / "images" / name
    for link, target in (
        (root / "boot" / f"vmlinuz-{release}", vmlinuz),
        (root / "lib" / "modules" / release, modules),
    ):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)
    return root / "boot" / f"vmlinuz-{release}"


def read_release(vmlinuz: Path) -> str:
    """Return the release that a bzImage's setup header points at.

    Source: Documentation/arch/x86/boot.rst, "kernel_version".
    """
    with vmlinuz.open("rb") as image:
        header = image.read(0x8000)
    if header[0x202:0x206] != b"HdrS":
        raise UsageError(f"{vmlinuz} is no bzImage", "it is arch/x86/boot/bzImage in a build tree")
    (pointer,) = struct.unpack_from("<H", header, 0x20E)
    text = header[0x200 + pointer :].split(b"\0", 1)[0].decode(errors="replace")
    release = text.split(" ", 1)[0]
    if pointer == 0 or not re.fullmatch(r"[\w.+~-]+", release):
        raise UsageError(f"{vmlinuz} does not say which kernel it is")
    return release


def read_build_id(vmlinuz: Path) -> str | None:
    """Return the build-id in a bzImage, None where its payload cannot be decompressed here.

    Source: Documentation/arch/x86/boot.rst, "payload_offset" and "payload_length".
    """
    image = vmlinuz.read_bytes()
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = _decompress(image[start : start + length])
    return None if payload is None else _build_id_of_elf(payload)


def _decompress(payload: bytes) -> bytes | None:
    # The build appends the size of what it compressed (scripts/Makefile.lib: size_append).
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(payload)
    zstd = shutil.which("zstd")
    if payload.startswith(b"\x28\xb5\x2f\xfd") and zstd is not None:
        done = subprocess.run([zstd, "-dcq"], input=payload[:-4], capture_output=True)
        return done.stdout or None
    return None


def _build_id_of_elf(elf: bytes) -> str | None:
    if elf[:5] != b"\x7fELF\x02":
        return None
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for number in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", elf, table + number * size)
        # PT_NOTE
        if kind == 4:
            found = re.search(
                rb"\x04\0\0\0(.)\0\0\0\x03\0\0\0GNU\0", elf[offset : offset + length], re.DOTALL
            )
            if found:
                begin = offset + found.end()
                return elf[begin : begin + found[1][0]].hex()
    return None
