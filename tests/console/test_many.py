"""The operations console with many checks, processes and jobs."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from tests.console.console_app import PLANTED
from tests.console.pages import APP, QUICK, Console, console
from tests.servers.postgres import Database, PostgresServer
from tests.system.service import running
from tests.system.workers import environment_of

from viralfx.domain.fleet import MAX_ENDED

CHECKS, PROCESSES, ENDED, JOBS = 200, 500, 203, 12_000
MARKUP = PLANTED.replace("'", "''")
"""As a text of SQL: a process of another version may have any name of a check."""
SHOWN_JOBS = 100

FLEET = """
INSERT INTO viralfx_instances (instance, host, role, version, environment, started_at, seen_at,
    state, reason, health, checks, jobs, queues)
SELECT 'pod-' || n, 'pod-' || n, (ARRAY['api', 'worker'])[1 + n % 2], '1.0.' || n % 3, 'production',
    now() - interval '1 hour', now() + interval '1 hour', 'ready', '', 'healthy',
    '{{"database": "pass", "redis": "warn"}}', n % 10, '{{default}}'
FROM generate_series(1, {processes}) AS n
"""
STOPPED = """
INSERT INTO viralfx_instances (instance, host, role, version, environment, started_at, seen_at,
    state, reason, health, checks, jobs, queues)
SELECT 'old-' || n, 'old-' || n, 'api', '0.9.0', 'production', now() - interval '1 day',
    now() - interval '1 hour', 'stopped', 'SIGTERM', 'healthy', '{{}}', 0, '{{}}'
FROM generate_series(1, {ended}) AS n
"""
MARKED = (
    """
    UPDATE viralfx_instances SET version = '{markup}', environment = '{markup}',
        reason = '{markup}', checks = json_build_object('{markup}', 'fail')
    WHERE instance = 'pod-7'
    """,
    """
    INSERT INTO viralfx_transitions (instance, number, check_name, at, old, new, code)
    VALUES ('pod-7 {markup}', 1, '{markup}', now() + interval '1 hour', 'pass', 'fail', '{markup}')
    """,
)
FAILED = """
INSERT INTO viralfx_jobs (id, queue, task, payload, created_at, run_at, finished_at, state,
    attempts, claims, error_code, error_message)
SELECT (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid, 'notifications',
    'console.webhook', 'null', now(), now(), now(), 'failed', 1, 1, 'error', 'planted'
FROM generate_series(1, {jobs}) AS n
"""


@pytest.fixture(scope="module")
def opened(browser: Browser, postgres: PostgresServer) -> Iterator[Console]:
    """Return a page of a process that has everything in large numbers."""
    database = Database(postgres, postgres.create_database())
    # So many checks at once may take longer than the time-out of QUICK.
    patient = {
        "HEALTH_CHECK_INTERVAL": "10000",
        "HEALTH_CHECK_TIMEOUT": "10000",
        "DB_HEALTH_CHECK_INTERVAL": "10000",
    }
    environment = environment_of(database, **QUICK | patient, MORE_CHECKS=str(CHECKS - 1))
    database.execute(FLEET.format(processes=PROCESSES))
    database.execute(STOPPED.format(ended=ENDED))
    for statement in MARKED:
        database.execute(statement.format(markup=MARKUP))
    database.execute(FAILED.format(jobs=JOBS))
    with (
        running(*APP, management=True, environment=environment) as service,
        console(browser, service.wait_ready()) as page,
    ):
        yield page
    postgres.drop_database(database.name)


def test_two_hundred_checks(opened: Console) -> None:
    """Each has a row, and the details of the last one open."""
    opened.open("status")
    rows = opened.main.get_by_role("row").filter(has_text="The supplier answers")
    expect(rows).to_have_count(CHECKS)
    opened.click(opened.page.get_by_role("button", name=f"supplier-{CHECKS - 2}", exact=True))
    expect(opened.main.locator("pre")).to_be_visible()
    opened.require_clean()


def test_five_hundred_processes(opened: Console) -> None:
    """All that run are in the list, and the last ended ones; the sentence counts those that run."""
    opened.open("fleet")
    expect(opened.main).to_contain_text(f"{PROCESSES + 1} instances")
    rows = opened.main.locator("tbody tr")
    expect(rows).to_have_count(PROCESSES + 1 + MAX_ENDED)
    expect(opened.main).to_contain_text(f"{ENDED - MAX_ENDED} more processes ended earlier.")
    opened.page.get_by_label("Role").select_option("worker")
    expect(rows).to_have_count(PROCESSES // 2)
    opened.require_clean()


def test_markup_in_the_rows_of_other_processes_stays_text(opened: Console) -> None:
    """The names of their checks, their versions, and the codes of their changes."""
    opened.open("fleet")
    name = opened.page.get_by_role("rowheader", name="pod-7", exact=True)
    row = opened.main.get_by_role("row").filter(has=name)
    expect(row).to_contain_text(f"{PLANTED} ✕ fail")
    expect(row.locator("td[data-label=Version]")).to_have_text(PLANTED)
    opened.open("changes")
    change = opened.main.get_by_role("row").filter(has_text="pod-7 ")
    for label in ("Check", "Code", "Instance"):
        expect(change.locator(f"td[data-label={label}]")).to_contain_text(PLANTED)
    opened.require_clean()


def test_a_link_to_other_jobs_leaves_the_focus_in_the_view(opened: Console) -> None:
    """It goes with the rows above it, so the focus is on the heading that they come below."""
    opened.open("jobs?state=failed")
    heading = opened.page.get_by_role("heading", level=1)
    for name, then in (("Older jobs", "Newest"), ("Newest", "Older jobs")):
        opened.main.get_by_role("link", name=name).press("Enter")
        expect(opened.main.get_by_role("link", name=then)).to_be_visible()
        expect(heading).to_be_focused()
    opened.page.get_by_role("button", name="Last day").press("Enter")
    expect(opened.page.get_by_role("button", name="Last day")).to_be_focused()
    opened.page.get_by_role("button", name="Any time").press("Enter")
    expect(opened.page.get_by_role("button", name="Any time")).to_have_count(0)
    expect(heading).to_be_focused()
    opened.require_clean()


def test_more_jobs_than_are_counted(opened: Console) -> None:
    """A page of jobs is shown; the number before a change says "at least", and all are changed."""
    opened.open("jobs?state=failed")
    expect(opened.main.locator("tbody tr")).to_have_count(SHOWN_JOBS)
    opened.click(opened.main.get_by_role("link", name="Older jobs"))
    expect(opened.main.get_by_role("link", name="Newest")).to_be_visible()
    opened.open("jobs?state=failed")
    opened.click(opened.main.get_by_role("button", name="Retry all that match"))
    sure = opened.page.get_by_role("button", name=re.compile("^Retry at least 10,?000 jobs$"))
    opened.click(sure)
    # The line that counts them does not stay: each change of a check replaces it.
    expect(opened.main).to_contain_text("No job matches")
    opened.require_clean()
