# The router: no torch, no GPU libraries, no compiler. Build from the repository's root:
#   docker build -f infra/docker/router.Dockerfile -t kvrelay/router:0.1.0 .
# A release pins the base by digest: --build-arg BASE=debian:bookworm-20251229-slim@sha256:...
ARG BASE=debian:bookworm-20251229-slim

FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/kvrelay
COPY . /source
ARG PIP_INDEX_URL=
RUN /opt/kvrelay/bin/pip install --no-cache-dir "/source[router]"

FROM python
RUN groupadd --gid 10001 kvrelay \
    && useradd --uid 10001 --gid kvrelay --no-create-home --home-dir /cache --shell /usr/sbin/nologin kvrelay \
    && install -d -o kvrelay -g kvrelay -m 0750 /cache
COPY --from=build /opt/kvrelay /opt/kvrelay
COPY --chmod=0755 infra/docker/healthcheck.py /usr/local/bin/kvrelay-healthcheck
ENV PATH=/opt/kvrelay/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface
USER 10001:10001
VOLUME /cache
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
    CMD ["kvrelay-healthcheck", "router"]
# As process 1 a program ignores every signal it has no handler for: with tini SIGTERM also ends one
# that is still starting.
ENTRYPOINT ["tini", "--", "kvrelay"]
CMD ["router", "--host=0.0.0.0", "--join-host=0.0.0.0"]
