# The image for Kubernetes (docs/cluster.md): docker build -t REGISTRY/rayfuse:0.1 .
# Never built where it was written, which has no container engine.
FROM python:3.11-slim-bookworm

# g++ for DeepSpeed's CPU optimizer, wget for KubeRay's probes.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home ray

WORKDIR /opt/rayfuse
COPY requirements.lock ./
RUN pip install --no-cache-dir -r requirements.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY data data
COPY fusion fusion
COPY ray_jobs ray_jobs
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

USER 1000
WORKDIR /home/ray
ENV RAY_USAGE_STATS_ENABLED=0
