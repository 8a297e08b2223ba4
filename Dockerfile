# The image of a rank: `docker build -t d2v_scale .`, then `docker run --gpus all --ipc host d2v_scale train --help`.
# pip brings the CUDA build of torch; slurm/README.md says how a cluster runs ranks in an image.
FROM python:3.11-slim-bookworm

# DeepSpeed compiles its operators when they are first used.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/d2v_scale
COPY pyproject.toml setup.py README.md LICENSE ./
COPY constraints constraints
COPY ds_configs ds_configs
COPY slurm slurm
COPY d2v_scale d2v_scale

RUN python -m pip install --no-cache-dir --constraint constraints/newest.txt .
RUN d2v --version && d2v train --list_recipes && d2v templates templates

WORKDIR /work
ENTRYPOINT ["d2v"]
CMD ["--help"]
