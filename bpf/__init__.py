"""The BPF programs in C, found through ``importlib.resources.files("ksmtrace.bpf")``."""
