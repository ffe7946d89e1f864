"""Plug-ins for tests: laid where pip would lay them, or made of a few lines."""

from __future__ import annotations

import pathlib
import shutil
import tomllib


def install(source: pathlib.Path, site: pathlib.Path) -> None:
    """What pip would lay there: the package, and the metadata with its entry points."""
    told = tomllib.loads((source / "pyproject.toml").read_text())
    project, packages = told["project"], told["tool"]["setuptools"]["packages"]
    for package in packages:
        shutil.copytree(source / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def plugin(folder: pathlib.Path, name: str, code: str, group: str, **points: str) -> pathlib.Path:
    """A plug-in of one module, as its author would keep it."""
    package = name.replace("-", "_")
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    places = "\n".join(f'{k} = "{package}:{v}"' for k, v in points.items())
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "0.1"\n[project.entry-points."{group}"]\n{places}\n'
        f'[tool.setuptools]\npackages = ["{package}"]\n'
    )
    return folder
