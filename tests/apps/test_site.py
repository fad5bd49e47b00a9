"""The documentation as a site: it builds, has every public name, leads to files of the repository, and fails at a broken link."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import transformer

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
ROOT = pathlib.Path(__file__).parents[2]


def build(root, into):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(into)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    into = tmp_path_factory.mktemp("site")
    done = build(ROOT, into)
    assert done.returncode == 0, done.stderr
    return into


def test_the_api_has_every_public_name(site):
    page = (site / "api.html").read_text()
    names = set(re.findall(r'<h3 id="transformer\.(\w+)"', page))
    assert names == set(transformer.__all__)
    assert "&gt;&gt;&gt;" not in re.sub(r"<(pre|code).*?</\1>", "", page, flags=re.S)  # each doctest is code


def test_links_to_the_repository_lead_to_pages(site):
    assert 'href="repository/CONTRIBUTING.html"' in (site / "index.html").read_text()
    assert 'href="repository/examples/own_objective.py.html"' in (site / "how-to-add.html").read_text()
    assert "class" in (site / "repository" / "examples" / "own_objective.py.html").read_text()
    assert 'href="launch/slurm.sh.html"' in (site / "repository" / "launch.html").read_text()


def test_a_page_makes_no_request(site):
    """Fonts, styles and scripts come with the site."""
    for page in ("index.html", "api.html"):
        found = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"?(\w+:[^\s\">]+)", (site / page).read_text())
        assert not found


def test_a_broken_link_and_a_broken_anchor_fail(tmp_path):
    for path in ROOT.iterdir():
        if path.name == "docs":
            shutil.copytree(path, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name != "site" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    with (tmp_path / "docs" / "trackers.md").open("a") as page:
        page.write("\n[a](nowhere.md) [b](data.md#nowhere) [c](../nowhere.py) [d](#nowhere)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    found = sorted(re.findall(r"'([^']*nowhere[^']*)'", "\n".join(warnings)))
    assert {"#nowhere", "../nowhere.py", "data.md#nowhere", "nowhere.md"} <= set(found) and len(warnings) == 4
