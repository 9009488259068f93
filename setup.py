"""Build script: all metadata is in pyproject.toml; this file exists for the compiled operations of csrc/."""

from setuptools import setup

setup()
