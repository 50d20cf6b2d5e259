"""What has been said about KSM, as data, and whether a kernel does it."""
