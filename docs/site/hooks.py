# SPDX-License-Identifier: Apache-2.0
"""What mkdocs needs to know of this repository.

Some pages lie outside of ``docs/`` (the changelog, reports of benchmarks), some are made from the
code (the command line), links lead to sources that the site does not hold, and formulas become
MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"

log = logging.getLogger("mkdocs.hooks.grcsf")


def on_config(config: Any) -> Any:
    """Fill in the navigation what depends on the files that are there."""
    folders = {
        "examples": [
            (_title(path), f"examples/{path.parent.name}/README.md")
            for path in sorted(ROOT.glob("docs/examples/*/README.md"))
        ],
        "results": [
            (_title(path), f"results/{path.parent.name}/report.md")
            for path in sorted(ROOT.glob(f"{RESULTS}/*/report.md"), reverse=True)
        ],
    }

    def fill(entries: list[Any]) -> list[Any]:
        filled = []
        for entry in entries:
            ((title, target),) = entry.items()
            if isinstance(target, list):
                filled.append({title: fill(target)})
            elif target in folders:
                pages = [{name: page} for name, page in folders[target]]
                filled += [{title: pages}] if pages else []
            else:
                filled.append(entry)
        return filled

    config.nav = fill(config.nav)
    return config


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside of ``docs/``."""
    script = "assets/iframe-worker.js"
    outside = {"changelog.md": ROOT / "CHANGELOG.md", script: Path(__file__).parent / script}
    for path in sorted((ROOT / RESULTS).glob("*/*")):
        if path.suffix in (".md", ".png"):
            outside[f"results/{path.parent.name}/{path.name}"] = path
    for address, path in outside.items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def _address(path: Path) -> str | None:
    """Where a file of the repository is in the site; None: it is not there."""
    name = path.relative_to(ROOT).as_posix()
    special = {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}
    if name in special:
        return special[name]
    if name.startswith(f"{RESULTS}/") and path.suffix in (".md", ".png"):
        return name.replace(RESULTS, "results", 1)
    in_site = path.is_file() and name.startswith("docs/") and not name.startswith("docs/site/")
    return name.removeprefix("docs/") if in_site else None


_CODE = re.compile(r"^(```|~~~).*?^\1[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^][]*\])*)\]\(([^()\s]+)\)|(!\[[^]]*\])\(([^()\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Generate what is asked for, and lead the links of the repository to pages of the site."""
    if page.file.src_uri == "cli.md":
        markdown = markdown.replace("<!-- commands -->", commands())
    source = Path(page.file.abs_src_path)
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match.group())
        return f"\0{len(kept) - 1}\0"

    def lead(match: re.Match[str]) -> str:
        text, target = match.group(1) or match.group(3), match.group(2) or match.group(4)
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        name, hash_, anchor = target.partition("#")
        path = (source.parent / name).resolve()
        if (path / "README.md").is_file():  # a folder: its page
            path /= "README.md"
        if not path.exists() or not path.is_relative_to(ROOT):
            log.warning("%s: link to %s, which does not exist", page.file.src_uri, target)
            return match.group()
        address = _address(path)
        if address is None:  # a source file: the site does not hold it
            return str(text)
        relative = os.path.relpath(address, PurePosixPath(page.file.src_uri).parent)
        return f"{text if match.group(3) else f'[{text}]'}({relative}{hash_}{anchor})"

    # Code is no link; a link's text may be code.
    markdown = _LINK.sub(lead, _CODE.sub(keep, markdown))
    return re.sub(r"\0(\d+)\0", lambda match: kept[int(match.group(1))], markdown)


def commands() -> str:
    """The command line as Markdown, from the commands themselves."""
    import typer
    from typer.cli import get_docs_for_click

    from grcsf_kernels.cli.commands import app

    command = typer.main.get_command(app)
    context = command.make_context("grcsf", ["--help"], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="grcsf")
    # <case> is text, not a tag, except in code.
    pieces = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.DOTALL)
    text = "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in pieces)
    return text.replace("# `grcsf`", "## `grcsf`", 1)


_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.DOTALL
)


_ROLE = re.compile(r":(?:func|class|mod|meth|attr):<code>~?([\w.]+)</code>")


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """References of docstrings to links, and TeX to MathML.

    Without latex2mathml the formulas stay as they are written.
    """
    # Those that have no entry of their own stay names: optional.
    content = _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', content)
    if 'class="arithmatex"' not in content:
        return content
    try:
        from latex2mathml.converter import convert
    except ImportError:
        log.info("formulas stay in TeX: pip install latex2mathml")
        return content

    def draw(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        return convert(html.unescape(match["tex"]), display=display)

    return _FORMULA.sub(draw, content)
