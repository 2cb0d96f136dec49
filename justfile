# Recipes for daily work. `.ci/venv --dev` makes the environment they use.

bin := ".venv/bin"

# list the recipes
default:
    @just --list

# serve on port 3000, in memory
serve *arguments:
    {{bin}}/viralfx serve {{arguments}}

# all tests
test *arguments:
    {{bin}}/pytest {{arguments}}

# everything that must be green, or some of its stages
gate *stages:
    .ci/run {{stages}}

# a test many times beside two busy loops: how often does it fail?
flaky path times="20" *arguments:
    {{bin}}/python -m tests.flaky {{path}} {{times}} {{arguments}}

# the tests that repeat for endurance, in full
soak:
    .ci/soak

# the domain's tests but those of a fleet, without I/O, threads or processes, with few examples
fast *arguments:
    VIRALFX_HYPOTHESIS=fast {{bin}}/pytest -q -p no:cacheprovider -m "not fleet" {{arguments}} \
      tests/unit/jobs tests/unit/resilience tests/unit/webhooks tests/unit/worker/test_notifications.py \
      tests/unit/test_alerts.py tests/unit/test_cache.py tests/unit/test_check_state.py \
      tests/unit/test_clock.py tests/unit/test_correlation.py tests/unit/test_lifecycle.py \
      tests/unit/test_monitor.py tests/unit/test_shutdown.py tests/unit/test_totals.py

# lint, format, types and architecture, without changing anything
check:
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .
    {{bin}}/mypy
    {{bin}}/lint-imports
    {{bin}}/hadolint Dockerfile

# README, docs and decision records against the code: names, examples and numbers
docs *arguments:
    {{bin}}/pytest -n 2 {{arguments}} tests/architecture/test_claims.py tests/architecture/test_documents.py \
        tests/architecture/test_walks.py tests/architecture/test_adrs.py \
        tests/architecture/test_imports.py::test_each_contract_has_a_case_that_shows_it_bite \
        tests/observability/test_metrics_document.py tests/deploy/test_manifests.py \
        tests/unit/resilience/test_documentation.py tests/unit/webhooks/test_documentation.py \
        tests/system/test_readme.py::test_the_configuration_document_is_printed_by_the_program \
        tests/system/test_readme.py::test_links_lead_somewhere tests/system/test_readme.py::test_the_readme_is_short

# words that the field does not use, in prose and names: advice, no rule
words:
    {{bin}}/python -m tests.words

# build the documentation site into build/site; a dead link, an unknown anchor or an unlisted page is an error
site *arguments:
    {{bin}}/python -m sphinx -q -W --keep-going -b html -c docs {{arguments}} . build/site

# ask the addresses of other hosts that the pages of the site link to (wants a network)
links *arguments:
    {{bin}}/python -m sphinx -q -b linkcheck -c docs {{arguments}} . build/links

# fix what the tools can fix
fix:
    {{bin}}/ruff check --fix .
    {{bin}}/ruff format .

# the architecture rules, as sentences
arch:
    {{bin}}/lint-imports

# the property tests, with many more examples
fuzz:
    VIRALFX_HYPOTHESIS=nightly FUZZ_EXAMPLES=20000 {{bin}}/pytest tests/unit tests/simulation --timeout 3600

# the API against its OpenAPI document, with many more examples, other ones each time
fuzz-api examples="300":
    VIRALFX_TEST_SOAK=1 VIRALFX_SCHEMATHESIS_EXAMPLES={{examples}} {{bin}}/pytest tests/system/test_schemathesis.py

# the HTTP server against random bytes: how many requests
fuzz-edge requests="1000000":
    EDGE_FUZZ_REQUESTS={{requests}} {{bin}}/pytest tests/edge/test_fuzz.py --timeout 7200

# requests hidden in requests, through HAProxy and nginx: how many tries of each kind
smuggle-edge tries="1000":
    EDGE_TRIES={{tries}} {{bin}}/pytest tests/edge/test_smuggling.py

# jobs that go wrong, each alone beside bystanders, and code that blocks for ten leases
culprits *arguments:
    VIRALFX_TEST_SOAK=1 {{bin}}/pytest {{arguments}} tests/system/test_culprits.py

# twenty planned, twenty sudden and twenty silent changes of the primary, for each kind of address
switchovers *arguments:
    VIRALFX_TEST_SOAK=1 {{bin}}/pytest {{arguments}} tests/integration/test_postgres_switchover.py

# a schedule of every second for ten minutes, over workers that die and whose clocks differ
schedules seconds="600":
    VIRALFX_TEST_SOAK=1 VIRALFX_TEST_SECONDS={{seconds}} {{bin}}/pytest tests/integration/test_postgres_schedules.py

# jobs under every fault at once: how many, a seed, within how many seconds, and behind which pooler (--prepared 200), or `notify`: without Redis; --record publishes the report
chaos jobs="10000" seed="1" seconds="600" *more:
    {{bin}}/python -m tests.chaos.ordeal {{jobs}} {{seed}} {{seconds}} {{more}}

# tests in full form, and a record of what they did: names of benchmarks/endurance.py
endurance +names:
    {{bin}}/python -m benchmarks.endurance {{names}}

# change the resilience core one thing at a time, and see a test fail each time
mutate *modules:
    {{bin}}/uv pip install --quiet --python {{bin}}/python --group mutate
    {{bin}}/python tests/mutation/mutate.py {{modules}}

# probes against a bare ASGI app and a bare Litestar handler
bench-probes *arguments:
    {{bin}}/python benchmarks/probes.py {{arguments}}

# metrics, the log of requests and traces, layer by layer
bench-telemetry *arguments:
    {{bin}}/python benchmarks/telemetry.py {{arguments}}

# requests while the collector of traces is dead, frozen, slow or erring (short: --seconds 5)
bench-collector *arguments:
    {{bin}}/python benchmarks/collector.py {{arguments}}

# start and stop against bare uvicorn
bench-shutdown *arguments:
    {{bin}}/python benchmarks/shutdown.py {{arguments}}

# the job ledger beside 10 000 000 finished jobs, and beside 1 000 000 scheduled ones
bench-ledger *arguments:
    {{bin}}/python benchmarks/ledger.py {{arguments}}

# claims with priorities, limits and a paused queue against plain ones
bench-limits *arguments:
    {{bin}}/python -m benchmarks.jobs.limits {{arguments}}

# retry and breaker against the libraries people use: cost, then behaviour
bench-resilience:
    {{bin}}/uv pip install --quiet --python {{bin}}/python --group bench-resilience
    {{bin}}/python -m benchmarks.resilience.bench 7 4000
    {{bin}}/python -m benchmarks.resilience.probe

# retry, breaker and both on success, against a bare await; a deadline against asyncio.timeout
bench-guards *arguments:
    {{bin}}/python -m benchmarks.resilience.guards {{arguments}}

# the health monitor with 10 to 3000 checks: processor time as a share of a core
bench-monitor *arguments:
    {{bin}}/python -m benchmarks.monitor {{arguments}}

# enqueue and process jobs next to other job queues (short: --rounds 1 --rows --jobs 3000 --only viralfx stream)
bench-jobs *arguments: _bench-jobs-apart
    {{bin}}/uv pip install --quiet --python {{bin}}/python --group bench-jobs
    {{bin}}/python -m benchmarks.jobs.rates {{arguments}}

# a separate environment for queues whose dependencies conflict with those of the service
_bench-jobs-apart:
    {{bin}}/uv venv --quiet --allow-existing --python {{bin}}/python .venv-bench-jobs
    {{bin}}/uv pip install --quiet --python .venv-bench-jobs/bin/python --group bench-jobs-apart

# accept jobs over HTTP, against a handler that keeps nothing and one that does one INSERT (short: --rounds 2)
bench-accept *arguments:
    {{bin}}/python -m benchmarks.jobs.accept {{arguments}}

# renewals of a lease while code blocks the event loop (short: --rounds 1 --trial)
bench-blocked *arguments:
    {{bin}}/python -m benchmarks.jobs.blocked {{arguments}}

# transactions of idle workers in Postgres (short: --dry --seconds 10)
bench-idle *arguments:
    {{bin}}/python -m benchmarks.jobs.idle {{arguments}}

# from acceptance to start, by NOTIFY, a Redis stream and polls (short: --dry --jobs 30 --seconds 10)
bench-wakeup *arguments:
    {{bin}}/python -m benchmarks.jobs.wakeup {{arguments}}

# jobs in other queues beside each kind of job that goes wrong (short: --dry --rounds 1 --only fork)
bench-bystanders *arguments:
    {{bin}}/python -m benchmarks.jobs.bystanders {{arguments}}

# jobs that start late during a rolling deployment and its roll back (short: --dry --rounds 1 --jobs 200)
bench-deployment *arguments:
    {{bin}}/python -m benchmarks.jobs.deployment {{arguments}}

# messages of taskiq that are lost with killed workers, on our broker and on taskiq's stream broker (short: --dry --messages 100 --kills 2 --seconds 15)
bench-taskiq-kill *arguments:
    {{bin}}/python -m benchmarks.jobs.kill {{arguments}}

# orders in transactions, a schedule over workers that are killed, limits of eight workers, delays of cancellation and progress (short: --dry --only limits --rounds 1 --jobs 5000)
bench-promises *arguments:
    {{bin}}/python -m benchmarks.jobs.promises {{arguments}}

# run 100 000 jobs, and see that no memory grows; exits 1 when some does
bench-growth *arguments:
    {{bin}}/python -m benchmarks.jobs.growth {{arguments}}

# retries and cancellations of 100,000 jobs at once, beside a worker
bench-bulk *arguments:
    {{bin}}/python -m benchmarks.jobs.bulk {{arguments}}

# claims of known tasks, also beside a backlog of an unknown one (short: --rounds 5 --backlog 10000 --dry)
bench-unknown *arguments:
    {{bin}}/python -m benchmarks.jobs.unknown {{arguments}}

# memory of processes that have nothing to do, next to a bare Litestar application
bench-memory *arguments:
    {{bin}}/python -m benchmarks.memory {{arguments}}

# probes and requests beside open pages of the console, and its stop (short: --rounds 1 --seconds 3 --dry; stop alone: --rounds 0 --dry)
bench-console *arguments:
    {{bin}}/python -m benchmarks.console {{arguments}}

# how soon the console is right about starts, stops and kills of 20 processes (short: --processes 3 --kills 1 --dry)
bench-fleet *arguments:
    {{bin}}/python -m benchmarks.fleet {{arguments}}

# hostile and idle clients: memory, descriptors, and time of probes (short: --mebibytes 100 --idle 1000)
bench-edge *arguments:
    {{bin}}/python -m benchmarks.edge {{arguments}}

# probes before and during faults of Postgres, Redis and a check (short: --dry --seconds 3 --only frozen)
bench-faults *arguments:
    {{bin}}/python -m benchmarks.faults {{arguments}}

# how long callers wait while Postgres, Redis or a webhook fails (short: --dry --rounds 1 --only Sentinel)
bench-waits *arguments:
    {{bin}}/python -m benchmarks.waits {{arguments}}

# ends of processes that an obstacle delays, and their jobs elsewhere (short: --dry --rounds 1 --only stage)
bench-stops *arguments:
    {{bin}}/python -m benchmarks.stops {{arguments}}

# metrics of a request, and a log line without a reader (short: --dry --rounds 1)
bench-costs *arguments:
    {{bin}}/python -m benchmarks.costs {{arguments}}

# the image, named after the version and marked with the commit
image *arguments:
    docker build --build-arg REVISION=$(git rev-parse HEAD) --tag viralfx-backend:$({{bin}}/uv version --short) {{arguments}} .

# wheel, sdist, image where an engine answers, SBOM and checksums of the last commit, checked, in dist/; --record publishes their list
release *arguments:
    {{bin}}/python -m tests.deploy.release {{arguments}}

# wheel and sdist by pip and uv of each Python here, each extra, beside popular packages, on bare machines, in the tutorial; --record publishes (short: bare)
check-packaging *arguments:
    {{bin}}/python -m tests.deploy.check_packaging {{arguments}}

# the suites that meet other projects, against their newest releases, in .venv-newest; --record publishes
newest *arguments:
    {{bin}}/python -m tests.deploy.newest {{arguments}}

# processes of version 0.2.0 beside those of this checkout: tokens, keys, jobs, webhooks, sessions; --record publishes them
mixed-fleet *arguments:
    {{bin}}/python -m tests.deploy.mixed_fleet {{arguments}}

# the commands of docs/tutorial.md from an empty folder, with their times; --record publishes them
tutorial *arguments:
    {{bin}}/python -m tests.deploy.tutorial {{arguments}}

# draw the dashboard with Grafana's components and ten minutes of real data (wants npm and Chromium)
dashboard-preview *arguments:
    cd tests/observability/preview && npm ci --no-audit --no-fund && npm run build
    {{bin}}/python -m tests.observability.preview.draw {{arguments}}

# renew docs/configuration.md from the settings
configuration:
    { sed "/^|/,\$d" docs/configuration.md; env -i {{bin}}/viralfx env --markdown; } > docs/configuration.new
    mv docs/configuration.new docs/configuration.md

# write into the documents where pip takes the package from, after a change of SOURCE or of the version
source:
    {{bin}}/python -m tests.deploy.source

# renew the description of the public names
api:
    {{bin}}/python -m tests.architecture.public_api > tests/architecture/public_api.txt

# compile the locks; --upgrade takes the newest
lock *arguments:
    PATH="$PWD/{{bin}}:$PATH" .ci/lock {{arguments}}

# compare vendored files with their npm packages; NAME@VERSION takes another version
vendor *packages:
    .ci/vendor {{packages}}

# draw the pictures of docs/console.md from a service with faults (wants Chromium)
console-pictures:
    {{bin}}/python -m tests.console.pictures

# wrong tokens that a process answers in a second, and the time of a session's key (short: --dry)
bench-guesses *arguments:
    {{bin}}/python -m benchmarks.guesses {{arguments}}

# time and bytes until the first view of the operations console (wants Chromium; short: --rounds 5 --dry)
bench-first-view *arguments:
    {{bin}}/python -m benchmarks.first_view {{arguments}}
