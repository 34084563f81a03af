"""Package metadata. Pins are in constraints.txt; `make` installs with both."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hbserve",
    version="0.1.0",
    description="LLM serving with prefill and decode as separate workers under one CPU scheduler",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["hbserve", "hbserve.*"]),
    package_data={"hbserve": ["py.typed", "server/page/*", "server/page/vendor/*"]},
    install_requires=[
        "fastapi",
        "httptools",
        "jinja2",
        "llguidance",
        "msgspec",
        "numpy",
        "prometheus-client",
        "pydantic>=2",
        "pyyaml",
        "pyzmq",
        "safetensors",
        "setproctitle",
        "torch>=2.11",
        "tqdm",
        "transformers>=5",
        "uvicorn",
        "uvloop",
    ],
    extras_require={
        "bench": ["aiohttp", "matplotlib"],
        "telemetry": ["opentelemetry-exporter-otlp-proto-http", "opentelemetry-sdk"],
        "gpu": ["flash-attn", "flashinfer-python", "mooncake-transfer-engine-cuda13"],
        "test": [
            "aiohttp",
            "hypothesis",
            "httpx",
            "matplotlib",
            "mooncake-transfer-engine-non-cuda",
            "mypy",
            "openai",
            "playwright",
            "opentelemetry-exporter-otlp-proto-http",
            "opentelemetry-sdk",
            "pytest",
            "pytest-asyncio",
            "pytest-timeout",
            "ruff",
            "schemathesis",
            "types-PyYAML",
        ],
    },
)
