# Prefill and decode workers, on CPUs or NVIDIA GPUs. Build from the repository's root:
#   docker build -f infra/docker/worker.Dockerfile -t kvrelay/worker:0.1.0 .          CUDA 13
#   docker build -f infra/docker/worker.Dockerfile --build-arg VARIANT=cpu -t kvrelay/worker:0.1.0-cpu .
# With the router beside it, for platforms that run one container (docs/deploy/one-container.md):
#   docker build -f infra/docker/worker.Dockerfile --target one-container -t kvrelay/one-container:0.1.0 .
# torch brings the CUDA libraries; the driver comes from the host.
ARG BASE=debian:bookworm-20251229-slim

FROM ${BASE} AS python
# g++ stays: the CPU kernels are compiled for the processor they run on, and Triton compiles its launchers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/kvrelay
ARG VARIANT=cu130
ARG TORCH_SPEC=torch==2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/${VARIANT}
# Alone and first: a resolver that sees the rest as well may prefer another build.
RUN /opt/kvrelay/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX_URL}" "${TORCH_SPEC}"
COPY . /source
ARG EXTRAS=worker,aws
ARG PIP_INDEX_URL=
RUN /opt/kvrelay/bin/pip install --no-cache-dir "/source[${EXTRAS}]"

FROM build AS build-one
ARG PIP_INDEX_URL=
RUN /opt/kvrelay/bin/pip install --no-cache-dir "/source[all,aws]"

FROM python AS bare
RUN groupadd --gid 10001 kvrelay \
    && useradd --uid 10001 --gid kvrelay --no-create-home --home-dir /cache --shell /usr/sbin/nologin kvrelay \
    && install -d -o kvrelay -g kvrelay -m 0750 /cache
COPY --chmod=0755 infra/docker/healthcheck.py /usr/local/bin/kvrelay-healthcheck
ENV PATH=/opt/kvrelay/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
STOPSIGNAL SIGTERM
VOLUME /cache

FROM bare AS one-container
COPY --from=build-one /opt/kvrelay /opt/kvrelay
# SageMaker's documentation wants root: --build-arg RUN_AS=0:0
ARG RUN_AS=10001:10001
USER ${RUN_AS}
EXPOSE 8080
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
HEALTHCHECK --interval=5s --timeout=5s --start-period=600s --retries=3 \
    CMD ["kvrelay-healthcheck", "serve"]
# SageMaker appends `serve` and says that tini must not be the entry point: the command handles SIGTERM
# from its first line on, and reaps its children.
ENTRYPOINT ["kvrelay"]
CMD ["serve"]

FROM bare AS worker
COPY --from=build /opt/kvrelay /opt/kvrelay
USER 10001:10001
# Weights may take minutes; until then a container is "starting", not "unhealthy".
HEALTHCHECK --interval=5s --timeout=5s --start-period=600s --retries=3 \
    CMD ["kvrelay-healthcheck", "worker"]
ENTRYPOINT ["tini", "--", "kvrelay"]
# Which of the two it is, is said where it is started.
CMD ["decode"]
