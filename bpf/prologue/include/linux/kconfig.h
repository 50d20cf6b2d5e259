/*
 * The little that bcc's own prologue (bcc/helpers.h) takes from kernel headers.
 *
 * bcc includes this file before everything else. Our programs take no kernel
 * struct from headers (offsets come from the running kernel's BTF), so these
 * definitions are all they need, and ksmtrace works where no linux-headers
 * package exists. The other files of this tree are there to be found, and empty.
 */
#ifndef KSMTRACE_PROLOGUE_H
#define KSMTRACE_PROLOGUE_H

#define CONFIG_BPF_SYSCALL 1

#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#ifndef LINUX_VERSION_CODE
/* bcc asks only whether helpers newer than 4.x may be used: yes on all we support. */
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 10, 0)
#endif

/* bcc's ring macro sizes the map in pages of this constant, whatever the kernel's. */
#define PAGE_SIZE 4096UL

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;

typedef __u8 u8;
typedef __s8 s8;
typedef __u16 u16;
typedef __s16 s16;
typedef __u32 u32;
typedef __s32 s32;
typedef __u64 u64;
typedef __s64 s64;

typedef __u16 __le16;
typedef __u16 __be16;
typedef __u32 __le32;
typedef __u32 __be32;
typedef __u64 __le64;
typedef __u64 __be64;
typedef __u16 __sum16;
typedef __u32 __wsum;

#define __always_inline inline __attribute__((__always_inline__))
#define __aligned_u64 __u64 __attribute__((aligned(8)))

typedef unsigned long size_t;
typedef unsigned long uintptr_t;
typedef int pid_t;
typedef _Bool bool;

#define true 1
#define false 0
#define NULL ((void *)0)

#endif
