"""MkDocs: the page of the API, with every name that `transformer` exports, in groups by package."""

from mkdocs.structure.files import File

import transformer

GROUPS = {
    "Configs": ("config", "model_config", "parallel_config", "adapter_config"),
    "Models": ("models",),
    "Layers and caches": ("layers", "parallel"),
    "Attention, masks and biases": ("ops",),
    "Base classes and families of kinds": (
        *("kinds", "model_kinds", "objective", "optimizer", "tokenizer", "tracker", "form"),
    ),
    "Objectives": ("objectives",),
    "Optimizers and schedules": ("optimizers", "schedules"),
    "Generation": ("generation",),
    "Runs, reports and attention pages": ("runs", "training", "analysis"),
    "Data, types and errors": ("data", "types"),
}
_INTRODUCTION = """\
# API

Every name of `from transformer import ...`, from the docstrings. A name is imported on first use: a config needs no Flax, and
layers need no Orbax. Letters in shapes and suffixes are in the [glossary](glossary.md#letters-of-axes).
"""


def page():
    """The page: a heading for each group, and a directive for each name."""
    lines = [_INTRODUCTION]
    groups = {package: title for title, packages in GROUPS.items() for package in packages}
    found = {title: [] for title in GROUPS}
    for module, names in transformer._NAMES.items():
        package = module.split(".")[0]
        found.setdefault(groups.get(package, package), []).extend(names.split())
    for title, names in found.items():
        lines += [f"## {title}\n", *(f"::: transformer.{name}\n" for name in sorted(names))]
    return "\n".join(lines)


def on_files(files, config):
    """Add the page."""
    files.append(File.generated(config, "api.md", content=page()))
    return files
