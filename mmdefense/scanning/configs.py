"""What the text files of a model folder ask for: code of their own, files from elsewhere.

Nothing is imported or rendered: JSON is parsed, Python and Jinja are read as syntax trees.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.faults import Fault, read_json, remote_code, shard_faults
from mmdefense.errors import BadInputError
from mmdefense.scanning.findings import Finding, Rule
from mmdefense.scanning.templates import scan_template

__all__ = ["scan_json", "scan_python", "scan_template"]

REMOTE_CODE = Rule(
    id="config-remote-code",
    level="medium",
    measured="whether a configuration asks for code that comes with the model",
    reference="classes of the installed library",
    meaning="With trust_remote_code that Python is run on loading; mmdefense never does.",
    blind_spot="what the code does; a library that has the class itself may ignore the request.",
)
SHARD = Rule(
    id="config-shard-outside",
    level="high",
    measured="where the index of shards looks for them",
    reference="the model's own folder",
    meaning="Loading would read a file that is no part of the model.",
    blind_spot="what lies there.",
)
BAD_JSON = Rule(
    id="config-unreadable",
    level="medium",
    measured="whether the file is JSON",
    reference="JSON",
    meaning="It is damaged, or meant for a reader that is more forgiving.",
    blind_spot="its content.",
)
CODE = Rule(
    id="code-python",
    level="medium",
    measured="Python in the model's folder",
    reference="a model folder holds data",
    meaning="With trust_remote_code, or by hand, it is run.",
    blind_spot="what it does: names are looked at, not behaviour.",
)
TEMPLATE = Rule(
    id="template-escape",
    level="high",
    measured="attributes, names and tags in a chat template",
    reference="what formatting messages needs",
    meaning="It walks towards Python's internals; where it is rendered unsandboxed, code runs.",
    blind_spot="what it writes into the prompt, such as hidden instructions.",
)

_CALLS = {
    *("eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output", "call"),
    *("run_path", "import_module", "urlopen", "urlretrieve", "spawn", "fork", "execv", "execve"),
    *("b64decode", "CDLL", "create_connection", "check_call", "getoutput"),
}
_MODULES = {"subprocess", "socket", "ctypes", "pty", "marshal", "pickle", "requests", "urllib"}
_NAMES = {"self", "cycler", "lipsum", "joiner", "request", "config", "os", "sys", "subprocess"}
_ATTRIBUTES = re.compile(r"__\w+|mro|func_globals|gi_frame|f_globals|popen|system|import_module")
_WALK = re.compile(r"__(class|base|bases|mro|subclasses|globals|builtins|import|init|dict)__|\\x5f")


def scan_json(path: Path, subject: str) -> Iterator[Finding]:
    """Yield what speaks against a JSON file of a model folder."""
    try:
        content = read_json(path)
        asked = remote_code(path)
        shards = shard_faults(path) if path.name.endswith(".index.json") else []
    except BadInputError as error:
        yield BAD_JSON.found(subject, str(error))
        return
    for fault in asked:
        yield REMOTE_CODE.found(subject, fault.text, level=_how_far(fault, path.parent))
    for fault in shards:
        yield SHARD.found(subject, fault.text)
    for template in _templates(content):
        yield from scan_template(template, subject)


def _how_far(fault: Fault, folder: Path) -> Any:
    """Return high where the code comes from another repository, or is not in the folder."""
    modules = re.findall(r'"([\w./-]+)\.\w+"', fault.text)
    here = all("--" not in name and (folder / f"{name}.py").is_file() for name in modules)
    return "medium" if here else "high"


def _templates(content: Any) -> Iterator[str]:
    """Yield the chat templates of a tokenizer's or processor's configuration."""
    held = content.get("chat_template") if isinstance(content, Mapping) else None
    for item in held if isinstance(held, list) else [held]:
        template = item.get("template") if isinstance(item, Mapping) else item
        if isinstance(template, str):
            yield template


def scan_python(path: Path, subject: str) -> Iterator[Finding]:
    """Yield that there is Python, and more strongly where it starts processes or talks abroad."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield CODE.found(subject, "Python that cannot be parsed", level="high")
        return
    wanted = sorted(set(_calls(tree)))
    if wanted:
        yield CODE.found(subject, f"names {', '.join(wanted)}", level="high")
    else:
        yield CODE.found(subject, "Python")


def _calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if name in _CALLS and not _is_method_of_model(node):
                yield str(name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in _MODULES)


def _is_method_of_model(node: ast.Call) -> bool:
    """Whether it is ``model.eval()`` or ``torch.compile(model)``, and no built-in function."""
    name = getattr(node.func, "attr", None)
    return name in {"eval", "compile", "call"} and isinstance(node.func, ast.Attribute)
