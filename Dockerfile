# Two images: `api`, small and without torch, and `torch` for workers and nodes.

# Dependencies come before the sources, so that a change of code does not install them again.
FROM python:3.11-slim AS dependencies
RUN python -m venv /opt/deltadock
ENV PATH=/opt/deltadock/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY deltadock/version.py src/deltadock/version.py
RUN touch README.md LICENSE && pip install -c constraints.txt ".[traces]"

FROM dependencies AS dependencies-torch
RUN pip install -c constraints.txt ".[torch,traces]"

FROM scratch AS sources
COPY pyproject.toml constraints.txt README.md LICENSE ./
# They hold links to each other.
COPY src src
COPY deltadock deltadock
COPY api api
COPY workers workers
COPY storage storage
COPY kernels kernels
COPY migrations migrations
COPY samples samples

FROM dependencies AS build
COPY --from=sources / /src/
RUN pip install --no-deps --force-reinstall .

FROM dependencies-torch AS build-torch
COPY --from=sources / /src/
RUN pip install --no-deps --force-reinstall .

FROM python:3.11-slim AS runtime
# HOME takes what libraries cache; the rest of the file system may be read-only.
RUN useradd --uid 10001 --home-dir /var/lib/deltadock --create-home deltadock
ENV PATH=/opt/deltadock/bin:$PATH HOME=/var/lib/deltadock PYTHONUNBUFFERED=1
WORKDIR /var/lib/deltadock
VOLUME /var/lib/deltadock
USER deltadock

FROM runtime AS torch
USER root
# Triton compiles the launchers of its kernels at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-torch /opt/deltadock /opt/deltadock
USER deltadock
EXPOSE 8100
CMD ["python", "-m", "deltadock.inference.server", "--host", "0.0.0.0", "--port", "8100"]

FROM runtime AS api
COPY --from=build /opt/deltadock /opt/deltadock
EXPOSE 8000
CMD ["uvicorn", "deltadock.api.main:app", "--http", "deltadock.api.protocol:Protocol", "--host", "0.0.0.0", "--port", "8000", "--timeout-keep-alive", "75"]
