"""Packaging of ted_ds; tested versions of everything named here are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ted_ds/__init__.py").read_text(encoding="utf-8"), re.M)


class BuildWithFiles(build_py):
    """Puts the top-level folders that a run reads into the package, where ted_ds/config/shipped.py finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("ds_configs", "launchers"):
                self.copy_tree(str(HERE / folder), str(Path(self.build_lib, "ted_ds/shipped", folder)))


setup(
    name="ted_ds",
    version=VERSION[1],
    description="Task-aware layer-wise distillation of large language models on DeepSpeed",
    license="Apache-2.0",
    cmdclass={"build_py": BuildWithFiles},
    packages=find_packages(include=["ted_ds", "ted_ds.*"]),
    package_data={"ted_ds": ["py.typed"]},
    python_requires=">=3.11,<3.15",
    install_requires=[
        "accelerate>=1.1",  # transformers needs it to load straight into ZeRO-3 shards
        "datasets",
        "deepspeed>=0.19.8",  # frozen parameters beside checkpointed blocks need 0.19.4
        "filelock",
        "matplotlib",
        "ninja",  # DeepSpeed compiles an op at the first start
        "numpy",
        "packaging",
        "nvidia-ml-py",  # the module pynvml
        "protobuf",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "tensorboard",
        "tokenizers>=0.23.3",  # 0.23.2 loses the end of contexts that overflow
        "torch>=2.11",
        "tqdm",
        "transformers>=5.0,<6",
        "zstandard",  # `datasets` reads .zst files of the hub by it
    ],
    extras_require={
        "bench": ["liger-kernel"],  # compared with where it is there
        # triton: its interpreter, beside a CPU wheel of torch too, which names none
        "dev": ["mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "triton>=3.6", "types-PyYAML", "uv"],
    },
    entry_points={"console_scripts": ["ted-ds = ted_ds.cli.main:main"]},
)
