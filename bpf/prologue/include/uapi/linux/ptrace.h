/* See linux/kconfig.h of this tree. The registers as a kprobe's program finds them, on x86-64
 * (arch/x86/include/asm/ptrace.h:struct pt_regs; part of the ABI, see <sys/ptrace.h>).
 */
#ifndef KSMTRACE_PROLOGUE_PTRACE_H
#define KSMTRACE_PROLOGUE_PTRACE_H

struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};

#endif
