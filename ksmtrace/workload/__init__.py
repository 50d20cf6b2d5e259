"""Known workloads for KSM, and the saving and restoring of its knobs."""
