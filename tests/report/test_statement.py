"""The evidence agrees with the files on disk, and says so where it does not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess

import pytest
import yaml
from records import CHOICE, purification

from mmdefense.checkpoints.outputs import PREDICATE_TYPE
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.record import AttackInfo, read_record
from mmdefense.report.statement import differing, materials, write_statement


@pytest.fixture
def out(tmp_path):
    """An output with two files, one of them in a folder."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (tmp_path / "report.html").write_text("made from the record")
    write_statement(purification(), tmp_path, {"model.safetensors": "ab" * 32})
    return tmp_path


def test_the_statement_names_every_file_but_itself_and_the_page(out):
    statement = json.loads((out / "purification.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == PREDICATE_TYPE
    assert {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]} == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "additional_chat_templates/tool.jinja")
    }
    predicate = statement["predicate"]
    assert predicate["materials"] == [
        {"name": "model.safetensors", "digest": {"sha256": "ab" * 32}}
    ]
    assert materials(out) == {"model.safetensors": "ab" * 32}
    assert predicate["defense"] == {
        "name": "fip", "settings": {"steps": 40, "stop": None}, "reference": ""
    }  # fmt: skip
    assert predicate["provenance"]["seed"] == 3
    assert predicate["data"]["fingerprint"] == "f1f2"
    assert (predicate["guard"]["before"], predicate["guard"]["after"]) == (0.97, 0.96)
    assert len(predicate["history"]) == 3


def test_the_record_comes_back_out_of_the_statement(out):
    assert read_record(out / "purification.json") == purification()


def test_a_file_that_changed_or_went_is_named(out):
    assert differing(out) == []
    (out / "later.txt").write_text("no part of it")
    assert differing(out) == []
    (out / "model.safetensors").write_bytes(b"other weights")
    shutil.rmtree(out / "additional_chat_templates")
    assert differing(out) == [
        "additional_chat_templates/tool.jinja is missing",
        "model.safetensors is another file than the one that was written",
    ]


def test_a_statement_about_files_elsewhere_finds_none(out):
    path = out / "purification.json"
    path.write_text(path.read_text().replace('"model.safetensors"', '"../elsewhere"'))
    (out.parent / "elsewhere").write_bytes(b"weights")
    assert differing(out) == ["../elsewhere is missing"]


@pytest.mark.parametrize("text", ["", "[]", '{"_type": "other"}'])
def test_what_is_no_statement_is_refused(out, text):
    (out / "purification.json").write_text(text)
    with pytest.raises(BadInputError, match="record"):
        differing(out)


def test_a_statement_without_digests_is_refused(out):
    path = out / "purification.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"subject": ["model.safetensors"]}))
    with pytest.raises(BadInputError, match="digest"):
        differing(out)


@pytest.mark.skipif(
    not all(map(shutil.which, ("jq", "sha256sum"))), reason="needs jq and sha256sum on the PATH"
)
def test_the_command_of_the_model_card_verifies_the_files(out):
    from mmdefense.report.card import card_section

    section = card_section(purification())
    command = section.split("```bash\n")[1].split("```")[0]
    run = {"shell": True, "cwd": out, "capture_output": True, "text": True}
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr
    (out / "model.safetensors").write_bytes(b"other weights")
    assert subprocess.run(command, **run).returncode != 0


CARD = "---\nlicense: mit\ntags:\n- vision\n---\n\n# My net\n\nWhat it is.\n"
TAGGED = CARD.replace("- vision\n", "- vision\n- mmdefense\n- backdoor-defense\n")


def test_the_section_is_appended_and_then_replaced(tmp_path):
    from mmdefense.report.card import card_section, write_card

    path, record = tmp_path / "README.md", purification()
    path.write_text(CARD)
    write_card(record, path)
    first = path.read_text()
    assert first == TAGGED + "\n" + card_section(record)
    write_card(record, path)
    assert path.read_text() == first
    path.write_text(first + "\nAdded by hand.\n")
    write_card(dataclasses.replace(record, defense=_other(record)), path)
    text = path.read_text()
    assert text.startswith(TAGGED)
    assert "Added by hand." in text
    assert text.count("## Purified with mmdefense") == 1
    assert "`tsbd`" in text
    assert "`fip`" not in text


def _other(record):
    return dataclasses.replace(record.defense, name="tsbd")


def test_a_card_is_made_where_there_is_none_and_bytes_of_others_stay(tmp_path):
    from mmdefense.report.card import card_section, write_card

    write_card(purification(), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (
        "---\ntags:\n- mmdefense\n- backdoor-defense\n---\n\n" + card_section(purification())
    )
    odd = b"---\r\nlicense: mit\r\n%b---\r\nCaf\xe9"
    (tmp_path / "odd.md").write_bytes(odd % b"")
    write_card(purification(), tmp_path / "odd.md")
    tags = b"tags:\r\n- mmdefense\r\n- backdoor-defense\r\n"
    assert (tmp_path / "odd.md").read_bytes().startswith(odd % tags)


@pytest.mark.parametrize(
    ("before", "tags"),
    [
        ("", ["mmdefense", "backdoor-defense"]),
        ("# A card\n", ["mmdefense", "backdoor-defense"]),
        ("---\n---\ntext", ["mmdefense", "backdoor-defense"]),
        ("---\ntags: [a, 'b']  # c\nx: 1\n---\n", ["a", "b", "mmdefense", "backdoor-defense"]),
        ("---\ntags: []\n---\n", ["mmdefense", "backdoor-defense"]),
        ("---\ntags:\n  - a\n\n  - mmdefense\nx: 1\n---", ["a", "mmdefense", "backdoor-defense"]),
        ("---\ntags: a\n---\n", "a"),
        ("---\ntags: &t [a, [b]]\n---\n", ["a", ["b"]]),
    ],
)
@pytest.mark.parametrize("base", ["", "owner/net"])
def test_the_hub_reads_the_tags_and_the_base_model(tmp_path, before, tags, base):
    from mmdefense.report.card import write_card

    path = tmp_path / "README.md"
    path.write_text(before)
    for _ in range(2):  # a second time changes nothing
        write_card(purification(), path, base_model=base)
        _, front, text = path.read_text().split("---\n", 2)
        held = yaml.safe_load(front)
        assert held["tags"] == tags
        assert held.get("base_model") == (base or None)
        assert text.count("## Purified with mmdefense") == 1
    assert (held.get("x"), "# A card" in text) == (1 if "x: 1" in before else None, "A" in before)


def test_the_base_model_is_the_one_that_was_given(tmp_path):
    from huggingface_hub import ModelCard

    from mmdefense.report.card import write_card

    path = tmp_path / "README.md"
    path.write_text("---\nbase_model:\n- other/one\n- other/two\nlicense: mit\n---\n\nWords.\n")
    write_card(purification(), path)
    assert ModelCard.load(path).data.base_model == ["other/one", "other/two"]
    write_card(purification(), path, base_model="owner/net")
    data = ModelCard.load(path).data
    assert (data.base_model, data.license) == ("owner/net", "mit")
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.tags == ["mmdefense", "backdoor-defense"]


def test_hostile_front_matter_is_not_expanded(tmp_path):
    from mmdefense.report.card import write_card

    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    bomb = "---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairs
    )
    path = tmp_path / "README.md"
    path.write_text(f"{bomb}---\n")
    write_card(purification(), path)
    assert path.read_text().startswith(f"{bomb}tags:\n- mmdefense\n")
    assert path.stat().st_size < 10_000


def test_the_section_has_figures_and_limits():
    from mmdefense.report.card import card_section

    text = card_section(purification())
    assert "| accuracy | 97.0% | 96.0% |" in text
    assert "nothing here says that there was a backdoor" in text
    rates = {"before": Rates(acc=0.9, asr=1.0), "after": Rates(acc=0.9, asr=0.02)}
    known = purification(attack=AttackInfo(attack="BadNets", **rates))
    assert "| success rate of BadNets | 100.0% | 2.0% |" in card_section(known)
    chosen = card_section(purification(choice=CHOICE))
    assert "| largest success of a known trigger, found or random | 99.0% | 4.0% |" in chosen


def test_a_hostile_name_is_text_in_the_card():
    from mmdefense.report.card import card_section

    attack = AttackInfo(attack="<img src=x>\n# [a](b) | c", before=Rates(), after=Rates())
    text = card_section(purification(attack=attack))
    assert "<img" not in text.replace("\\<img", "")
    assert "\n# " not in text
