"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import iomm_hf


FENCE = re.compile(r"```(?:python|py)\n(.*?)```", re.DOTALL)
MODULES = [module.name for module in pkgutil.walk_packages(iomm_hf.__path__, "iomm_hf.")]


def documented(module):
    """The module, its own functions and classes, and the methods of these."""
    yield module.__name__, module
    for name, thing in vars(module).items():
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or thing.__module__ != module.__name__:
            continue
        yield f"{module.__name__}.{name}", thing
        for method, function in vars(thing).items():
            if inspect.isclass(thing) and inspect.isfunction(function):
                yield f"{module.__name__}.{name}.{method}", function


def examples():
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, thing in documented(module):
            for number, block in enumerate(FENCE.findall(inspect.cleandoc(thing.__doc__ or ""))):
                if ">>>" in block:
                    yield pytest.param(block, vars(module), id=f"{name}-{number}")


@pytest.mark.parametrize(("block", "namespace"), list(examples()))
def test_example_runs(block, namespace):
    test = doctest.DocTestParser().get_doctest(block, dict(namespace), "example", None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
