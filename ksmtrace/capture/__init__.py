"""From a plan to the stream: which hook carries which event, loading, attaching, draining."""
