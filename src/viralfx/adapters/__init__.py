"""One package per technology; each answers the domain's ports for it."""
