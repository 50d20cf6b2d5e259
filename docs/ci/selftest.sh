#!/bin/sh
# Tests KSM of a kernel just built, in a guest: sh selftest.sh LINUX_TREE
#
# A CI job for any system that goes by exit statuses: 0 fine, also where nothing could be tested
# (say so with a status of its own if that must not pass unseen); 1 a claim about KSM is violated,
# or the kernel was lost. What is left behind: selftest.ktap, and selftest/ with the recording,
# which `ksmtrace check selftest` judges again anywhere.
#
# The kernel takes CONFIG_KSM, and for a guest PCI, VIRTIO_PCI, VIRTIO_CONSOLE, NET_9P_VIRTIO, 9P_FS,
# OVERLAY_FS, TMPFS, DEVTMPFS and BLK_DEV_INITRD, built in or as modules that
# `make modules_install INSTALL_MOD_PATH=.` has put below the tree. BPF_SYSCALL, BPF_JIT, BPF_EVENTS,
# DEBUG_INFO_BTF, KPROBE_EVENTS, FUNCTION_TRACER, KALLSYMS_ALL and PROC_KCORE make more claims
# testable; so do MEMCG with ZRAM (swap), NUMA, TRANSPARENT_HUGEPAGE, and MEMORY_HOTREMOVE with
# ACPI_HOTPLUG_MEMORY.
set -eu
linux=${1:?usage: selftest.sh LINUX_TREE}

status=0
ksmtrace selftest --kernel "$linux/arch/x86/boot/bzImage" --save selftest --ktap \
	>selftest.ktap || status=$?

# For people; kunit.py comes with the kernel.
python3 "$linux/tools/testing/kunit/kunit.py" parse selftest.ktap || true

case $status in
4) echo "selftest: skipped, see above" && exit 0 ;;
*) exit "$status" ;;
esac
