# SPDX-License-Identifier: Apache-2.0
"""The documentation: links lead somewhere, quoted code is the code, the site builds strictly."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("typer", reason="needs the extra train")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
# Each code block, or code in a line: neither holds links.
CODE = re.compile(r"^(```|~~~).*?^\1[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def anchors(text):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_messages_name_no_page_that_an_installed_user_lacks():
    """Only the wheel is there: what is said holds its remedy itself."""
    for path in sorted((ROOT / "grcsf_kernels").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                docstring = id(node) in texts
                assert docstring or "docs/" not in node.value, f"{path.name}: {node.value}"


def test_quoted_code_is_that_of_the_files():
    """A block with a title quotes the file of that name."""
    quoted = 0
    for page in PAGES:
        blocks = re.findall(
            r'^```\w+ title="([^"]+)"\n(.*?)^```', page.read_text(encoding="utf-8"), re.M | re.S
        )
        for name, code in blocks:
            assert code in (ROOT / name).read_text(encoding="utf-8"), f"{page.name}: {name}"
            quoted += 1
    assert quoted >= 8


pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as ``make docs`` builds it."""
    target = tmp_path_factory.mktemp("site")
    config = ROOT / "docs/site/mkdocs.yml"
    command = ("-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", target)
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return target


def test_every_public_object_has_an_entry(site):
    modules = {
        "grcsf_kernels": "operators",
        "grcsf_kernels.nn": "modules",
        "grcsf_kernels.models": "models",
        "grcsf_kernels.engine": "engine",
    }
    for name, page in modules.items():
        text = (site / f"api/{page}.html").read_text(encoding="utf-8")
        module = importlib.import_module(name)
        for public in module.__all__:
            found = getattr(module, public)
            if public in ("functional", "nn", "models"):
                continue  # pages of their own
            if public == "convert":
                assert f'id="{name}.{public}.load_projections"' in text
                continue
            if public == "__version__":
                assert "__version__" in text
                continue
            # Where a submodule has the name of its function the entry names both.
            names = {f"{name}.{public}", f"{found.__module__}.{public}"}
            assert any(f'id="{entry}"' in text for entry in names), f"{name}.{public}"


def test_commands_are_those_of_the_command_line(site):
    from grcsf_kernels.cli.commands import app

    text = (site / "cli.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f'id="grcsf-{command.name}"' in text
        assert f"`grcsf {command.name}`" in (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert "&lt;case&gt;_mask.nii.gz" in text


def test_the_page_of_settings_is_that_of_the_code(site):
    """It is in the repository as well: python docs/site/settings_page.py writes it."""
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs/site/settings_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
    text = (site / "settings.html").read_text(encoding="utf-8")
    for name in ("validation_fraction", "clip_norm", "weight_decay", "foreground"):
        assert f"<code>{name}</code>" in text


def test_formulas_are_drawn(site):
    """No formula stays as it is written in the source, in docstrings or pages."""
    for page in site.rglob("*.html"):
        text = re.sub(r"<(code|pre)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert ".. math" not in text and ":math:" not in text, page.name
        assert "\\frac" not in text, page.name
    assert (site / "api/operators.html").read_text(encoding="utf-8").count("<mfrac>") >= 1


def test_search_works_from_a_folder(site):
    """The index is a script of the site, and so is what stands in for a worker."""
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {") and "residual_map" in index
    assert (site / "assets/iframe-worker.js").is_file()
    for page in ("index.html", "api/engine.html"):
        text = (site / page).read_text(encoding="utf-8")
        assert re.search(r'src="(\.\./)*(\./)?assets/iframe-worker.js"', text), page


def test_links_to_examples_lead_to_their_pages(site):
    text = (site / "drop-in.html").read_text(encoding="utf-8")
    for folder in sorted((ROOT / "docs/examples").glob("*/README.md")):
        assert f'href="examples/{folder.parent.name}/index.html"' in text


def test_nothing_comes_from_elsewhere(site):
    """No script, style, font or picture of another host, on any page."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"', text)
        loaded += re.findall(r'<link[^>]* href="([^"]*)"', text)
        assert loaded
        for address in loaded:
            assert not re.match(r"([a-z]+:)?//", address), f"{page.name}: {address}"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\(\s*[\"']?(https?:)?//", styles)


def test_pages_from_outside_of_docs_are_there(site):
    for report in ROOT.glob("benchmarks/results/*/report.md"):
        assert (site / f"results/{report.parent.name}/report.html").is_file()
    assert (site / "changelog.html").is_file()
    assert not (site / "site").exists()
    # A link to a source file is no link in the site; one to a report leads to its page.
    text = (site / "add-an-operator.html").read_text(encoding="utf-8")
    assert "grcsf_kernels/reference/residual_map.py" in text
    assert 'href="grcsf_kernels' not in text and 'href="../grcsf_kernels' not in text
    performance = (site / "performance.html").read_text(encoding="utf-8")
    assert re.search(r'href="results/[\w-]+/report.html"', performance)
