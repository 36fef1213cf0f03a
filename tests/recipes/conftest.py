"""Recipes are scripts, not modules of the package: tests load them by name."""

import importlib.util
from pathlib import Path

import pytest


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="session")
def recipe():
    """`recipe("score_shapes")` is that script as a module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
