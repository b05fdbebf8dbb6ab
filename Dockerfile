# mmdefense on a CPU: docker build -t mmdefense . && docker run --rm -v "$PWD:/data" mmdefense scan my-vit
FROM python:3.12-slim AS build

ARG EXTRAS=all
# uv takes PyTorch's CPU build, which is without the several gigabytes of CUDA.
ENV UV_TORCH_BACKEND=cpu UV_LINK_MODE=copy UV_NO_CACHE=1

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mmdefense mmdefense
COPY adapters adapters
COPY tasks tasks

RUN python -m venv /opt/mmdefense \
 && /opt/mmdefense/bin/pip install --no-cache-dir -c constraints.txt uv \
 && /opt/mmdefense/bin/uv pip install --python /opt/mmdefense -c constraints.txt \
    "mmdefense${EXTRAS:+[$EXTRAS]} @ file:///source" \
 && /opt/mmdefense/bin/pip uninstall --yes uv


FROM python:3.12-slim

RUN useradd --create-home --uid 1000 mmdefense
COPY --from=build /opt/mmdefense /opt/mmdefense
# Caches where every user may write, also one that is given with --user.
ENV PATH=/opt/mmdefense/bin:$PATH HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib

USER 1000
WORKDIR /data
ENTRYPOINT ["mmdefense"]
CMD ["--help"]
