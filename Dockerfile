# The images of trimserve, one target each: serve, serve-onnxruntime, serve-gpu,
# optimizer, optimizer-cpu, loadtest.
#
#   docker build --target serve --tag trimserve-serve:0.1.0 .
#
# BASE_IMAGE is any glibc image with Python 3.11 or later as python3, its venv, and libstdc++; build and
# run share it, so that the environment's interpreter is where it was. Pin it by digest in CI.
ARG BASE_IMAGE=python:3.12-slim-bookworm

# What makes the images and stays out of them. Settings of pip, such as an index of one's own, come by
# `--secret id=pip,src=pip.conf`.
FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN ["python3", "-m", "venv", "/opt/build"]
COPY locks/build.txt locks/build.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "install", "--require-hashes", "-r", "locks/build.txt"]

# The package itself, as a wheel.
FROM build AS wheel
COPY pyproject.toml README.md LICENSE trimserve.py ./
COPY serve serve
COPY loadtest loadtest
COPY optimizer optimizer
RUN ["/opt/build/bin/python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", \
     "--wheel-dir", "/wheels", "."]

# An environment for each image, without pip: what its lock names and no more, by hash, the wheel, and the
# list of both in the format CycloneDX.
FROM build AS environment
RUN ["python3", "-m", "venv", "--without-pip", "/opt/trimserve"]
COPY images images

FROM environment AS serve-environment
COPY locks/serve.txt locks/serve.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-compile", "--no-deps", "--require-hashes", "-r", "locks/serve.txt"]
COPY --from=wheel /wheels /wheels
RUN ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-compile", "--no-deps", "--no-index", "--find-links", "/wheels", "trimserve"]
# A step of its own: the layer is no part of the image. It compiles what is left and loaded, too.
# hadolint ignore=DL3059
RUN ["/opt/trimserve/bin/python", "-m", "images.slim"]
# hadolint ignore=DL3059
RUN ["/opt/build/bin/python", "-m", "cyclonedx_py", "environment", "--output-reproducible", \
     "--output-file", "/opt/trimserve/sbom.cdx.json", "/opt/trimserve/bin/python"]

# Without OpenVINO: smaller.
FROM environment AS serve-onnxruntime-environment
COPY locks/serve-onnxruntime.txt locks/serve-onnxruntime.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-compile", "--no-deps", "--require-hashes", "-r", "locks/serve-onnxruntime.txt"]
COPY --from=wheel /wheels /wheels
RUN ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-compile", "--no-deps", "--no-index", "--find-links", "/wheels", "trimserve"]
# hadolint ignore=DL3059
RUN ["/opt/trimserve/bin/python", "-m", "images.slim"]
# hadolint ignore=DL3059
RUN ["/opt/build/bin/python", "-m", "cyclonedx_py", "environment", "--output-reproducible", \
     "--output-file", "/opt/trimserve/sbom.cdx.json", "/opt/trimserve/bin/python"]

# CUDA 13 and cuDNN 9 come by the lock, as NVIDIA's wheels; the driver comes from the node.
FROM environment AS serve-gpu-environment
COPY locks/serve-gpu.txt locks/serve-gpu.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-compile", "--no-deps", "--require-hashes", "-r", "locks/serve-gpu.txt"]
COPY --from=wheel /wheels /wheels
RUN ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-compile", "--no-deps", "--no-index", "--find-links", "/wheels", "trimserve"]
# A step of its own: the layer is no part of the image. It compiles what is left and loaded, too.
# hadolint ignore=DL3059
RUN ["/opt/trimserve/bin/python", "-m", "images.slim"]
# hadolint ignore=DL3059
RUN ["/opt/build/bin/python", "-m", "cyclonedx_py", "environment", "--output-reproducible", \
     "--output-file", "/opt/trimserve/sbom.cdx.json", "/opt/trimserve/bin/python"]

FROM environment AS optimizer-environment
COPY locks/optimizer.txt locks/optimizer.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-deps", "--require-hashes", "-r", "locks/optimizer.txt"]
COPY --from=wheel /wheels /wheels
RUN ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-deps", "--no-index", "--find-links", "/wheels", "trimserve"]
# hadolint ignore=DL3059
RUN ["/opt/trimserve/bin/python", "-m", "images.segments"]
# hadolint ignore=DL3059
RUN ["/opt/build/bin/python", "-m", "cyclonedx_py", "environment", "--output-reproducible", \
     "--output-file", "/opt/trimserve/sbom.cdx.json", "/opt/trimserve/bin/python"]

FROM environment AS optimizer-cpu-environment
COPY locks/optimizer-cpu.txt locks/optimizer-cpu.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-deps", "--require-hashes", "-r", "locks/optimizer-cpu.txt"]
# PyPI has no build of torch without CUDA for x86-64; its project's page has, here asked for by version.
ARG TORCH_PAGE=https://download.pytorch.org/whl/cpu/torch/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_NO_INDEX=1 PIP_FIND_LINKS="${TORCH_PAGE}" /opt/build/bin/python -m pip \
      --python /opt/trimserve/bin/python install --no-deps torch==2.13.0+cpu
COPY --from=wheel /wheels /wheels
RUN ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-deps", "--no-index", "--find-links", "/wheels", "trimserve"]
# hadolint ignore=DL3059
RUN ["/opt/trimserve/bin/python", "-m", "images.segments"]
# hadolint ignore=DL3059
RUN ["/opt/build/bin/python", "-m", "cyclonedx_py", "environment", "--output-reproducible", \
     "--output-file", "/opt/trimserve/sbom.cdx.json", "/opt/trimserve/bin/python"]

FROM environment AS loadtest-environment
COPY locks/loadtest.txt locks/loadtest.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-deps", "--require-hashes", "-r", "locks/loadtest.txt"]
COPY --from=wheel /wheels /wheels
RUN ["/opt/build/bin/python", "-m", "pip", "--python", "/opt/trimserve/bin/python", "install", \
     "--no-deps", "--no-index", "--find-links", "/wheels", "trimserve"]
# hadolint ignore=DL3059
RUN ["/opt/trimserve/bin/python", "-m", "images.segments"]
# hadolint ignore=DL3059
RUN ["/opt/build/bin/python", "-m", "cyclonedx_py", "environment", "--output-reproducible", \
     "--output-file", "/opt/trimserve/sbom.cdx.json", "/opt/trimserve/bin/python"]

# What all images share when they run: user 10001 owns nothing, and only /tmp need be writable.
FROM ${BASE_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      dev.trimserve.sbom="/opt/trimserve/sbom.cdx.json"
ENV PATH=/opt/trimserve/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["/opt/trimserve/bin/python", "-m", "trimserve"]

FROM runtime AS loadtest
LABEL org.opencontainers.image.title="trimserve-loadtest" \
      org.opencontainers.image.description="Judges a running model server by its SLO"
COPY --from=loadtest-environment /opt/trimserve /opt/trimserve
CMD ["loadtest", "--help"]

FROM runtime AS optimizer
LABEL org.opencontainers.image.title="trimserve-optimizer" \
      org.opencontainers.image.description="Finds the cheapest variant of a model that keeps its SLO"
COPY --from=optimizer-environment /opt/trimserve /opt/trimserve
CMD ["optimize", "--help"]

FROM runtime AS optimizer-cpu
LABEL org.opencontainers.image.title="trimserve-optimizer-cpu" \
      org.opencontainers.image.description="Finds the cheapest variant of a model that keeps its SLO, on machines without a GPU"
COPY --from=optimizer-cpu-environment /opt/trimserve /opt/trimserve
CMD ["optimize", "--help"]

FROM runtime AS serve-gpu
LABEL org.opencontainers.image.title="trimserve-serve-gpu" \
      org.opencontainers.image.description="Serves models over the Open Inference Protocol, with ONNX Runtime for CUDA"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=serve-gpu-environment /opt/trimserve /opt/trimserve
EXPOSE 8000 8001 8002
CMD ["serve", "--host", "0.0.0.0", "--repository", "/models"]

FROM runtime AS serve-onnxruntime
LABEL org.opencontainers.image.title="trimserve-serve-onnxruntime" \
      org.opencontainers.image.description="Serves models over the Open Inference Protocol, with ONNX Runtime alone"
COPY --from=serve-onnxruntime-environment /opt/trimserve /opt/trimserve
EXPOSE 8000 8001 8002
CMD ["serve", "--host", "0.0.0.0", "--repository", "/models"]

FROM runtime AS serve
LABEL org.opencontainers.image.title="trimserve-serve" \
      org.opencontainers.image.description="Serves models over the Open Inference Protocol"
COPY --from=serve-environment /opt/trimserve /opt/trimserve
EXPOSE 8000 8001 8002
CMD ["serve", "--host", "0.0.0.0", "--repository", "/models"]
