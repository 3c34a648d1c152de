"""The docs: generated pages are current, code on the pages runs, commands are the ones that exist."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
import yaml

import sentcompress
import sentcompress.testing
from sentcompress.errors import DataError, InputError, PluginError, TerminatedError
from sentcompress.registry import KINDS, Registry, get_registry
from sentcompress.testing import check_backbone, check_dataset, check_plugin

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "plugins-guide.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_generated_pages_are_current():
    if typer.__version__ != pinned("typer"):
        pytest.skip(
            f"help is laid out by typer: {typer.__version__} here, {pinned('typer')} in constraints.txt"
        )
    command = [sys.executable, str(ROOT / "tools" / "docs" / "generate_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "plugins-guide" / "index.html").is_file()


# Commands shown


def shown_commands() -> list[str]:
    """Every ``sentcompress ...`` in the examples of the help texts and in the shell blocks of the pages."""
    lines = []
    pages = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("**/README.md"))
    for page in pages:
        for block in re.findall(
            r"^```(?:bash|text)\n(.+?)^```$", page.read_text(encoding="utf-8"), re.M | re.S
        ):
            lines += [line.strip() for line in block.splitlines()]
    found = [re.search(r"(?:^|&& |\| )(sentcompress .+)", line) for line in lines]
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_shown_parses(line: str):
    from sentcompress.cli import app

    words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)
    command, words = typer.main.get_command(app), words[1:]
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        if words[0] == "COMMAND":  # a placeholder in the help
            return
        assert words[0] in command.commands, f"no such command: {line}"
        command = command.commands[words.pop(0)]
    if not set(words) & {"--help", "--version", "--install-completion"}:
        command.make_context(command.name, words)  # raises on an unknown option or a missing argument


# The README's commands


def readme_command(name: str) -> str:
    blocks = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.+?)\n```$", README, re.M | re.S)
    assert len(blocks) == 1, f"the README must have one block marked '<!-- command: {name} -->'"
    return blocks[0]


def test_ci_runs_the_readmes_second_command():
    """The shell in .ci/run finds the same text in the README as this file does."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^readme_command\(\) \{.+?^\}$", script, re.M | re.S)[0]
    for name in ("run", "test"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{function}\nreadme_command {name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.rstrip("\n") == readme_command(name)
    assert "command=$(readme_command test)" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = re.findall(r"^<!-- command: (\w+) -->", README, re.M)
    assert commands == ["run", "test"], "the README leads with these two, in this order"


def test_both_commands_start_from_nothing_and_use_the_pins():
    for name in ("run", "test"):
        command = readme_command(name)
        assert command.startswith(
            "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt"
        )
    assert "sentcompress run quickstart" in readme_command("run")
    assert "pytest" in readme_command("test")


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for name in extras for r in extras[name])]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted} - {"sentcompress"}
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert {line.partition("==")[0] for line in pins} >= names
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    assert pins[0].startswith("torch==")


def test_the_lowest_session_pins_every_lower_bound():
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    noxfile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noxfile)
    lines = noxfile.lowest_constraints().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, _, version = requirement.partition(">=")
        assert f"{name}=={version}" in lines
    assert f"pytest=={pinned('pytest')}" in lines, "test tools are those of constraints.txt"
    assert noxfile.PYTHONS == ["3.11", "3.12", "3.13"]
    with pytest.raises(ValueError, match="'a<2' has no plain lower bound"):
        noxfile.lower_bounds(["a<2"])


def test_the_readme_is_short():
    """A newcomer reads all of it: at most 700 words outside code, lines of at most 120 columns."""
    assert max(map(len, README.splitlines())) <= 120
    prose = re.sub(r"^```.+?^```$|<!--.+?-->|\]\([^)]*\)|^\|[-|]+$", "", README, flags=re.M | re.S)
    assert len(prose.replace("|", " ").split()) <= 700


# The plugin guide


def blocks(title: str | None = None) -> dict[str, str]:
    found = dict(re.findall(r"^```\w+ title=\"(.+?)\"\n(.+?)^```$", GUIDE, re.M | re.S))
    return found if title is None else {title: found[title]}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The guide's modules, installed, as the guide's pyproject.toml says."""
    monkeypatch.delenv("SENTCOMPRESS_PLUGINS", raising=False)
    modules = [name.removesuffix(".py") for name in blocks() if re.fullmatch(r"sentcompress_\w+\.py", name)]
    for module in modules:
        (tmp_path / f"{module}.py").write_text(blocks()[f"{module}.py"], encoding="utf-8")
        info = tmp_path / f"{module}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[sentcompress]\n{module} = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    assert [p.error for p in registry.plugins if p.name in modules] == [None] * len(modules)
    yield registry
    for module in modules:
        sys.modules.pop(module, None)


def test_the_readme_shows_the_guides_segmenter():
    shown = dict(re.findall(r"^```python title=\"(.+?)\"\n(.+?)^```$", README, re.M | re.S))
    assert shown == blocks("sentcompress_semicolon.py")


def test_the_guides_packaging_is_right():
    project = tomllib.loads(blocks()["pyproject.toml"])
    entry = project["project"]["entry-points"]["sentcompress"]
    assert entry == {"semicolon": "sentcompress_semicolon"}
    assert project["tool"]["hatch"]["build"]["include"] == ["sentcompress_semicolon.py"]
    code = [line for line in blocks()["sentcompress_semicolon.py"].splitlines() if line.strip()]
    assert len(code) <= 20, "the guide promises twenty lines"


def test_the_guides_segmenter_loses_nothing(registry: Registry):
    segmenter = registry.create("segmenter", "semicolon", {"max_chars": 5})
    for text in ("", "a; b.", "no mark at all", "a;;b\n\n; ..", "ünïcödé; 文。"):
        pieces = segmenter.split(text)
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= 5 for piece in pieces)


@pytest.mark.slow
@pytest.mark.usefixtures("registry")
def test_the_guides_test_passes(tmp_path: Path):
    (tmp_path / "test_semicolon.py").write_text(blocks()["test_semicolon.py"], encoding="utf-8")
    # Blocked as an entry point: the version that is installed may be an older one.
    plugins = ["no:cacheprovider", "no:sentcompress", "sentcompress.testing.pytest_plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(word for name in plugins for word in ("-p", name))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("segmenter", "semicolon"),
        ("fusion", "max"),
        ("metric", "length-ratio"),
        ("memory", "ends"),
        ("memory", "cosine"),
    ],
)
def test_the_guides_components_pass_the_kit(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
):
    monkeypatch.setattr("sentcompress.testing.checks.get_registry", lambda: registry)
    settings = {"characters": 100_000} if kind == "segmenter" else {}
    check_plugin(kind, name, **settings)


def test_the_guides_dataset_passes_the_kit(registry: Registry, tmp_path: Path):
    path = tmp_path / "corpus.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table documents (text)")
        connection.executemany("insert into documents values (?)", [("One.",), ("Two.",)])
    check_dataset(registry.get("dataset", "sqlite"), {"path": str(path)})


def test_the_guide_names_every_check_and_its_settings():
    rows = dict(re.findall(r"^\| `(\w+)` \| .+ \|(.*)\|$", GUIDE.split("## Testing it")[1], re.M))
    assert set(rows) == set(KINDS)
    for kind in set(KINDS) - {"backbone"}:
        parameters = inspect.signature(getattr(sentcompress.testing, f"check_{kind}")).parameters.values()
        settings = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert re.findall(r"`(\w+)`", rows[kind]) == settings


def test_the_guides_fusion_ignores_padding(registry: Registry):
    fusion = registry.create("fusion", "max", hidden_size=8)
    hidden = torch.randn(3, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    latents = fusion(hidden, mask)
    assert latents.shape == (3, 1, 8)
    assert torch.equal(fusion(hidden.masked_fill(~mask[:, :, None], 1e4), mask), latents)


def test_the_guides_dataset_reads(registry: Registry, tmp_path: Path):
    path = tmp_path / "corpus.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table documents (text)")
        connection.executemany("insert into documents values (?)", [("One.",), ("Two.",)])
    dataset = registry.create("dataset", "sqlite", {"path": str(path)})
    assert list(dataset.documents()) == [
        sentcompress.Document("One.", f"{path}:1"),
        sentcompress.Document("Two.", f"{path}:2"),
    ]
    before = dataset.fingerprint()
    os.utime(path, ns=(1, 1))
    assert dataset.fingerprint() != before
    with pytest.raises(DataError, match="no such database"):
        list(registry.create("dataset", "sqlite", {"path": "nowhere"}).documents())


def test_the_guides_metric_computes(registry: Registry):
    pair = sentcompress.Reconstruction("abcd", "ab", (1, 2), (1,))
    assert registry.create("metric", "length-ratio").compute([pair]) == {"characters": 0.5}


def test_the_guides_memory_keeps_both_ends(registry: Registry):
    place = torch.arange(5)
    tokens = sentcompress.Tokens(place, place, torch.full_like(place, 9), place, place.flip(0), place)
    assert registry.create("memory", "ends", {"ends": 2}).keep(tokens).tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_the_guides_backbone_passes_the_kit(registry: Registry):
    check_backbone(registry.get("backbone", "stablelm"))


def test_the_map_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    fenced = "".join(re.findall(r"^```text\n(.+?)^```$", page, re.M | re.S))
    names = re.findall(r"`([\w/]+(?:/|\.py|\.md|\.yml))`", page)
    names += re.findall(r"\b[\w/]+(?:\.py|/(?=[\s,)]))", fenced)
    roots = (ROOT / "sentcompress", ROOT)
    assert len(names) > 60
    assert [name for name in names if not any((root / name).exists() for root in roots)] == []


def test_the_map_names_every_package():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Text to loss")[0]
    found = [
        p for p in (ROOT / "sentcompress").iterdir() if p.name[0] not in "._" and p.suffix in ("", ".py")
    ]
    named = [f"{p.name}/" if p.is_dir() else p.name for p in found if p.name != "pretrained"]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_the_code_about_memories_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """On the LLM that comes with the package, in place of one from the hub."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.+?)^```$", page, re.M | re.S))
    hub, own = "HuggingFaceTB/SmolLM2-135M", str(ROOT / "sentcompress" / "pretrained" / "opt-tiny")
    assert code.count(hub) == 1
    names: dict = {}
    exec(compile(code.replace(hub, own), "memory.md", "exec"), names)
    assert names["logits"].shape[:2] == (1, 7)
    printed = capsys.readouterr().out
    assert printed.count("The state of the Union is") == 3
    assert "We met here. The people" in printed


# Files shown


def yaml_blocks(page: str) -> list[dict]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.+?)^```$", text, re.M | re.S)]


def test_the_sources_shown_are_a_dataset():
    (shown,) = (
        block["data"] for block in yaml_blocks("data.md") if block.get("data", {}).get("name") == "mix"
    )
    options = get_registry().options("dataset", "mix", shown["options"], "data.options")
    assert [source.weight for source in options.sources] == [2, 1, 0.3]


def test_the_job_for_kubernetes_runs_a_command_of_ours():
    (job,) = (block for block in yaml_blocks("training.md") if block.get("kind") == "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:2] == ["sentcompress", "launch"]
    test_every_command_shown_parses(shlex.join(container["command"]))
    assert "--resume" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [
        InputError.exit_code,
        PluginError.exit_code,
    ]


def test_the_job_for_slurm_is_a_shell_script():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```text\n(.+?)^```$", text, re.M | re.S) if "#SBATCH" in b)
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[ $? -ne 75 ] || scontrol requeue" in block
    assert TerminatedError.exit_code == 75
