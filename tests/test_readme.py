"""The README's Python example runs, its commands exist, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from teal import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))


def commands(text: str) -> list[str]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("teal ")]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.strip().splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "The city of" in capsys.readouterr().out
    assert (tmp_path / "teal-embedded-sparse" / "plan.json").is_file()


@pytest.mark.parametrize("command", [c for path in DOCUMENTS for c in commands(path.read_text(encoding="utf-8"))])
def test_every_documented_command_parses(command, monkeypatch):
    arguments = shlex.split(command.split("|")[0])[1:]
    module = cli.importlib.import_module(f"teal.commands.{arguments[0].replace('-', '_')}")
    parsed = []
    monkeypatch.setattr(module, "run", parsed.append)
    assert cli.main(arguments) == 0
    assert parsed


def test_every_verb_is_in_the_readme():
    used = {command.split()[1] for command in commands(README)} | {"demo"}
    assert used == set(cli.VERBS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
