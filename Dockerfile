# The service in a virtual environment without pip, on a Python base: no compiler, no Postgres, no keys in what runs.
# How to run it: docs/guides/deploy-with-containers.md.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv
WORKDIR /src
COPY requirements/server.txt requirements/
RUN /opt/venv/bin/pip install --no-compile --no-deps --require-hashes --only-binary=:all: -r requirements/server.txt
# Argon2 is built here, because its published wheel costs nearly half the logins. AVX2 is in every x86-64 server since
# 2015; for one without it, or to build for the machine at hand: --build-arg HASH_CFLAGS="-O3" or "-O3 -march=native".
ARG HASH_CFLAGS=""
COPY requirements/fast-hash.txt requirements/build-argon2.sh requirements/
RUN headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h \
    && apt-get update -qq \
    && apt-get install -qq -y --no-install-recommends gcc libc6-dev $(test -e "$headers" || echo python3-dev) > /dev/null \
    && if [ -z "$HASH_CFLAGS" ]; then HASH_CFLAGS="-O3 $(test "$(uname -m)" != x86_64 || echo -mavx2)"; fi \
    && CFLAGS=$HASH_CFLAGS sh requirements/build-argon2.sh python3 /tmp/argon2 \
    && /opt/venv/bin/pip install --no-compile --no-deps --no-index --force-reinstall /tmp/argon2/*.whl \
    && rm -r /tmp/argon2
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY identity_service identity_service
# What only the build needs goes again; `pip check` fails the build if something else turns out to need it.
# The bytecode is never checked against file times, so it stays valid whatever copies the files, and on a root file
# system that cannot be written.
RUN /opt/venv/bin/pip install --no-compile --no-deps --no-index --no-build-isolation . \
    && /opt/venv/bin/pip uninstall --quiet --yes hatchling packaging pathspec pluggy tomlkit trove-classifiers \
    && /opt/venv/bin/pip check \
    && /opt/venv/bin/pip uninstall --quiet --yes setuptools pip \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 identity \
    && useradd --uid 10001 --gid identity --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin identity \
    && install -d -o identity -g identity -m 0700 /keys
COPY --from=build /opt/venv /opt/venv
# The slim Python images ship the standard library without its bytecode: written here for the modules that the service
# imports, it saves every start and every health check half a second.
RUN /opt/venv/bin/identity-service --help > /dev/null
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    IDENTITY_BIND=0.0.0.0:8000 \
    IDENTITY_KEYS_DIR=/keys \
    IDENTITY_DRAIN=5
USER 10001:10001
VOLUME ["/keys"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 CMD ["identity-service", "healthcheck"]
ENTRYPOINT ["identity-service"]
CMD ["serve"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="identity-service" \
    org.opencontainers.image.description="Owns users, passwords and sessions, and signs tokens that other services verify locally." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
