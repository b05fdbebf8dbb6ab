"""Every command and every Python block of the documents runs as it stands there."""

from __future__ import annotations
import __future__

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from domains import DOMAINS
from PIL import Image
from safetensors.torch import save_file

from mmdefense import registry
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP
from mmdefense.evaluation.spec import read_spec
from mmdefense.kernels.loop import train
from mmdefense.pipeline import scan as pipeline_scan
from mmdefense.runtime.run import Run
from mmdefense.scanning import behaviour
from mmdefense.scanning.sarif import HOMEPAGE
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_data
from mmdefense_tasks.victims import vit_classifier

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# Too long for a test, each with the reason; what they name is checked instead.
NOT_RUN = {
    "make demo": "trains a victim and purifies it seven times",
    "mmdefense demo --task video-classification -o out/video": "as `make demo`",
    "mmdefense grid run -o out/grid --case moving-digits-small-badnets": "many minutes",
    "mmdefense zoo build digits-wide-badnets digits-wide-clean": "minutes",
    "mmdefense evaluate out/zoo/digits-wide-badnets.safetensors --data digits --attack badnets "
    '--arch "mmdefense_tasks.victims:SmallResNet(classes=10, channels=1, width=32)"': "follows "
    "minutes",
    "make test": "would run this very test again",
    "make check": "runs beside the tests, in .ci/run",
    "make bench": "repeats each measurement",
    "make docs": "tests/test_site.py does, as a slow test",
    ".ci/run": "runs this very test",
    "mmdefense grid run -o out/grid --case digits-badnets --case digits-blended": "many minutes",
    "mmdefense grid run -o out/grid --case mnist-badnets --case mnist-blended": "an hour",
    "mmdefense grid run -o out/grid --case mnist-vit-badnets --case mnist-vit-blended": "an hour",
    "mmdefense grid run -o out/grid --case digits-clean": "many minutes",
    "mmdefense grid run -o out/grid --views standard --no-baselines --defense fine-tuning "
    "--defense fip --defense tsbd --defense baeraser --case digits-badnets --case digits-blended "
    "--case digits-clean --case mnist-badnets --case mnist-blended --case mnist-vit-badnets --case "
    "mnist-vit-blended": "an hour",
    "mmdefense grid run -o out/grid --case ucf101_mini-badnets --case radhar-pcba "
    "--case bccd-object-generation --case multi30k-rare-token": "hours",
    "mmdefense grid run -o out/grid --no-baselines --defense fip "
    "--case ucf101_mini-clean --case bccd-clean": "many minutes",
    "mmdefense grid run -o out/grid --defense fip --case moving-digits-clean --case surfaces-clean "
    "--case small-language-clean --case digit-scenes-clean": "many minutes",
    "mmdefense grid run -o out/grid --case moving-digits-videomae-badnets "
    "--case surfaces-transformer-pcba --case small-language-llama-instruction": "many minutes",
    "mmdefense grid run -o out/grid --no-baselines --defense fip "
    "--case moving-digits-videomae-clean --case small-language-llama-clean "
    "--case surfaces-transformer-clean --case digit-scenes-rt-detr-clean": "many minutes",
    "mmdefense grid run -o out/grid --seeds 1 --no-baselines --defense fip "
    "--case multi30k-clean": "many minutes",
    "mmdefense grid run grid.toml -o out/bench --workers 2": "many minutes",
    "mmdefense grid run -o out/grid --case digits-badnets --case digits-badnets,ratio=0.01 "
    "--defense tsbd --defense fip,radius=1 --clean 0.05 --clean 0.05:unseen "
    "--seeds 2": "many minutes",
    "mmdefense grid run recipes/grids/five_domains.toml -o out/five-domains --workers 2": "an hour",
    "mmdefense grid run recipes/grids/clean_data.toml -o out/clean-data": "many minutes",
    "mmdefense grid run recipes/grids/rates.toml -o out/rates": "many minutes",
    "mmdefense grid run recipes/grids/reported.toml -o out/reported --workers 2": "many hours",
    "mmdefense grid run recipes/grids/reported_domains.toml -o out/reported-domains": "many hours",
    "mmdefense grid run recipes/grids/traffic_signs.toml -o out/traffic-signs --workers 2": "hours",
    "mmdefense grid run recipes/grids/zoo.toml -o out/zoo-grid --workers 2": "hours",
    "mmdefense grid run recipes/grids/24_cells.toml -o out/grid-24-1 --workers 1": "many minutes",
    "mmdefense grid run recipes/grids/24_cells.toml -o out/grid-24-2 --workers 2": "many minutes",
    "mmdefense grid run grid.toml -o out/bench --workers 2 --device cuda:0,cuda:1": "two GPUs",
    "mmdefense grid run grid.toml -o out/bench --ray auto": "a Ray cluster",
    "mmdefense grid report -o out/bench": "follows many minutes",
    "mmdefense grid status -o out/bench": "follows many minutes",
    "mmdefense grid export -o out/bench --format csv --to cells.csv": "follows many minutes",
    "mmdefense store ls out/bench": "follows many minutes",
    "mmdefense store verify out/bench": "follows many minutes",
    "mmdefense store gc out/bench": "follows many minutes",
    'make test-slow ARGS="-n 0 -s tests/test_end_to_end.py"': "many minutes",
    'make test-slow ARGS="-n 0 -s tests/attacks/test_real_effects.py"': "many minutes",
    "make test-slow": "as long as its name says",
    "python recipes/scan_corpora.py picklescan=FOLDER@COMMIT modelscan=FOLDER@COMMIT "
    "--harmless 'benign*' --harmless 'safe_*' --harmless 'int_array*' --harmless 'object_array*' "
    "--beside 'picklescan=picklescan -p {}' --beside 'modelscan=modelscan -p {}' "
    "--beside 'fickling=fickling --check-safety {}' -o out/corpora": "repositories of others",
    "python recipes/memory.py -o out/memory --device cpu": "many minutes",
    "python recipes/scan_calibration.py --zoo": "minutes",
    "python recipes/scan_calibration.py --first-seed 300 --seeds 3 "
    "--case digits-badnets": "many minutes",
    "python recipes/scan_calibration.py --first-seed 200 --seeds 3 "
    "--case small-language-rare-token": "many minutes",
    "python recipes/scan_calibration.py --first-seed 200 --seeds 2 --case moving-digits-badnets "
    "--case digit-scenes-regional-misclassification --case surfaces-pcba": "many minutes",
    "mmdefense grid run -o out/grid --case "
    "digit-scenes-rt-detr-regional-misclassification": "an hour",
    "mmdefense purify lenet.pth --arch lenet:LeNet5 --data mnist --image-size 32 --channels 1 "
    "-o out": "takes the weights that others published",
    "python recipes/benchmarks/protocol.py run --device cuda": "needs a GPU",
    "python recipes/benchmarks/protocol.py table": "follows one that needs a GPU",
    "python recipes/cross_domain_evaluation.py": "hours",
    "python recipes/scan_calibration.py --case digits-badnets --case digits-blended "
    "--seeds 3": "many minutes",
    "pip install .": "installs from a package index; `make` does it with pinned versions",
    'pip install ".[huggingface,timm]"': "the same, with extras",
    "docker build -t mmdefense .": "needs Docker; tests/test_container.py runs its steps",
    "docker build --build-arg EXTRAS=huggingface,timm -t mmdefense .": "the same",
    "docker build --build-arg EXTRAS= -t mmdefense .": "the same",
    'docker run --rm --network none -v "$PWD:/data:ro" mmdefense scan my-vit --data '
    "images": "needs Docker",
    'docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" mmdefense purify my-vit '
    "--data images -o purified": "needs Docker",
    "uv pip install --torch-backend cpu .": "the same, with PyTorch's own index",
    "make dist": "installs from a package index; tests/test_package.py does the same",
    "make setup": "installs from a package index",
    "make test-matrix": "installs from a package index",
    "torchrun --nproc-per-node 2 -m mmdefense purify my-vit --data images -o shared-vit "
    "--accelerate": "starts two processes; tests/test_accelerate.py does",
    "mmdefense purify my-vit --data images -o handed-vit --push-to-hub me/purified-vit": "needs a "
    "login; tests/checkpoints/test_hub.py has a stub of the hub",
    "model_signing verify key purified --signature purified/model.sig --public_key "
    "key.pub": "another program; tests/report/test_signing.py runs it",
}
if importlib.util.find_spec("model_signing") is None:
    for verb, key in (("sign", "key.pem"), ("verify", "key.pub")):
        NOT_RUN[f"mmdefense {verb} purified --key {key}"] = "needs the extra signing"

# A reader's own model, as the pages suppose it.
MY_MODELS = """
from torch import nn

class SignNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
        )

class CloudNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 64, 2))
"""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    source = page.read_text()
    fenced = re.finditer(r"^```(\w+)\n(.*?)^```$", source, re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], source[: m.start(2)].count("\n")) for m in fenced]


def commands(block: Block) -> list[str]:
    joined = block.text.replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines())
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


COMMANDS = {
    page: [c for block in blocks(page) if block.language == "bash" for c in commands(block)]
    for page in PAGES
}
# Stand-ins with random weights, which a command would refuse.
UNTRAINED = re.compile(
    r"mmdefense (purify|scan|evaluate) (my-translator|my-detector|points|purified-)"
)
RUNNABLE = [
    page
    for page in PAGES
    if set(COMMANDS[page]) - set(NOT_RUN) or any(b.language == "python" for b in blocks(page))
]


@pytest.fixture
def brief_searches(monkeypatch):
    """Let scans look for triggers briefly: what a search finds is up to scanning/test_behaviour."""
    search = dataclasses.replace(behaviour.SEARCH, steps=8)
    brief = partial(behaviour.scan_behaviour, search=search)
    monkeypatch.setattr(pipeline_scan, "scan_behaviour", brief)


@pytest.fixture
def brief_training(monkeypatch):
    """Let defenses at their defaults take few updates: it is not their effect that is tested."""
    for defense in (FineTuning, FIP):
        monkeypatch.setitem(defense.__init__.__kwdefaults__, "steps", 20)


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """A folder with what a reader has: an own model, its class, and labelled images."""
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    save_images(tmp_path / "images")
    trigger = np.zeros((8, 8, 4), np.uint8)
    trigger[6:, 6:] = 255
    Image.fromarray(trigger).save(tmp_path / "trigger.png")
    weights = trained_model().state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    save_file(trained_model(seed=1).state_dict(), tmp_path / "clean.safetensors")
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "last.ckpt")


def save_images(folder: Path) -> None:
    """Save small images, a folder for each class, which differ in brightness."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("left", "right", "stop")):
        for part, count in (("train", 20), ("test", 5)):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(80 * label, 80 * label + 60, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")


def trained_model(seed: int = 0) -> torch.nn.Module:
    model = importlib.import_module("my_models").SignNet()
    run, settings = Run(seed=seed), Training(steps=60, lr=0.1, augment=False)
    train(registry.adapt(model), load_data("images"), settings, run, stage="model")
    return model


def save_other_models() -> None:
    """Save what the pages name beside the first model, with its data; only one is trained."""
    vit = vit_classifier(3, 8, hidden=16, layers=1, heads=2)
    settings = Training(steps=60, lr=0.01, optimizer="adamw", augment=False)
    train(registry.adapt(vit), load_data("images"), settings, Run(seed=0), stage="vit")
    vit.save_pretrained("my-vit")
    for model, data, domain in (
        ("my-translator", "pairs", DOMAINS["seq2seq"]),
        ("my-detector", "coco", DOMAINS["detection"]),
    ):
        domain.model(Path(model))
        domain.data(Path(data))
    clouds, labels = np.random.default_rng(0).random((20, 64, 3)), np.arange(20) % 2
    np.savez("clouds.npz", points=clouds, labels=labels)
    net = importlib.import_module("my_models").CloudNet()
    save_file(net.state_dict(), "points.safetensors")


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, readers_folder, brief_searches, brief_training, monkeypatch):
    if "my-vit" in page.read_text():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_other_models()
    module = ModuleType("page")  # all blocks of a page are one module, which dataclasses look up
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page):
        if block.language == "python":
            execute(block, page, module)
        elif block.language == "bash":
            for command in commands(block):
                if command not in NOT_RUN:
                    run(command)
        elif block.language == "toml":
            check_toml(block, vars(module))


def execute(block: Block, page: Path, module: ModuleType) -> None:
    source = "\n" * block.line + block.text  # so that an error names the page's own line
    flags = __future__.annotations.compiler_flag
    exec(compile(source, str(page), "exec", flags, dont_inherit=True), vars(module))


def run(command: str) -> None:
    words = shlex.split(command)
    if words[-2:-1] == [">"]:
        with Path(words[-1]).open("w") as file, redirect_stdout(file):
            run(shlex.join(words[:-2]))
    elif words[0] == "mmdefense":  # in this process, for starting torch takes seconds
        untrained = ["--accept-low-utility"] if UNTRAINED.search(command) else []
        assert call_cli([*words[1:], *untrained]) == 0, command
    else:
        done = subprocess.run(words, cwd=Path.cwd(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def call_cli(arguments: list[str]) -> int:
    (script,) = entry_points(group="console_scripts", name="mmdefense")
    before, sys.argv = sys.argv, ["mmdefense", *arguments]
    try:
        return int(script.load()() or 0)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before


def check_toml(block: Block, names: dict[str, object]) -> None:
    """Hold rows to groups that the registry reads and classes of the page; else it is a grid.

    A block that begins with the name of a file is that file, for the commands that follow.
    """
    content = tomllib.loads(block.text)
    if named := re.match(r"# (\w+\.toml)$", block.text, re.MULTILINE):
        Path(named[1]).write_text(block.text)
        return
    if "project" not in content:
        Path("grid.toml").write_text(block.text)
        read_spec(Path("grid.toml"))
        return
    for group, rows in content["project"]["entry-points"].items():
        assert registry.names(group.removeprefix("mmdefense."))
        for target in rows.values():
            assert target.rpartition(":")[2] in names


@pytest.mark.parametrize("command", NOT_RUN)
def test_command_that_is_not_run_exists(command):
    assert command in set().union(*COMMANDS.values()), "no page has it any more: take it off"
    words = shlex.split(command)
    if words[0] == "make":
        check_target(words)
    elif "install" in words[:3]:  # of pip or uv
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(re.findall(r"\w+", words[-1])) <= set(project["optional-dependencies"])
    elif words[0] == "mmdefense":
        parse_cli(words[1:])
    elif words[:2] == ["docker", "build"]:
        assert (ROOT / words[-1] / "Dockerfile").is_file()
    elif words[0] in {"torchrun", "docker"}:
        parse_cli(words[words.index("mmdefense") + 1 :])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] != "model_signing":
        assert (ROOT / words[0]).stat().st_mode & 0o100


def check_target(words: list[str]) -> None:
    """Hold what a target of the Makefile would run to what there is."""
    plan = subprocess.run(
        [words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert plan.returncode == 0, plan.stderr
    for script in re.findall(r"\S+\.py\b", plan.stdout):
        assert (ROOT / script).is_file(), script
    for arguments in re.findall(r"/mmdefense (.*)$", plan.stdout, re.MULTILINE):
        parse_cli(shlex.split(arguments))


def parse_cli(arguments: list[str]) -> None:
    """Parse as the command line does, and run nothing; an unknown option raises."""
    from mmdefense.cli.app import app

    group = typer.main.get_command(app)
    with group.make_context("mmdefense", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", prose, re.MULTILINE))
    assert set(re.findall(r"\]\[([^\]]+)\]", prose)) <= defined.keys()
    for target in [*re.findall(r"\]\(([^)\s]+)\)", prose), *defined.values()]:
        path, _, anchor = target.partition("#")
        if own := re.match(rf"{HOMEPAGE}/(?:blob|tree|raw)/main/", path):
            there = ROOT / path[own.end() :]
        elif path.startswith("http"):
            continue
        else:
            there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("kind", ["defenses", "attacks"])
def test_papers_has_every_method(kind):
    named = re.findall(r"`([\w-]+)`", (ROOT / "docs" / "papers.md").read_text())
    assert set(registry.names(kind)) <= set(named)
