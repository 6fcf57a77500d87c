"""Links, commands and shown output of the documentation, without a network and without Sphinx."""

import ast
import io
import re
import runpy
import shlex
import shutil
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest

import ppvae
from ppvae import pairs
from ppvae.cli import cli

ROOT = Path(__file__).parents[1]
MADE = ("docs/_build/", "docs/auto_examples/")  # by a build


def pages():
    found = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *(ROOT / "docs").rglob("*.md")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    return [name for name in names if not name.startswith(MADE)]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def fences(page):
    """The fenced blocks of a page: what stands behind the backticks, and what is inside."""
    return re.findall(r"^```(\S.*?)?\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


# --- Links -------------------------------------------------------------------------------------


def anchors(path):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    page = path.relative_to(ROOT).as_posix()
    text = prose_of(page)
    for included in re.findall(r"^```\{include\} (\S+)$", text_of(page), flags=re.MULTILINE):
        text += "\n" + (path.parent / included).read_text(encoding="utf-8")
    headings = re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


def leads_nowhere(page, target):
    """Why a link of a page is wrong, `None` if it is right."""
    if re.match(r"[a-z]+:", target):
        parts = urlsplit(target)
        return None if parts.scheme == "https" and "." in parts.netloc else "not an https address"
    name, _, anchor = target.partition("#")
    folder = (ROOT / page).parent
    path = folder / name if name else ROOT / page
    if path.parent.name == "auto_examples":
        example = ROOT / "examples" / f"{path.stem}.py"
        return None if path.name == "index" or example.exists() else "no such example"
    if path.parent.name == "_graphs":
        return None if path.stem in pairs.__all__ else "no such pair"
    if not path.exists():
        return "no such file"
    if anchor and anchor not in anchors(path.resolve()):
        return "no such heading"
    return None


def links(page):
    prose = re.sub(r"`[^`\n]*`", "code", prose_of(page))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def test_links_lead_somewhere():
    every = [(page, target) for page in pages() for target in links(page)]
    assert len(every) > 150
    assert not {link: why for link in every if (why := leads_nowhere(*link))}


def test_the_check_of_links_finds_wrong_ones():
    for target in (
        "nowhere.md",
        "evidence.md#no-such-heading",
        "#no-such-heading",
        "auto_examples/plot_nothing",
        "models/_graphs/nothing.svg",
        "http://pyro.ai",
    ):
        assert leads_nowhere("docs/index.md", target)
    for target in ("evidence.md#annealing", "auto_examples/plot_toy", "https://pyro.ai"):
        assert leads_nowhere("docs/index.md", target) is None


def test_what_a_page_includes_is_there():
    blocks = [(page, *fence) for page in pages() for fence in fences(page)]
    for page, head, body in blocks:
        directive = re.fullmatch(r"\{(include|literalinclude|image)\} (\S+)", head)
        if directive is None or directive[2].startswith("_build/"):
            continue
        source = (ROOT / page).parent / directive[2]
        assert source.exists(), (page, directive[2])
        if directive[1] == "image":
            continue
        options = dict(re.findall(r"^:([\w-]+): \"?(.*?)\"?$", body, flags=re.MULTILINE))
        for mark in ("start-after", "end-before"):
            assert options.get(mark, "") in source.read_text(encoding="utf-8")
        if "pyobject" in options:
            tree = ast.parse(source.read_text(encoding="utf-8"))
            assert options["pyobject"] in {getattr(node, "name", None) for node in tree.body}


def sources():
    found = [
        p for d in ("ppvae", "tests", "examples", "benchmarks") for p in (ROOT / d).rglob("*.py")
    ]
    return [p.relative_to(ROOT).as_posix() for p in found]


def test_files_that_are_named_are_there():
    """In code marks, with a folder of the repository in front."""
    pattern = r"`((?:ppvae|tests|examples|benchmarks|docs|\.ci)/[\w./-]+)`"
    wrong = {
        (page, name)
        for page in [*pages(), *sources()]
        for name in re.findall(pattern, text_of(page))
        if not (ROOT / name).exists() and not f"{name}/".startswith(MADE)
    }
    assert not wrong


def test_every_public_name_has_a_page_in_the_reference():
    index = text_of("docs/api/index.md")
    listed = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", index, flags=re.DOTALL)[1].split()
    pages_there = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")} - {"index"}
    assert set(listed) == set(re.findall(r"\]\((\w+)\.md\)", index)) == pages_there
    named = [getattr(ppvae, name) for name in ppvae.__all__]
    modules = {getattr(it, "__module__", None) or it.__name__ for it in named}
    assert {m.removeprefix("ppvae.").split(".")[0] for m in modules} <= pages_there


# --- Commands ----------------------------------------------------------------------------------


def commands(page):
    """The shell commands of a page, in blocks and in code marks, each as a list of words."""
    lines = [line for head, body in fences(page) if head == "sh" for line in body.splitlines()]
    starts = r"`((?:\.venv/bin/|python3? |ppvae |\.ci/)[^`\n]*)`"
    lines += re.findall(starts, prose_of(page))
    for line in lines:
        for part in re.split(r"&&|\|\|", line):
            words = shlex.split(part, comments=True)
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def check_ppvae(words):
    command, options = cli, [w.partition("=")[0] for w in words if w.startswith("-")]
    if words and not words[0].startswith("-"):
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, words
    known = {"-h", "--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
    assert set(options) <= known, words


def check_python(words):
    if words[:2] == ["-m", "venv"]:
        return
    script = ROOT / words[0]
    text = script.read_text(encoding="utf-8")
    for option in words[1:]:
        assert not option.startswith("-") or f'"{option}"' in text, (words, option)


def check_pytest(words):
    ours = text_of("tests/conftest.py")
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in ours, words
        elif "/" in word:
            assert (ROOT / word).exists(), words


def check_pip(words):
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert words[0] == "install"
    assert set(re.search(r"\.\[(.*)\]", words[-1])[1].split(",")) <= set(extras), words


CHECKS = {
    "ppvae": check_ppvae,
    "python": check_python,
    "python3": check_python,
    "pytest": check_pytest,
    "pip": check_pip,
    # These four run in `.ci/run`, with the options of the README and of CONTRIBUTING.md.
    "sphinx-build": lambda words: None,
    "ruff": lambda words: None,
    "mypy": lambda words: None,
    ".ci/run": lambda words: None,
    "test": lambda words: None,
}


def test_commands_exist_with_their_options():
    for page in pages():
        for program, *words in commands(page):
            assert program in CHECKS, f"{page}: no check for {program}"
            CHECKS[program](words)


def test_the_check_of_commands_finds_wrong_ones():
    for check, words in (
        (check_ppvae, ["compare", "--no-such-option"]),
        (check_ppvae, ["no-such-command"]),
        (check_python, ["benchmarks/refine.py", "--no-such-option"]),
        (check_pytest, ["tests/no_such_file.py"]),
        (check_pip, ["install", "-e", ".[nothing]"]),
    ):
        with pytest.raises(AssertionError):
            check(words)


def test_blocks_have_a_language_that_is_checked():
    """Python is executed and commands are checked; anything else has to be said to be text."""
    for page in pages():
        for head, _ in fences(page):
            assert head in ("python", "sh", "text") or head.startswith("{"), (page, head)


# --- What is said of figures and sources -------------------------------------------------------


def test_figures_of_papers_stand_in_the_file_that_is_named():
    text = prose_of("docs/papers.md")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in rows if len(row) == 4 and row[3].startswith("`")]
    assert len(rows) >= 8
    for _, _, ours, file in rows:
        source = text_of(file.strip("`"))
        for figure in re.findall(r"\d+\.\d+", ours):
            assert figure in source, (figure, file)


# --- The configuration of Sphinx ---------------------------------------------------------------


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Runs a copy of docs/conf.py, with an answer in the place of the network."""
    pytest.importorskip("sphinx", reason="comes with the docs extra")
    pytest.importorskip("yaml", reason="comes with it")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])

    def run(answer):
        def urlopen(url, timeout):
            assert url.startswith("https://")
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return runpy.run_path(str(tmp_path / "docs" / "conf.py"))

    return run


HEADER = b"# Sphinx inventory version 2\n"


@pytest.mark.parametrize(
    "answer", [urllib.error.URLError("no network"), TimeoutError(), b"<html>Please log in</html>"]
)
def test_without_a_network_there_are_no_inventories_and_no_error(configured, answer):
    assert configured(answer)["intersphinx_mapping"] == {}


def test_inventories_are_fetched_once(configured):
    found = configured(HEADER)
    mapping = found["intersphinx_mapping"]
    assert (
        {"python", "numpy", "torch", "pyro", "arviz"}
        <= mapping.keys()
        == found["INVENTORIES"].keys()
    )
    for address, path in mapping.values():
        assert urlsplit(address).scheme == "https"
        assert Path(path).read_bytes() == HEADER
    assert configured(urllib.error.URLError("no network"))["intersphinx_mapping"] == mapping


def test_the_bibtex_entry_is_the_citation_file(configured):
    entry = configured(urllib.error.URLError("no network"))["bibtex"]()
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    fields = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,$", entry, flags=re.MULTILINE))
    assert entry.startswith("@software{ppvae,")
    assert fields["version"] == project["version"]
    assert fields["author"] == project["authors"][0]["name"]
    assert f'title: "{fields["title"]}"' in text_of("CITATION.cff")
    assert entry.count("{") == entry.count("}")


def test_the_gallery_begins_with_the_first_example():
    names = {path.name for path in (ROOT / "examples").glob("plot_*.py")}
    order = runpy.run_path(str(ROOT / "docs" / "gallery_order.py"))
    assert set(order["ORDER"]) <= names
    ordered = sorted(names, key=order["FirstThingsFirst"]("examples"))
    assert ordered[: len(order["ORDER"])] == list(order["ORDER"])
