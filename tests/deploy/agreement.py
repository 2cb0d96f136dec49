"""Compares the manifests with the code; each disagreement is a complaint of one line.

As a program it reads rendered overlays from standard input and prints the complaints, so that the
same rules can check a changed copy of the code.
"""

import json
import sys
from typing import Any

from tests.deploy.cluster_rules import rules_of_the_cluster
from tests.deploy.manifests import Resource
from tests.deploy.program_rules import rules_of_the_program


def complaints(name: str, resources: list[Resource]) -> list[str]:
    """Return what is wrong with an overlay, each with the name of its rule before a colon.

    A rule that fails on a broken overlay adds a complaint.
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
    print(json.dumps({name: complaints(name, found) for name, found in overlays.items()}))
