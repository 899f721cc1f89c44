"""The documents tell the truth about the files: links, names of files, and the generated manual."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.rules import HEIGHT
from tests.helpers.source import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
NEEDED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/walk.md",
    "docs/your-first-training.md",
    "docs/formats.md",
)

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FOLDERS = "pentode|tests|docs|examples|configs|benchmarks|tools"
FILE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS}|{'|'.join(HEIGHT)})/[\w./-]+\.(?:py|md|yaml|sh))\b")
PLACEHOLDER = re.compile(r"/([A-Z]+|mine)\.")  # pentode/models/NAME.py, examples/mine.yaml


def numbered(page: Path, pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """What the pattern's first group finds, each with `file:line`."""
    for found in pattern.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{page.relative_to(ROOT)}:{line}", found[1]


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("path", NEEDED)
def test_the_page_exists(path: str) -> None:
    assert (ROOT / path).is_file(), f"{path}: not there; write it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for where, link in numbered(page, LINK, page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{where}: {link} leads to no file; mend the link")
        elif anchor and anchor not in anchors(target):
            broken.append(f"{where}: {link}: that page has no such heading; mend the link")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    wrong = [
        f"{where}: {name} does not exist; say where that is now"
        for where, name in numbered(page, FILE, page.read_text(encoding="utf-8"))
        if not PLACEHOLDER.search(name) and not (ROOT / name).is_file() and not (ROOT / "pentode" / name).is_file()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_config_manual_is_what_the_schema_says() -> None:
    from pentode.config.manual import manual

    page = ROOT / "docs/config.md"
    written = page.read_text(encoding="utf-8") if page.exists() else ""
    assert written == manual(), "docs/config.md: not what pentode/config/schema.py says now; run `make docs`"


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile(r"\b(pypi|pythonhosted|download[.]pytorch|registry[.]npmjs)[.](org|com)\b")
    folders = ["pentode", "tests", "docs", "examples", "configs", "benchmarks", "tools", ".ci"]
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    texts = [path for path in paths if path.is_file() and path.suffix != ".pyc"]
    named = [str(path.relative_to(ROOT)) for path in texts if hosts.search(path.read_text(encoding="utf-8"))]
    assert not named, f"{', '.join(named)}: names a registry's host; say how to choose it, not where it is"
