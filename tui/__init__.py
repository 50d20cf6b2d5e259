"""The textual application: sees only streams and snapshots, never bcc."""
