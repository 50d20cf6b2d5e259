"""What a stream means: passes, merges, books, processes."""
