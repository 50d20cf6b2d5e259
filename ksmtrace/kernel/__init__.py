"""Facts about a kernel, read from its own interfaces: read only, no policy."""
