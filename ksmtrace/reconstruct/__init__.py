"""What mm/ksm.c holds at a moment, rebuilt from the events."""
