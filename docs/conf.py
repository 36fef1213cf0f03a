"""How the documentation is built: `make docs`. Pages are Markdown (MyST), the reference comes from docstrings, settings and commands.

Sphinx and MyST are well kept; MkDocs has had no release since August 2024. Sphinx reads reStructuredText in docstrings, ours are
Markdown in Hugging Face's grammar: `to_rst` is the bridge.
"""

import dataclasses
import importlib
import re
import typing
from typing import Any

import typer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import iomm_hf
from iomm_hf.cli import app as command_line


project = "iomm-hf"
release = version = iomm_hf.__version__
copyright = "the iomm-hf contributors, Apache-2.0"
html_title = f"iomm-hf {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # links to headings, checked when the pages are built
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["iomm.css"]
html_show_sourcelink = False
html_copy_source = False

autodoc_typehints = "none"  # the docstrings say them, with shapes and units
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?[\w.]+)`\]")
LINK = re.compile(r"\[([^\]`]+)\]\((\S+?)\)")
RAISED = re.compile(r"^( *)`(\w+)`:", re.MULTILINE)
ARGUMENT = re.compile(r" +\w[\w, ]* \(")
LITERAL = re.compile(r"(?<!`)`([^`]+)`(\w?)")


def to_rst(docstring: str) -> str:
    """Fences, references, links and code spans of Markdown, as reStructuredText writes them."""
    done: list[str] = []  # what is converted, and not to be looked at again

    def keep(text: str) -> str:
        done.append(text)
        return f"\0{len(done) - 1}\0"

    def fence(match: re.Match) -> str:
        indent, language, code = match.groups()
        language = {"python": "pycon", "py": "pycon", "": "text"}.get(language, language)
        lines = [f"{indent}.. code-block:: {language}", "", *(f"    {line}" for line in code.splitlines()), ""]
        return keep("\n".join(lines))

    lines: list[str] = []
    for line in FENCE.sub(fence, docstring).splitlines():
        if lines and ARGUMENT.match(lines[-1]) and lines[-1].count("(") > lines[-1].count(")"):
            lines[-1] += " " + line.strip()  # napoleon wants an argument's type in one line
        else:
            lines.append(line)
    text = RAISED.sub(r"\1\2:", "\n".join(lines))
    text = REFERENCE.sub(lambda match: keep(f":py:obj:`{match[1]}`"), text)
    text = LINK.sub(lambda match: keep(f"`{match[1]} <{match[2]}>`__"), text)
    text = LITERAL.sub(lambda match: f"``{match[1]}``" + (f"\\ {match[2]}" if match[2] else ""), text)
    return re.sub("\0(\\d+)\0", lambda match: done[int(match[1])], text)


def convert_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]):
    lines[:] = to_rst("\n".join(lines)).splitlines()


def row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def code(value: Any) -> str:
    return f"`{value}`" if value not in ("", None, [], ()) else ""


class Settings(SphinxDirective):
    """`{settings} module.Config`: a table of a recipe's settings, each with its default and its help."""

    required_arguments = 1

    def run(self):
        module, name = self.arguments[0].rsplit(".", 1)
        config = getattr(importlib.import_module(module), name)
        base = [field.name for parent in config.__mro__[1:-1] for field in dataclasses.fields(parent)]
        changed = [name for name in base if name in config.__annotations__]
        own = [field for field in dataclasses.fields(config) if field.name not in base or field.name in changed]
        rows = [row("setting", "default", "what it is"), "|---|---|---|"]
        for field in own:
            default = field.default_factory() if callable(field.default_factory) else field.default
            shown = "" if default is dataclasses.MISSING else code(default)
            rows.append(row(f"`{field.name}`", shown, field.metadata.get("help", "")))
        return self.parse_text_to_nodes("\n".join(rows))


class Command(SphinxDirective):
    """`{command} generate`: the arguments and options of a subcommand of `iomm-hf`."""

    required_arguments = 1

    def run(self):
        command = typing.cast(Any, typer.main.get_command(command_line)).commands[self.arguments[0]]
        rows, arguments = [row("option", "default", "what it is"), "|---|---|---|"], list[str]()
        for parameter in command.params:
            argument = parameter.param_type_name == "argument"
            names = [parameter.metavar or parameter.name] if argument else [*parameter.opts, *parameter.secondary_opts]
            arguments += [f"{{{name}}}" for name in names if argument]
            default = None if parameter.required or callable(parameter.default) else parameter.default
            rows.append(row(" ".join(f"`{name}`" for name in names), code(default), parameter.help or ""))
        usage = " ".join([f"iomm-hf {self.arguments[0]}", *arguments, "[OPTIONS]"])
        return self.parse_text_to_nodes(f"{command.help}\n\n```text\n{usage}\n```\n\n" + "\n".join(rows))


def setup(app: Sphinx):
    app.connect("autodoc-process-docstring", convert_docstring, priority=100)  # before napoleon
    app.add_directive("settings", Settings)
    app.add_directive("command", Command)
