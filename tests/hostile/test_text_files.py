"""Texts of a model folder that run, build or hide something, beside those of real models."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile

import pytest

from mmdefense.findings import LEVELS, worst_level
from mmdefense.scanning.files import scan_files
from mmdefense.scanning.texts import MAX_PYTHON

WALK = "{{ cycler['__in' ~ 'it__'].__globals__ }}"
SOUND = "{% for m in messages %}{{ m['role'] ~ m['content'] }}{% endfor %}"


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(pairs, version=3):
    parts = [b"GGUF", struct.pack("<IQQ", version, 0, len(pairs))]
    for name, kind, value in pairs:
        parts += [text(name), struct.pack("<I", kind), value]
    return b"".join(parts)


def names_of(items):
    return struct.pack("<IQ", 8, len(items)) + b"".join(map(text, items))


def deep(value, levels=50):
    for level in range(levels):
        value = {f"a{level}": [value]}
    return value


def notebook(*cells):
    held = [{"cell_type": "code", "source": source, "outputs": []} for source in cells]
    return json.dumps({"cells": held, "nbformat": 4})


def packed(kind, **files):
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name.replace("__", "/").replace("_", "."), content)
    else:
        with tarfile.open(fileobj=made, mode=f"w:{kind}") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name.replace("_", "."))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content.encode()))
    return made.getvalue()


TEMPLATES = {
    "in a zip": ("a.zip", packed("zip", sub__chat_jinja=WALK)),
    "in a tar": ("a.tar.gz", packed("gz", a_yaml=f"chat_template: {json.dumps(WALK)}")),
    "in a gzip": ("a.jinja.gz", gzip.compress(WALK.encode())),
    "as text": ("tokenizer_config.json", {"chat_template": WALK}),
    "as a list": (
        "tokenizer_config.json",
        {"chat_template": [{"name": "a", "template": SOUND}, {"name": "b", "template": WALK}]},
    ),
    "as a map": ("tokenizer_config.json", {"chat_template": {"a": SOUND, "b": WALK}}),
    "of a processor": ("processor_config.json", {"chat_template": WALK}),
    "of its own": ("chat_template.json", {"chat_template": WALK}),
    "in a tokenizer": ("tokenizer.json", {"model": {"x": [{"chat_template": WALK}]}}),
    "deep": ("config.json", deep({"prompt": WALK})),
    "under another name": ("generation_config.json", {"prompt": ["Say:", WALK]}),
    "jinja": ("chat_template.jinja", WALK),
    "more of them": ("additional_chat_templates/rag.jinja", WALK),
    "of another suffix": ("chat.template", WALK),
    "j2": ("template.j2", WALK),
    "YAML": ("config.yaml", f"chat_template: |\n  {WALK}\n"),
    "YAML, in a list": ("a/b.yml", f"- x:\n  - chat_template: {json.dumps(WALK)}\n"),
    "TOML": ("a.toml", f"[x]\nchat_template = {json.dumps(WALK)}\n"),
    "GGUF": ("a.gguf", gguf([("tokens", 9, names_of(["a", "b"])), ("n", 4, bytes(4)),
                             ("tokenizer.chat_template", 8, text(WALK))])),
    "GGUF, one of several": ("a.gguf", gguf([("tokenizer.chat_template.rag", 8, text(WALK))])),
    "GGUF of another name": ("model.bin", gguf([("tokenizer.chat_template", 8, text(WALK))])),
}  # fmt: skip
HIGH = {
    "path file": ("a.pth", "import os; os.system('id')\n"),
    "path file behind paths": ("a.pth", "/usr/lib\n\nimport\tos\n"),
    "path file with a mark": ("a.pth", "\ufeffimport os\n"),
    "started with Python": ("sitecustomize.py", "x = 1\n"),
    "started for a user": ("usercustomize.py", "x = 1\n"),
    "YAML, apply": ("a.yaml", "a: !!python/object/apply:os.system ['id']\n"),
    "YAML, new": ("a.yaml", "a: !!python/object/new:subprocess.Popen [['id']]\n"),
    "YAML, object": ("a.yaml", "!!python/object:some.model.Net {a: 1}\n"),
    "YAML, name": ("a.yaml", "a: !!python/name:os.system ''\n"),
    "YAML, module": ("a.yaml", "a: !!python/module:os ''\n"),
    "YAML, whole tag": ("a.yaml", "a: !<tag:yaml.org,2002:python/object/apply:os.system> ['id']\n"),
    "YAML, tag directive": (
        "a.yaml",
        "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.system ['id']\n",
    ),
    "YAML, as a key": ("a.yaml", "? !!python/object/apply:os.system ['id']\n: 1\n"),
    "YAML, second document": ("a.yaml", "a: 1\n---\n!!python/object/apply:os.system ['id']\n"),
    "YAML that a reader of its own applies": ("a.yaml", "a: !apply:os.system ['id']\n"),
    "Hydra": ("config.yaml", "model:\n  _target_: os.system\n  command: id\n"),
    "Hydra, in JSON": ("config.json", {"a": [{"_target_": "builtins.eval", "_args_": ["1"]}]}),
    "Hydra, in TOML": ("a.toml", '[a]\n_target_ = "subprocess.run"\n'),
    "Lightning's command line": ("a.yaml", "model: {class_path: os.system}\n"),
    "jsonpickle": ("a.json", {"py/reduce": [{"py/function": "os.system"}, {"py/tuple": ["id"]}]}),
    "modules of sentence-transformers": ("modules.json", [{"idx": 0, "type": "os.system"}]),
    "code of another repository, in what holds itself": (
        "a.yaml",
        "auto_map: &a {A: *a, B: 1}\n_target_: [&b [*b], os.system]\nx: {_target_: os.system}\n",
    ),
    "code of another repository": ("a.yaml", "auto_map: {AutoModel: evil/x--m.Model}\n"),
    "notebook": ("a.ipynb", notebook("import os\n", ["os.system(\n", "'id')"])),
    "Python": ("a/b.py", "import subprocess\n"),
    "Python in a zip": ("a.zip", packed("zip", a__b_py="import os\nos.system('id')\n")),
    "Python in a tar": ("a.tar", packed("", a_py="import subprocess\n")),
    "Python in a zip in a zip": (
        "a.zip",
        packed("zip", b_zip=packed("zip", c_py="import socket\n")),
    ),
    "YAML in a zip": ("a.zip", packed("zip", a_yml="!!python/name:os.system ''\n")),
    "started with Python, from an archive": ("a.zip", packed("zip", sitecustomize_py="")),
    "stub with a body": ("a.pyw", "exec(x)\n"),
}
MEDIUM = {
    "path file that adds a folder": ("a.pth", "/tmp/evil\n"),
    "YAML, object of plain data": ("hparams.yaml", "!!python/object:argparse.Namespace {a: 1}\n"),
    "Hydra with a class": ("config.yaml", "_target_: some.model.Net\n"),
    "a tag of its own": ("a.yaml", "a: !Net {x: 1}\n"),
    "code that is trusted, in YAML": ("a.yaml", "trust_remote_code: true\n"),
    "code that is trusted": ("a.toml", "[a]\ntrust_remote_code = true\n"),
    "notebook with a shell": ("a.ipynb", notebook("!pip install x\n", "%%bash\nid")),
    "notebook that is none": ("a.ipynb", "{"),
    "installed": ("setup.py", "x = 1\n"),
    "run by tests": ("conftest.py", "x = 1\n"),
    "shell in a zip": ("a.zip", packed("zip", run_sh="id\n")),
    "harmless Python in a zip": ("a.zip", packed("zip", a_py="x = 1\n")),
    "shell": ("run.sh", "id\n"),
    "PowerShell": ("run.ps1", "id\n"),
    "Windows": ("run.bat", "dir\n"),
    "JavaScript": ("a.js", "alert(1)\n"),
    "library": ("a.so", b"\x00\x01"),
    "extension": ("a.pyd", b"\x00\x01"),
    "wheel": ("a.whl", b"\x00\x01"),
    "egg": ("a.egg", b"\x00\x01"),
    "compiled": ("a.pyc", b"\x00\x01"),
    "YAML that is none": ("a.yaml", "a: [1\n"),
    "YAML too deep": ("a.yaml", "[" * 50_000),
    "YAML too large": ("a.yaml", "a: 1\n" * 300_000),
    "JSON that is none": ("a.json", "{'a': 1}"),
    "JSON too deep": ("a.json", "[" * 200_000),
    "JSON of another encoding": ("a.json", '{"a": 1}'.encode("utf-16")),
    "JSON of lists": ("a.json", "[" + "[]," * 3_000_000 + "0]"),
    "JSON too large": ("a.json", b'["' + b"x" * (61 << 20) + b'"]'),
    "Python too large": ("a.py", b"#" * (MAX_PYTHON + 1)),
    "TOML that is none": ("a.toml", "a = \n"),
    "TOML too large": ("a.toml", "a = 1\n" * 300_000),
    "template too large": ("chat_template.jinja", "x" * (20 << 20)),
    "template too large, in JSON": ("a.json", {"chat_template": "x" * (20 << 20)}),
    "GGUF cut off": ("a.gguf", gguf([("tokenizer.chat_template", 8, text(WALK)[:20])])),
    "GGUF that claims": ("a.gguf", gguf([("a", 8, struct.pack("<Q", 1 << 60))])),
    "GGUF of many pairs": ("a.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60)),
    "GGUF of a long array": ("a.gguf", gguf([("a", 9, struct.pack("<IQ", 4, 1 << 60))])),
    "GGUF in an array": ("a.gguf", gguf([("a", 9, struct.pack("<IQ", 9, 3))])),
    "GGUF of another version": ("a.gguf", gguf([], version=77)),
}
LOW = {
    "drawing with a script": ("a.svg", "<svg><script>alert(1)</script></svg>"),
    "page with a script": ("a.html", "<body onload=alert(1)>"),
    "of unknown type": ("a.xyz", b"\x01\x02\x03"),
    "without a suffix": ("weights", b"\x01\x02\x03"),
    "a text that is none": ("a.txt", b"a\x00b"),
    "GGUF": ("a.gguf", gguf([("tokenizer.chat_template", 8, text(SOUND))])),
    "picture": ("a.png", b"\x89PNG\r\n\x1a\n"),
}
BENIGN = {
    "tokenizer": ("tokenizer.json", {"vocab": {"{{": 0, "{%": 1}, "merges": [["{", "{"], "{ %"]}),
    "template": ("tokenizer_config.json", {"chat_template": [{"name": "a", "template": SOUND}]}),
    "prompt for Python's format": ("a.json", {"prompt_template": "Answer {question} and {{x}}"}),
    "template of Go": ("a.json", {"template": "{{ if .System }}{{ .System }}{{ end }}"}),
    "card": ("README.md", "---\nlicense: mit\n---\n# A model\n"),
    "licence": ("LICENSE", "MIT\n"),
    "attributes": (".gitattributes", "*.bin filter=lfs\n"),
    "words": ("vocab.txt", "a\nb\n"),
    "pairs": ("merges.txt", "#version: 0.2\na b\n"),
    "settings": ("hparams.yaml", "lr: 0.1\nbetas: !!python/tuple [0.9, 0.99]\nnone: null\n"),
    "aliases": ("a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nbase: &base {x: 1}\n"
                          "d:\n  <<: *base\n"),
    "workflow": ("ci.yml", "env:\n  TOKEN: ${{ secrets.TOKEN }}\n"),
    "project": ("pyproject.toml", '[project]\nname = "x"\n'),
    "index": ("model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}}),
    "modules": ("modules.json", [{"idx": 0, "type": "sentence_transformers.models.Pooling"}]),
    "code that is not trusted": ("config.json", {"trust_remote_code": False, "auto_map": {}}),
    "drawing": ("a.svg", "<svg><path d='M0 0'/></svg>"),
    "rows": ("train.jsonl", '{"a": 1}\n'),
    "texts in a zip": ("a.zip", packed("zip", a_json="{}", README_md="# A", chat_jinja=SOUND)),
    "nothing": ("__init__", b""),
}  # fmt: skip


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def level(folder):
    return LEVELS.index(worst_level(scan_files(folder)) or "info")


@pytest.mark.parametrize("row", TEMPLATES)
def test_a_template_is_found_wherever_it_stands(tmp_path, row):
    name, content = TEMPLATES[row]
    found = scan_files(written(tmp_path, name, content))
    assert any(f.id == "template-escape" and f.subject.startswith(name) for f in found), found
    told = [(f.id, f.subject, f.value) for f in found]
    assert len(told) == len(set(told))


@pytest.mark.parametrize("row", HIGH)
def test_what_runs_or_builds_is_high(tmp_path, row):
    assert level(written(tmp_path, *HIGH[row])) == LEVELS.index("high")


@pytest.mark.parametrize("row", MEDIUM)
def test_what_may_run_or_was_not_read_is_medium(tmp_path, row):
    assert level(written(tmp_path, *MEDIUM[row])) >= LEVELS.index("medium")


@pytest.mark.parametrize("row", LOW)
def test_what_is_not_looked_into_is_said(tmp_path, row):
    assert level(written(tmp_path, *LOW[row])) == LEVELS.index("low")


@pytest.mark.parametrize("row", BENIGN)
def test_what_real_models_bring_is_no_finding(tmp_path, row):
    assert scan_files(written(tmp_path, *BENIGN[row])) == []
