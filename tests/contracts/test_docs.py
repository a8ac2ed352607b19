"""The pages, checked against the tree and the registries: a page that has drifted fails here."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import typer

from nmprune import cli
from nmprune.architectures import FAMILIES
from nmprune.calibration import SOURCES
from nmprune.methods import METHODS
from nmprune.run import Recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ROOMS = ("benchmarks", "docs", "examples", "recipes", "src", "tests")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)


def ignored(name: str) -> bool:
    patterns = (ROOT / ".gitignore").read_text().split()
    return name.startswith(".") or any(fnmatch.fnmatch(name, pattern.strip("/")) for pattern in patterns)


def entries(folder: Path) -> set[str]:
    """What a reader sees in a folder: files by name, folders with a slash; empty folders are none of git's."""
    seen = set()
    for path in folder.iterdir():
        if ignored(path.name):
            continue
        if path.is_file():
            seen.add(path.name)
        elif any(file.is_file() and "__pycache__" not in file.parts for file in path.rglob("*")):
            seen.add(path.name + "/")
    return seen


def house() -> dict[str, dict[str, str]]:
    """The README's map: folder ("" = the root) -> entry -> its line."""
    block = README.partition("## The map of the house")[2].partition("```text\n")[2].partition("```")[0]
    found: dict[str, dict[str, str]] = {"": {}}
    folder = ""
    for line in block.splitlines():
        name, _, text = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name.strip("/")
            found[""][name.split("/")[0] + "/" if "/" in name else name] = text.strip()
        else:
            found.setdefault(folder, {})[name] = text.strip()
    return found


def test_the_map_of_the_house_is_the_tree():
    found = house()
    assert set(found) == {"", "src/nmprune", "tests"}
    assert set(found[""]) == entries(ROOT)
    assert set(found["src/nmprune"]) == entries(ROOT / "src" / "nmprune") - {"py.typed"}
    assert set(found["tests"]) == {name for name in entries(ROOT / "tests") if name.endswith("/")}


def test_every_room_has_its_line():
    for folder, rooms in house().items():
        opened = {"src/", "tests/"} if folder == "" else set()
        assert [name for name, text in rooms.items() if not text and name not in opened] == []


def test_the_table_of_methods_is_the_registry():
    rows = [line for line in README.splitlines() if line.startswith("| [") and "docs/methods/" in line]
    expected = []
    for name, method in METHODS.items():
        weights = "updated" if method.updates_weights else "frozen"
        statistics = ", ".join(sorted(method.needs)) or "none"
        summary = method.summary.replace("|", r"\|")
        expected.append(f"| [{name}](docs/methods/{name}.md) | {weights} | {statistics} | {summary} |")
    assert rows == expected, "the table should be:\n" + "\n".join(expected)


def test_every_method_and_source_has_its_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for name in METHODS:
        assert f"[{name}](methods/{name}.md)" in index
    calibration = (ROOT / "docs" / "calibration.md").read_text()
    for source in SOURCES.values():
        assert f"| `{source.spelling}` |" in calibration


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / target).resolve() for target, _ in links(index)}
    docs = {page for page in PAGES if page.parent != ROOT} - {ROOT / "docs" / "README.md"}
    assert docs <= linked


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_named(model_type):
    families = README.partition("Model families:")[2].partition("\n")[0].lower()
    bare = re.sub(r"[^a-z0-9]", "", families.replace("1 to 3", "1 gemma2 gemma3 text"))
    assert re.sub(r"[^a-z0-9]", "", model_type) in bare, "name it in the README"


@each_recipe
def test_every_recipe_is_valid_and_named_after_what_it_does(recipe):
    parsed = Recipe.from_yaml(recipe)
    model = parsed.model.partition("-")[0]
    uniform = f"{parsed.pattern.kept}x{parsed.pattern.group}"
    pattern = f"mixed{100 * parsed.density:g}" if parsed.choices else uniform
    assert recipe.stem == f"{model}_{parsed.pruner.name.replace('+', '_')}_{pattern}"
    assert str(recipe.relative_to(ROOT)) in recipe.read_text().splitlines()[0], "the first line says how to run it"


def shown_commands(text: str) -> list[list[str]]:
    """The words of every `nmprune ...` command on a line of its own, continued lines joined, comments cut."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [re.match(r"\s+(?:\$ |\.venv/bin/)?nmprune +(\w.*)", line) for line in lines]
    return [match[1].partition(" #")[0].split() for match in found if match]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "demo.py"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_that_are_shown_exist(page):
    known = typer.main.get_command(cli.app).commands
    for name, *words in shown_commands(page.read_text()):
        assert name in known, f"nmprune {name} is shown and does not exist"
        flags = {flag for parameter in known[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= flags | {"--help"}


def links(markdown: str) -> list[tuple[str, str]]:
    """(target, anchor) of every link that is not to the web."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.DOTALL)
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose)
    return [target.partition("#")[::2] for target in targets if "://" not in target]


def anchors(markdown: str) -> set[str]:
    """The anchors of the headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ +(.+)$", markdown, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target, anchor in links(page.read_text()):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{target} is linked and is not there"
        assert not anchor or anchor in anchors(place.read_text()), f"{target}#{anchor}: no such heading"


@each_page
def test_files_that_are_named_exist(page):
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]+)[^`]*`", page.read_text())
    missing = [path for path in named if not (ROOT / path).exists() and path == path.lower()]  # NAME is a placeholder
    assert not missing
