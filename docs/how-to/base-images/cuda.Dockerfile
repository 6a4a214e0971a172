# A run image and a build image for functions, on NVIDIA's CUDA images:
#   docker build --target run   --tag REGISTRY/gpufn-run:cuda   --file cuda.Dockerfile .
#   docker build --target build --tag REGISTRY/gpufn-build:cuda --file cuda.Dockerfile .

# `base` has the CUDA runtime library alone: PyPI's torch brings the other libraries as packages.
# Take `runtime` where functions load cuBLAS and its like from the system.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
ARG LIFECYCLE=buildpacksio/lifecycle:0.20.8

FROM ${LIFECYCLE} AS lifecycle

FROM ${BASE} AS run
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /usr/share/doc/* /usr/share/man/*
# Not 1000: Ubuntu's images have a user of that number.
RUN groupadd --gid 2000 cnb && useradd --uid 2000 --gid 2000 --create-home cnb \
    && install -d -o cnb -g cnb /var/lib/gpufn/snapshots
# What the container toolkit mounts: `compute` is CUDA, `utility` is NVML, which counts the memory.
ENV LANG=C.UTF-8 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL io.buildpacks.base.id=com.example.gpufn.cuda \
    io.buildpacks.base.distro.name=ubuntu \
    io.buildpacks.base.distro.version=24.04
WORKDIR /home/cnb
USER 2000:2000

FROM run AS build
USER root
COPY --from=lifecycle /cnb/lifecycle /cnb/lifecycle
RUN mkdir -p /cnb/buildpacks /platform/env && touch /cnb/order.toml \
    && install -d -o cnb -g cnb /layers /workspace
ENV CNB_USER_ID=2000 CNB_GROUP_ID=2000 CNB_PLATFORM_API=0.13
WORKDIR /workspace
USER 2000:2000
