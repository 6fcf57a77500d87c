"""What the README and the documentation show is what the package does."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    *(
        str(page.relative_to(ROOT))
        for folder in ("docs", "docs/models")
        for page in sorted((ROOT / folder).glob("*.md"))
        if "```python" in page.read_text(encoding="utf-8")
    ),
]


def python_blocks(page: str) -> list[tuple[int, str]]:
    """The Python code of a Markdown page, each block with the line before its first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def command(name: str) -> str:
    """The command in the block under `<!-- commands:NAME -->`."""
    pattern = rf"^<!-- commands:{name} -->\n```sh\n(.*?)\n```$"
    [text] = re.findall(pattern, README, flags=re.MULTILINE | re.DOTALL)
    return text


@pytest.mark.fills_store
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = python_blocks(page)
    assert blocks
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks:
        # Blank lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), namespace)
    if any("print(" in block for _, block in blocks):
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("name", "extra"), [("run", "examples"), ("test", "test")])
def test_readme_commands_install_what_they_need(name: str, extra: str) -> None:
    text = command(name)
    assert "\n" not in text
    assert "python3 -m venv .venv" in text
    assert f'pip install -q -e ".[{extra}]"' in text


def test_readme_commands_end_in_what_they_are_for() -> None:
    assert command("run").split(" && ")[-1] == ".venv/bin/ppvae compare"
    assert command("test").split(" && ")[-1].split()[0] == ".venv/bin/pytest"


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in ROOT.glob("C*.md"))])
def test_local_links_of_top_level_pages_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version("ppvae") == project["version"]
