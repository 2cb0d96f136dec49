# The image of `viralfx serve`, `viralfx worker` and `viralfx migrate`.
#
#   docker build --tag viralfx-backend .
#
# Everything that the base image lacks comes from the stage `wheels`: the packages of the lock, and
# tini, the init process. Only that stage uses a network. To build without one, fill a folder first,
# and pass it in place of that stage:
#
#   docker build --target wheels --output wheels .
#   docker build --network none --build-context wheels=wheels --tag viralfx-backend .
#
# These secrets configure a mirror, a proxy or a certificate authority of your own, and are not kept:
# --secret id=ca,src=ca.pem, --secret id=pip.conf,src=pip.conf and --secret id=apt.conf,src=apt.conf.

# Any image with Python 3.11 or newer, pip and a shell for the build. tini is taken from the base image
# if it is there, or else from Debian's package; on a base without apt-get, put a static tini into the
# folder of wheels. A tag may name another image tomorrow: a release builds on its digest, and so can you,
# with --build-arg BASE_IMAGE=python:3.13-slim@sha256:...
ARG BASE_IMAGE=python:3.13-slim


FROM ${BASE_IMAGE} AS download
WORKDIR /wheels
COPY requirements.lock requirements-build.lock /
RUN --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    if [ -e /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
 && python -m pip download --no-cache-dir --no-deps --require-hashes --only-binary :all: \
      --requirement /requirements.lock --requirement /requirements-build.lock
# apt checks the package against the signatures that the base image trusts. The static program runs on
# any base.
WORKDIR /init
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/zz-secret,required=false \
    if present=$(command -v tini-static || command -v tini); then cp "${present}" /wheels/tini; exit; fi; \
    if ! command -v apt-get >/dev/null; then \
      echo "this base has neither tini nor apt-get: give a folder of wheels that holds a static tini" >&2; \
      exit 1; \
    fi; \
    apt-get update -qq \
 && apt-get download -qq -o APT::Sandbox::User=root tini \
 && dpkg-deb --extract tini_*.deb unpacked \
 && mv unpacked/usr/bin/tini-static /wheels/tini


FROM scratch AS wheels
COPY --from=download /wheels /


FROM ${BASE_IMAGE} AS build
ENV UV_NO_CACHE=1 UV_OFFLINE=1 UV_PYTHON_DOWNLOADS=never
WORKDIR /build
COPY requirements.lock requirements-build.lock ./
RUN --network=none --mount=from=wheels,target=/wheels \
    python -m pip install --no-cache-dir --root-user-action ignore --require-hashes \
      --no-index --find-links /wheels --requirement requirements-build.lock \
 && uv venv --no-project --python "$(command -v python)" /opt/viralfx \
 && uv pip install --python /opt/viralfx --compile-bytecode --require-hashes \
      --no-index --find-links /wheels --requirement requirements.lock \
 && if ! [ -f /wheels/tini ]; then \
      echo "wheels/tini is missing: fill the folder again, see the top of the Dockerfile" >&2; \
      exit 1; \
    fi \
 && install -m 0755 /wheels/tini /opt/viralfx/bin/tini \
 && /opt/viralfx/bin/tini --version
COPY pyproject.toml README.md LICENSE THIRD_PARTY_NOTICES.md ./
COPY src src
# The label below states it for the whole image.
ARG VERSION=0.2.0
RUN --network=none \
    if [ "$(uv version --short)" != "${VERSION}" ]; then \
      echo "VERSION=${VERSION} is not what pyproject.toml says: $(uv version --short)" >&2; \
      exit 1; \
    fi \
 && uv build --quiet --wheel --out-dir dist \
 && uv pip install --python /opt/viralfx --compile-bytecode --no-index --no-deps dist/*.whl


FROM ${BASE_IMAGE}
COPY --from=build /opt/viralfx /opt/viralfx
ENV PATH=/opt/viralfx/bin:$PATH
# Public images have Python's own modules without byte code, and on a read-only root each start and
# each probe would compile them again. Importing them here writes the byte code.
RUN --network=none python -c "import viralfx.postgres.migrate, viralfx.adapters.taskiq, \
    viralfx.cli.doctor, viralfx.runner.probe, viralfx.runner.commands"
ENV ENVIRONMENT=production PYTHONDONTWRITEBYTECODE=1
# Where another process is PID 1 (`docker run --init`, a shared process namespace) tini reaps as well.
ENV TINI_SUBREAPER=1
# `--app` and TASK_MODULES import from here the modules of an image on top of this one.
WORKDIR /app
# A number, so that Kubernetes can verify that it is not root.
USER 10001:10001
EXPOSE 3000 3001 3002
STOPSIGNAL SIGTERM
# An orchestrator that acts on this check replaces the container, so it checks liveness alone. For a
# worker, configure `viralfx probe live --worker` instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s --retries=3 \
  CMD ["viralfx", "probe", "live"]
# The kernel drops a signal for PID 1 that has no handler yet, and Python needs some 50 ms to install
# one. tini has its handlers within a millisecond and forwards signals; it exits with the code of the
# service, but with 0 for one that SIGTERM (128 + 15) or SIGHUP (128 + 1) ended before its own handlers
# were there. A `command` in a pod and `entrypoint` in compose bypass it: use `args` and `command` there (ADR-0036).
ENTRYPOINT ["tini", "-e", "143", "-e", "129", "--", "viralfx"]
CMD ["serve"]
ARG BASE_IMAGE VERSION=0.2.0 REVISION=
# /health/info shows it.
ENV REVISION=${REVISION}
LABEL org.opencontainers.image.title="ViralFX Backend" \
      org.opencontainers.image.description="An ASGI service whose subject is staying up" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
