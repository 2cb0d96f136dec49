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

# lint, format, types and architecture, without changing anything
check:
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .
    {{bin}}/mypy
    {{bin}}/lint-imports
    {{bin}}/hadolint Dockerfile

# mend what can be mended by machine
fix:
    {{bin}}/ruff check --fix .
    {{bin}}/ruff format .

# the architecture rules, as sentences
arch:
    {{bin}}/lint-imports

# the property tests, with many more examples
fuzz:
    VIRALFX_HYPOTHESIS=nightly FUZZ_EXAMPLES=20000 {{bin}}/pytest tests/unit --timeout 3600

# jobs under every fault at once: how many, a seed, and within how many seconds
chaos jobs="10000" seed="1" seconds="600":
    {{bin}}/python -m tests.chaos.ordeal {{jobs}} {{seed}} {{seconds}}

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

# the job ledger beside 1 000, 100 000 and 1 000 000 finished jobs
bench-ledger *arguments:
    {{bin}}/python benchmarks/ledger.py {{arguments}}

# retry and breaker against the libraries people use: cost, then behaviour
bench-resilience:
    {{bin}}/uv pip install --quiet --python {{bin}}/python --group bench-resilience
    {{bin}}/python -m benchmarks.resilience.bench 7 4000
    {{bin}}/python -m benchmarks.resilience.probe

# enqueue and process jobs next to other job queues (short: --jobs 1000 --rounds 1 --rows 1000)
bench-jobs *arguments: _bench-jobs-apart
    {{bin}}/uv pip install --quiet --python {{bin}}/python --group bench-jobs
    {{bin}}/python -m benchmarks.jobs.rates {{arguments}}

# where those go whose dependencies do not go with ours
_bench-jobs-apart:
    {{bin}}/uv venv --quiet --allow-existing --python {{bin}}/python .venv-bench-jobs
    {{bin}}/uv pip install --quiet --python .venv-bench-jobs/bin/python --group bench-jobs-apart

# accept jobs over HTTP, against a handler that keeps nothing
bench-accept *arguments:
    {{bin}}/python -m benchmarks.jobs.accept {{arguments}}

# run 100 000 jobs, and see that no memory grows; exits 1 when some does
bench-flat *arguments:
    {{bin}}/python -m benchmarks.jobs.flat {{arguments}}

# memory of processes that have nothing to do, next to a bare Litestar application
bench-memory *arguments:
    {{bin}}/python -m benchmarks.memory {{arguments}}

# the image, named after the version and marked with the commit
image *arguments:
    docker build --build-arg REVISION=$(git rev-parse HEAD) --tag viralfx-backend:$({{bin}}/uv version --short) {{arguments}} .

# draw the dashboard with Grafana's components and ten minutes of real data (wants npm and Chromium)
dashboard-preview *arguments:
    cd tests/observability/preview && npm ci --no-audit --no-fund && npm run build
    {{bin}}/python -m tests.observability.preview.draw {{arguments}}

# renew docs/configuration.md from the settings
configuration:
    { sed -n "1,/^$/p" docs/configuration.md; env -i {{bin}}/viralfx env --markdown; } > docs/configuration.new
    mv docs/configuration.new docs/configuration.md

# compile the locks; --upgrade takes the newest
lock *arguments:
    PATH="$PWD/{{bin}}:$PATH" .ci/lock {{arguments}}
