"""The recording file: written from a stream, and read back as the same stream."""
