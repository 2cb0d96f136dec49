"""Everything that the manifests and the code have to agree on, as complaints of one line each.

As a program it reads rendered overlays from standard input, and prints the complaints: so the same
rules look at a changed copy of the code.
"""

import json
import sys
from typing import Any

from tests.deploy.cluster_rules import rules_of_the_cluster
from tests.deploy.manifests import Resource
from tests.deploy.program_rules import rules_of_the_program


def complaints(name: str, resources: list[Resource]) -> list[str]:
    """Return what is wrong with an overlay, each with the name of its rule before a colon.

    What is so broken that a rule cannot look at it is a complaint, too.
    """
    found: list[str] = []
    for rules in (rules_of_the_program, rules_of_the_cluster):
        try:
            found += rules(name, resources)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            found.append(f"broken: {type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    overlays: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps({name: complaints(name, found) for name, found in overlays.items()}))  # noqa: T201 - its answer
