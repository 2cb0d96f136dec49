"""The jobs API: accepts, finds, lists, retries, cancels and follows jobs over HTTP."""
