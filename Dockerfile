# A server with OpenAI's interface for the checkpoint that is mounted at /checkpoint: docs/deployment.md.
#
#     docker build -t qwen .                                            for GPUs, and for CPUs
#     docker build -t qwen --build-arg PIP_EXTRA_INDEX_URL=... .        smaller, for CPUs: PyTorch's index of wheels for CPUs
#     docker run --gpus all -p 8000:8000 -v CHECKPOINT:/checkpoint qwen
FROM python:3.11-slim-bookworm

# For the kernels: those of CPUs are compiled below, Triton's when a GPU first runs them.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# pip reads them; a mirror is PIP_INDEX_URL.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /qwen
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt "transformers[serving]"

COPY *.py cpp_kernels.cpp config.json generation_config.json tokenizer_config.json ./
COPY tools/ tools/
ENV TORCH_EXTENSIONS_DIR=/opt/kernels
RUN python tools/build_kernels.py && useradd --create-home --uid 1000 qwen
# A volume that is mounted there is the user's too.
RUN install -d -o qwen -g qwen /home/qwen/.triton

USER 1000
EXPOSE 8000
ENTRYPOINT ["python", "tools/serve.py"]
CMD ["/checkpoint", "--host", "0.0.0.0", "--port", "8000"]
