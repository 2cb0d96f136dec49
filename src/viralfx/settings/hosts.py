"""What can be the name of a host at all."""


def is_possible_host(host: str) -> bool:
    """Tell whether a name could be looked up: no empty label, none that is too long."""
    if host.startswith("/"):
        return True
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True
