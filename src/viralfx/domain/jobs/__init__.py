"""Jobs that are never lost: their words, the ports that keep and announce them, the worker."""
