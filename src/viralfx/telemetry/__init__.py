"""What the domain's events look like to others: log lines here, metrics and traces later."""
