"""Shim for tools that want a setup.py: all metadata is in pyproject.toml."""

from setuptools import setup

setup()
