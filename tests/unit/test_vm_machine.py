"""What a guest is told, and QEMU's command line."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

from ksmtrace.errors import UsageError
from ksmtrace.vm import kernels, machine
from ksmtrace.vm.kernels import Kernel, find_kernel
from ksmtrace.vm.machine import MIB, Ports, VmOptions, command_script

WORDS = ["a b", "$HOME", "`id`", "'", '"', "\\", "*", "", "-n", "x;y", "ü\n€", "&& false", "~"]


def run_script(script: str) -> subprocess.CompletedProcess[bytes]:
    script = script.replace("/run/ksmtrace.pid", "/dev/null")
    return subprocess.run(["env", "-i", "sh", "-c", script], capture_output=True)


def test_no_word_of_the_command_is_interpreted() -> None:
    done = run_script(command_script(["printf", "%s\\0", *WORDS], os.environ, Path("/")))
    assert done.stdout.decode().split("\0")[:-1] == WORDS


def test_environment_and_directory_are_kept(tmp_path: Path) -> None:
    directory = tmp_path / "a 'dir'"
    directory.mkdir()
    environment = {"PATH": os.environ["PATH"], "ODD": "$X\n'q'", "BASH_FUNC_f%%": "() { :; }"}
    script = command_script(["sh", "-c", 'pwd; printf %s "$ODD"; env'], environment, directory)
    lines = run_script(script).stdout.decode()
    assert lines.startswith(f"{directory}\n$X\n'q'")
    assert "BASH_FUNC" not in lines


def test_a_program_whose_name_looks_like_an_assignment(tmp_path: Path) -> None:
    program = tmp_path / "a=b"
    program.write_text("#!/bin/sh\necho started\n")
    program.chmod(0o755)
    assert run_script(command_script([str(program)], {}, tmp_path)).stdout == b"started\n"


def qemu(options: VmOptions, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(machine, "qemu_program", lambda: "qemu")
    kernel = Kernel("6.12", Path("/k/vmlinuz"), None, None)
    return machine.qemu_command(
        kernel, Path("/r/initramfs"), Path("/r"), Ports(3, 4, 5), options, "tcg"
    )


def test_emulation_has_one_thread_no_avx2_and_shows_no_memory_to_ksm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = qemu(VmOptions(), monkeypatch)
    assert command[command.index("-accel") + 1] == "tcg,thread=single"
    assert command[command.index("-cpu") + 1] == "max,-avx2"
    assert "mem-merge=off" in command[command.index("-machine") + 1]
    assert "-no-reboot" in command


def test_the_host_is_shared_read_only_and_a_writable_directory_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = qemu(VmOptions(writable=[Path("/a,b")]), monkeypatch)
    shares = [command[i + 1] for i, word in enumerate(command) if word == "-fsdev"]
    assert "path=/," in shares[0] and shares[0].endswith("readonly=on")
    assert "path=/a,,b," in shares[1] and "readonly" not in shares[1]


def test_numa_nodes_share_memory_and_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    command = qemu(VmOptions(memory_bytes=1000 * MIB, cpus=4, numa_nodes=3), monkeypatch)
    text = " ".join(command)
    sizes = [f"id=node{node},size={size}M" for node, size in enumerate((333, 333, 334))]
    assert all(size in text for size in sizes)
    assert "nodeid=0,memdev=node0,cpus=0,cpus=1 " in text


def test_hotplug_makes_room_beyond_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(qemu(VmOptions(memory_bytes=1024 * MIB, hotplug_bytes=256 * MIB), monkeypatch))
    assert "-m 1024M,slots=1,maxmem=1280M" in text
    assert "online_movable" in text


def test_a_guest_cannot_be_too_small() -> None:
    with pytest.raises(UsageError):
        VmOptions(memory_bytes=64 * MIB)


@pytest.mark.parametrize("directory", ["/", "/proc", "/sys/kernel", "/no/such"])
def test_directories_that_cannot_be_writable(directory: str) -> None:
    with pytest.raises(UsageError):
        machine.check_writable([Path(directory)])


def bzimage(path: Path, release: str = "6.12.0-test") -> Path:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x400)
    image[0x600 : 0x600 + len(release) + 8] = release.encode() + b" (me) #1"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    return path


def test_a_bzimage_finds_modules_and_map_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = bzimage(tmp_path / "boot" / "vmlinuz")
    (tmp_path / "boot" / "System.map-6.12.0-test").touch()
    modules = tmp_path / "lib" / "modules" / "6.12.0-test"
    modules.mkdir(parents=True)
    kernel = find_kernel(str(image))
    assert kernel.release == "6.12.0-test"
    assert kernel.modules == modules
    assert kernel.system_map == tmp_path / "boot" / "System.map-6.12.0-test"
    assert kernel.vmlinuz.resolve() == image


def test_a_bzimage_with_all_built_in(tmp_path: Path) -> None:
    image = bzimage(tmp_path / "arch" / "x86" / "boot" / "bzImage")
    (tmp_path / "System.map").touch()
    kernel = find_kernel(str(image))
    assert (kernel.modules, kernel.system_map) == (None, tmp_path / "System.map")


def test_what_is_no_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(0x8000))
    for what in (str(tmp_path / "file"), str(tmp_path), "newest", "6", "6.1.2"):
        with pytest.raises(UsageError):
            find_kernel(what)


def test_the_build_id_of_an_elf_file() -> None:
    note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0" + bytes(range(20))
    elf = bytearray(64) + struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4) + note
    elf[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", elf, 32, 64)
    struct.pack_into("<HH", elf, 54, 56, 1)
    assert kernels._build_id_of_elf(bytes(elf)) == bytes(range(20)).hex()
    assert kernels._build_id_of_elf(b"no elf") is None
