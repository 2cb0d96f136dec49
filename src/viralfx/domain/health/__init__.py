"""Health: the check port, its reports, and the monitor that runs the checks."""
