/* See linux/kconfig.h of this tree. */
