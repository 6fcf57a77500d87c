"""What the README and the documentation show is what the package does."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text(encoding="utf-8")
    and not {"_build", "auto_examples"} & set(page.relative_to(ROOT).parts)
]
NUMBER = r"[-−+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"


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


def shown_outputs(page: str) -> dict[int, str]:
    """The output that a page shows, by the number of the Python block above it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(python|text)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    shown, blocks = {}, 0
    for language, content in found:
        blocks += language == "python"
        if language == "text":
            shown[blocks - 1] = content
    return shown


def check_shown(shown: str, printed: str) -> None:
    """The shown lines are among those printed, word by word, and figures agree within errors.

    Figures hang on the machine's arithmetic. A mean `m ± e (sd s)` of 200 rows may differ by five
    of its errors over draws and rows, with 0.05 for an sd that is not shown; any other number is
    taken as it comes.
    """
    lines = iter(printed.splitlines())
    for wanted in shown.splitlines():
        if not wanted.strip() or wanted == "…":
            continue
        match = next((line for line in lines if words(line) == words(wanted)), None)
        assert match is not None, f"not printed: {wanted}"
        figures = zip(measured(wanted), measured(match), strict=True)
        for (mean, error, sd), (other, other_error, other_sd) in figures:
            over_rows = (max(sd, other_sd) if sd or other_sd else 0.05) / 200**0.5
            assert abs(mean - other) <= 5 * 2**0.5 * (max(error, other_error) + over_rows), wanted


def words(line: str) -> list[str]:
    """A line without its figures, and without the clause that noise adds to some of them."""
    return re.sub(NUMBER, "#", line).replace(", below in #", "").split()


def measured(line: str) -> list[tuple[float, float, float]]:
    """The means of a line with their errors, and with their sd where they have one, else 0."""
    found = re.findall(rf"({NUMBER}) ± ({NUMBER})(?: \(sd ({NUMBER})\))?", line)
    return [(float(m), float(e), float(s or 0)) for m, e, s in found]


@pytest.mark.fills_store
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks, shown = python_blocks(page), shown_outputs(page)
    assert blocks
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, (line, block) in enumerate(blocks):
        # Blank lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), namespace)
        printed = capsys.readouterr().out
        assert printed.strip() or "print(" not in block
        if number in shown:
            check_shown(shown[number], printed)


def test_the_check_of_shown_output_finds_other_words_and_other_figures() -> None:
    printed = "first\ngap 0.11 ± 0.01 (sd 0.3) in 1,200 of 2,000, below in 3\n"
    check_shown("gap  0.10 ± 0.01 (sd 0.3) in 990 of 2,000", printed)
    for printed in ("hole 0.10 ± 0.01 (sd 0.3)", "gap 0.40 ± 0.01 (sd 0.3)", ""):
        with pytest.raises(AssertionError):
            check_shown("gap  0.10 ± 0.01 (sd 0.3)", printed)


@pytest.mark.parametrize(
    ("name", "extra"), [("run", "examples"), ("test", "test"), ("docs", "docs")]
)
def test_readme_commands_install_what_they_need(name: str, extra: str) -> None:
    text = command(name)
    assert "\n" not in text
    assert "python3 -m venv .venv" in text
    assert f'pip install -q -e ".[{extra}]"' in text


def test_readme_commands_end_in_what_they_are_for() -> None:
    assert command("run").split(" && ")[-1] == ".venv/bin/ppvae compare"
    assert command("test").split(" && ")[-1].split()[0] == ".venv/bin/pytest"
    build = command("docs").split(" && ")[-1].split()
    assert build[0] == ".venv/bin/sphinx-build"
    assert "-W" in build, "a warning is an error"
    assert build[-2:] == ["docs", "docs/_build/html"]


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version("ppvae") == project["version"]
