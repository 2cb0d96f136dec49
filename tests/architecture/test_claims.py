"""The claims of README, docs and decision records hold; each rule is shown to bite."""

import re
from collections.abc import Callable, Iterator, Mapping

import pytest
from tests.architecture import claims, claims_shown
from tests.architecture.claims import documents, missing_endpoints
from tests.architecture.claims_shown import missing_sentences

RULES: tuple[Callable[[str], Iterator[str]], ...] = (
    claims.endpoints,
    claims.answers,
    claims.exits,
    claims.variables,
    claims.values,
    claims.names,
    claims.identifiers,
    claims.arguments,
    claims_shown.commands,
    claims_shown.python,
    claims_shown.manifests,
    claims_shown.figures,
    claims_shown.sentences,
)


def refuted(texts: Mapping[str, str]) -> list[str]:
    """Return each claim of the documents that the code does not bear out."""
    found = [f"{name}: {line}" for name, text in texts.items() for r in RULES for line in r(text)]
    return [*found, *missing_endpoints(texts), *missing_sentences(texts)]


def test_no_document_claims_what_the_code_refutes() -> None:
    """Endpoints, exit codes, variables, values, names, commands, examples and figures."""
    assert len(documents()) > 50
    assert refuted(documents()) == []


EDITS: dict[str, tuple[str, str, str]] = {
    "another method": (
        r"`PUT /health/loggers/\{name\}`",
        "`POST /health/loggers/{name}`",
        "endpoint: there is no POST /health/loggers/{name}",
    ),
    "another path": (
        "`GET /health/startup`",
        "`GET /health/started/up`",
        "endpoint: there is no GET /health/started/up",
    ),
    "a status that is not answered": (
        r"(\| `POST /health/shutdown` \|.*)\b401\b",
        r"\g<1>418",
        "has no status 418",
    ),
    "an exit code": (r"^\| 124 \|", "| 125 |", "exit code: 125 is no constant"),
    "an exit code in a sentence": ("exit code 3", "exit code 33", "exit code: 33 is no constant"),
    "a budget": (
        r"(`SHUTDOWN_DRAIN_TIMEOUT`(?: \|)? )30( s)?",
        r"\g<1>45\2",
        "value: SHUTDOWN_DRAIN_TIMEOUT is 30000, not 45",
    ),
    "a default in brackets": (
        r"`MANAGEMENT_PORT`\s+\(3001\)",
        "`MANAGEMENT_PORT` (3002)",
        "value: MANAGEMENT_PORT is 3001, not 3002",
    ),
    "a default with a unit": (
        r"(`LOOP_STALL_THRESHOLD`\s+)\(500 ms\)",
        r"\1(600 ms)",
        "value: LOOP_STALL_THRESHOLD is 500, not 600 ms",
    ),
    "a default in a table": (
        r"(`HTTP_MAX_HEADERS`[^|\n]*\| )100\b",
        r"\g<1>200",
        "value: HTTP_MAX_HEADERS is 100, not 200",
    ),
    "a variable that is none": (
        "`JOB_MAX_CRASHES`",
        "`JOB_MAX_CRASH`",
        "variable: JOB_MAX_CRASH is no setting",
    ),
    "a variable in another order": (
        "`WEBHOOK_ALLOWED_HOSTS`",
        "`WEBHOOK_HOSTS_ALLOWED`",
        "variable: WEBHOOK_HOSTS_ALLOWED is no setting",
    ),
    "a value that is refused": (
        "`HEALTH_DETAILS=authorized`",
        "`HEALTH_DETAILS=private`",
        "value: HEALTH_DETAILS=private",
    ),
    "a code that is none": (
        "`schema_behind`",
        "`schema_old`",
        "name: schema_old of `schema_old` is not in the code",
    ),
    "a function that is none": (
        "`get_with_graceful_degradation`",
        "`get_with_graceful_default`",
        "name: get_with_graceful_default of",
    ),
    "a metric": (
        "`viralfx_http_rejected_total",
        "`viralfx_http_refused_total",
        "name: viralfx_http_refused_total is no metric",
    ),
    "an event of a span": (
        r"`viralfx\.job\.attempt_failed`",
        "`viralfx.task.attempt_failed`",
        "name: viralfx.task.attempt_failed is no name",
    ),
    "a log message": (
        "`Log lines were lost`",
        "`Log lines are lost`",
        "name: 'Log lines are lost' is no message",
    ),
    "an argument": (r"^\| `transactional` \|", "| `transaction` |", "argument: task has no"),
    "a recipe": ("`just fuzz-api`", "`just fuzz-http`", "there is no recipe fuzz-http"),
    "a command": ("`viralfx doctor", "`viralfx examine", "there is no viralfx examine"),
    "an option": ("`viralfx serve --app`", "`viralfx serve --apps`", "viralfx serve has no --apps"),
    "a path in a shell block": (
        r"curl -s localhost:3000/health/ready",
        "curl -s localhost:3000/readiness",
        "command: there is no path /readiness",
    ),
    "a script in a shell block": (
        r"^\.ci/venv &&",
        ".ci/environment &&",
        "command: .ci/environment does not exist",
    ),
    "syntax in a shell block": (r"^wait %1$", 'wait "%1', "unexpected EOF"),
    "a method in an example": (
        r"plugin\.database\.execute_with_retry\(",
        "plugin.database.execute_retrying(",
        "example: nothing has an attribute execute_retrying",
    ),
    "an argument in an example": (
        r"@retry\(attempts=3, base_delay=",
        "@retry(attempts=3, delay=",
        "example: retry has no argument delay",
    ),
    "an import in an example": (
        "from viralfx import CircuitBreaker, retry",
        "from viralfx import Breaker, retry",
        "example: viralfx has no Breaker",
    ),
    "syntax in an example": (r"OperationsPlugin\(\)\]\)", "OperationsPlugin(])", "example: "),
    "the path of a probe": (
        "path: /health/live",
        "path: /health/alive",
        "yaml: no manifest has this livenessProbe",
    ),
    "the port of a probe": (
        r"(path: /health/live\s*, +port: )300\d",
        r"\g<1>3009",
        "yaml: no manifest has this livenessProbe",
    ),
    "the threshold of a probe": (
        "failureThreshold: 90",
        "failureThreshold: 30",
        "yaml: no manifest has this startupProbe",
    ),
    "a ratio": (r"\| 4\.12 \|", "| 4.59 |", "figure: "),
    "a figure with a unit": (r"8\.50 ms", "12.07 ms", "figure: "),
    "waits": (r"0\.5, 1 and 2 s", "0.5, 1 and 3 s", "should have 0.5, 1, 2"),
    "waits of jobs": (r"1, 2, 4 \.\.\. s", "1, 3, 9 ... s", "should have 1, 2, 4"),
    "replicas": ("viralfx-backend, 3 to 6", "viralfx-backend, 3 to 9", "should have 3, 6"),
    "a share of memory": (r"more than 75 % of", "more than 85 % of", "should have 75"),
    "the grace period of a decision": (
        'Chosen option: "75 s, and',
        'Chosen option: "90 s, and',
        "should have 75",
    ),
    "a budget of a decision": (r"30 s of drain", "45 s of drain", "should have 30"),
    "a goal of a decision": (r"reaches 1\.5 of", "reaches 0.99 of", "is no limit"),
}
"""A pattern in some document, a wrong edit of it, and a part of the line that reports it."""


def edited(pattern: str, replacement: str) -> tuple[str, str]:
    """Return the first document that the pattern is in, as it is and with one edit."""
    for text in documents().values():
        changed, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
        if count:
            return text, changed
    raise AssertionError(f"{pattern!r} is in no document")


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_edit_is_reported(name: str) -> None:
    """Each class of wrong edit makes a line that was not there before."""
    pattern, replacement, expected = EDITS[name]
    before, after = edited(pattern, replacement)
    new = {line for rule in RULES for line in rule(after)}
    new -= {line for rule in RULES for line in rule(before)}

    assert [line for line in new if expected in line] != []


def test_an_endpoint_that_no_table_lists_is_reported() -> None:
    """Removing a row is a wrong edit, too."""
    texts = {
        name: re.sub(r"^\| `GET /health/startup` .*\n", "", text, flags=re.MULTILINE)
        for name, text in documents().items()
    }

    assert "endpoint: no table lists GET /health/startup" in [*missing_endpoints(texts)]


def test_a_sentence_that_is_gone_is_reported() -> None:
    """A reworded sentence must not escape its comparison."""
    assert len([*missing_sentences({"README.md": "Nothing of the kind."})]) > 10
