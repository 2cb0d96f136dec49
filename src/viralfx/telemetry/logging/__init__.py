"""Log lines: how they are made, redacted, filtered by level and written."""
