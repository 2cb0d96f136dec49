# The image of `viralfx serve`, `viralfx worker` and `viralfx migrate`.
#
#   docker build --tag viralfx-backend .
#
# What is not in the base image comes from `wheels`, and only the stage before that uses a network.
# To build without one, fill a folder with the wheels first, and give it in place of that stage:
#
#   docker build --target wheels --output wheels .
#   docker build --network none --build-context wheels=wheels --tag viralfx-backend .
#
# Where an index is reached through an authority or a mirror of your own, these secrets say how;
# neither is kept: --secret id=ca,src=ca.pem and --secret id=pip.conf,src=pip.conf.

# Any image with Python 3.11 or newer, pip and a shell for the build.
ARG BASE_IMAGE=python:3.13-slim


FROM ${BASE_IMAGE} AS download
WORKDIR /wheels
COPY requirements.lock requirements-build.lock /
RUN --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    if [ -e /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
 && python -m pip download --no-cache-dir --no-deps --require-hashes --only-binary :all: \
      --requirement /requirements.lock --requirement /requirements-build.lock


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
      --no-index --find-links /wheels --requirement requirements.lock
COPY pyproject.toml README.md ./
COPY src src
# The label below says so of the whole image.
ARG VERSION=0.1.0
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
# Python's own modules come without byte code in the public images, and where nothing can be written
# each start and each probe would compile them again. What is imported once here has it.
RUN --network=none python -c "import viralfx.adapters.postgres.migrate, viralfx.adapters.taskiq, \
    viralfx.cli.doctor, viralfx.runner.probe, viralfx.runner.serve, viralfx.runner.worker"
ENV ENVIRONMENT=production PYTHONDONTWRITEBYTECODE=1
# `--app` and TASK_MODULES find here what an image on top of this one brings.
WORKDIR /app
# A number, so that Kubernetes can see that it is not root's.
USER 10001:10001
EXPOSE 3000 3001
STOPSIGNAL SIGTERM
# Whoever acts on this replaces the container, so it asks for what only that would mend. A worker is
# asked with `viralfx probe live --worker`; what runs one has to say so.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s --retries=3 \
  CMD ["viralfx", "probe", "live"]
ENTRYPOINT ["viralfx"]
CMD ["serve"]
ARG BASE_IMAGE VERSION=0.1.0 REVISION=
LABEL org.opencontainers.image.title="ViralFX Backend" \
      org.opencontainers.image.description="A Litestar service whose subject is staying up" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
