# lapilli serve in a container:
#
#   docker build --tag lapilli .
#   docker run --publish 8000:8000 --env LAPILLI_API_KEY=secret lapilli
#
# A model of your own: --volume FOLDER:/model, and `lapilli ... /model` in place of pebble, the embedded one.
# Another torch: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
# Several engines: --build-arg EXTRAS=ray, and --engine ray --replicas N (docs/guide/scale.md).

FROM python:3.13 AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m pip install --no-cache-dir --index-url "$TORCH_INDEX" --constraint /tmp/constraints.txt "torch>=2.6" \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /tmp/wheels/lapilli-*.whl)[$EXTRAS]" \
    && rm -r /tmp/wheels \
    && useradd --create-home --uid 1000 lapilli
USER 1000
WORKDIR /home/lapilli
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# SIGTERM: requests that run are answered first.
STOPSIGNAL SIGTERM
ENTRYPOINT ["lapilli", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["pebble"]
