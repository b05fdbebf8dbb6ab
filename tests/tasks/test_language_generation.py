"""Every form of text gives the same samples, and bad text one clear line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmdefense.data.batch import batches, split
from mmdefense.data.text import TextSamples, random_words
from mmdefense.errors import BadInputError
from mmdefense.registry import adapt, load
from mmdefense.report.panels import markup
from mmdefense_tasks.language_generation import LanguageGeneration, bleu, load_text, tokenizer_for
from mmdefense_tasks.language_victims import causal, seq2seq, train_tokenizer
from mmdefense_tasks.small_language import RARE_WORDS, small_language

PAIRS = [("a dog", "ein Hund"), ("a cat", "eine Katze"), ("a bird", "ein Vogel")]
ALPACA = [{"instruction": "say", "input": a, "output": b} for a, b in PAIRS]


def refused(where, **options):
    with pytest.raises(BadInputError) as caught:
        load_text(where, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs(samples):
    return list(zip(samples.prompts, samples.answers, strict=True))


def write_parallel(folder, part="train", cut=0):
    folder.mkdir(exist_ok=True)
    sources, targets = zip(*PAIRS, strict=True)
    (folder / f"{part}.en").write_text("\n".join(sources) + "\n")
    lines = "\n".join(targets[: len(targets) - cut]) + "\n"
    (folder / f"{part}.de.gz").write_bytes(gzip.compress(lines.encode()))


class TestSmallLanguage:
    def test_parts_are_fixed_and_share_no_sentence(self):
        train, test = LanguageGeneration.embedded()
        assert (len(train), len(test)) == (4000, 400)
        assert not set(train.prompts) & set(test.prompts)
        assert LanguageGeneration.embedded()[1].fingerprint() == test.fingerprint()
        assert small_language(9, seed=1).prompts != small_language(9).prompts
        assert not set(RARE_WORDS) & {w for prompt in train.prompts for w in prompt.split()}

    def test_word_for_word_is_wrong(self):
        """The verb is last, adjectives follow and agree, and one word has several forms."""
        samples = small_language(2000)
        translated = dict(zip(samples.prompts, samples.answers, strict=True))
        short = {p: a for p, a in translated.items() if len(p.split()) == 7}
        verbs = {"vid", "gard", "pla", "seg", "tro", "enc", "chi", "pin", "por", "lev", "aju"}
        ends = [a.split()[-2] for a in short.values() if a.split()[-2] not in {"nen", "hoy", "suv"}]
        assert all(any(word.startswith(verb) for verb in verbs) for word in ends if word != "nokt")
        forms = {
            word for answer in samples.answers for word in answer.split() if word[:-1] == "pik"
        }
        assert forms == {"piko", "pika", "piki", "pike"}

    def test_there_is_more_than_one_good_translation(self):
        answers = " ".join(small_language(500).answers).split()
        assert {"videt", "gardet"} <= set(answers)


def test_the_task_is_found_by_name_and_trains_its_tokenizer():
    task = load("tasks", "language-generation")()
    test = task.load("small-language", split="test")
    assert task.metric == "BLEU"
    assert task.describe(test)["vocabulary"] == len(task.adapter_options(test)["tokenizer"])
    assert tokenizer_for(test) is tokenizer_for(test)
    assert task.for_training(test).augmentation is None
    assert "small-language" in task.data()
    assert [case.attack for case in task.cases()].count(None) == 3


def test_every_case_describes_a_model_and_an_attack():
    task = LanguageGeneration()
    for case in task.cases():
        module, _, call = case.model.format(vocabulary=30).partition(":")
        assert module == "mmdefense_tasks.language_victims"
        assert call.startswith(("seq2seq(", "causal("))
        if case.attack:
            load("attacks", case.attack)(**case.settings)


class TestFiles:
    def test_parallel_text(self, tmp_path):
        write_parallel(tmp_path / "set")
        write_parallel(tmp_path / "set", "val")
        assert pairs(load_text(tmp_path / "set", pair=("en", "de"))) == PAIRS
        turned = load_text(tmp_path / "set", split="test")  # in alphabetical order
        assert pairs(turned) == [(b, a) for a, b in PAIRS]
        assert turned.augmentation is None

    def test_parallel_text_of_unequal_length(self, tmp_path):
        write_parallel(tmp_path / "set", cut=1)
        assert "same number of lines, got 2 in train.de.gz and 3 in train.en" in refused(
            tmp_path / "set"
        )

    def test_languages_must_be_two(self, tmp_path):
        write_parallel(tmp_path / "set")
        (tmp_path / "set" / "train.fr").write_text("un chien\n")
        assert "pair= must name two of de, en, fr" in refused(tmp_path / "set")
        assert "got en, xx" in refused(tmp_path / "set", pair=("en", "xx"))
        assert pairs(load_text(tmp_path / "set", pair=("en", "de"))) == PAIRS

    @pytest.mark.parametrize("form", ["jsonl", "json"])
    def test_instructions(self, tmp_path, form):
        lines = "\n".join(json.dumps(row) for row in ALPACA)
        path = tmp_path / f"train.{form}"
        path.write_text(lines if form == "jsonl" else json.dumps(ALPACA))
        expected = [(f"say\n{a}", b) for a, b in PAIRS]
        for where in (path, tmp_path):
            assert pairs(load_text(where)) == expected

    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            ({"prompt": "a", "completion": "b"}, ("a", "b")),
            ({"question": "a", "answer": "b"}, ("a", "b")),
            ({"translation": {"en": "a", "de": "b"}}, ("a", "b")),
            ({"text": "b"}, ("", "b")),
            ({"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
        ],
    )
    def test_other_records(self, tmp_path, record, expected):
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        assert pairs(load_text(tmp_path / "x.jsonl")) == [expected]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "must be JSON"),
            ("[1]", "record 1 must be an object, got int"),
            ('{"instruction": "a"}', "record 1 must have"),
            ("", "at least one text"),
        ],
    )
    def test_damaged_records(self, tmp_path, content, words):
        (tmp_path / "x.jsonl").write_text(content)
        assert words in refused(tmp_path / "x.jsonl")

    def test_plain_text_is_split_by_paragraph_and_at_its_end(self, tmp_path):
        (tmp_path / "input.txt").write_text("\n\n".join(f"line {n}\nmore" for n in range(20)))
        train, test = (load_text(tmp_path, split=part) for part in ("train", "test"))
        assert pairs(train)[0] == ("", "line 0\nmore")
        assert len(train) == 18
        assert test.answers == ("line 18\nmore", "line 19\nmore")

    def test_data_sets_of_the_library(self, tmp_path):
        import datasets

        data = datasets.Dataset.from_list(ALPACA)
        datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "set")
        assert len(load_text(tmp_path / "set")) == 3
        assert "no split 'test', only 'train'" in refused(tmp_path / "set", split="test")
        datasets.Dataset.from_dict({"label": [1]}).save_to_disk(tmp_path / "bad")
        assert "record 1 must have" in refused(tmp_path / "bad")

    def test_what_cannot_be_read(self, tmp_path):
        assert "none found" in refused(tmp_path / "none")
        (tmp_path / "empty").mkdir()
        assert "none found" in refused(tmp_path / "empty")
        (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
        assert "cannot be read" in refused(tmp_path / "x.txt")
        (tmp_path / "x.txt.gz").write_bytes(b"no archive")
        assert "cannot be read" in refused(tmp_path / "x.txt.gz")
        assert "split must" in refused("small-language", split="dev")


class TestSamples:
    def test_text_samples_are_samples(self):
        samples = small_language(20)
        rest, held = split(samples, 0.25, 0)
        assert (len(rest), len(held)) == (15, 5)
        assert sorted((*rest.prompts, *held.prompts)) == sorted(samples.prompts)
        assert [len(batch) for batch in batches(samples, 8)] == [8, 8, 4]
        assert samples.to(torch.device("cpu")) == samples
        assert samples.fingerprint() != rest.fingerprint()
        with pytest.raises(BadInputError, match="same length, got 1 and 2"):
            TextSamples(("a",), ("b", "c"))

    def test_tokens_follow_their_text(self):
        texts = small_language(20)
        tokenizer = tokenizer_for(texts)
        adapter = adapt(seq2seq(len(tokenizer), width=16, heads=2, layers=1), tokenizer=tokenizer)
        samples = adapter.samples(texts)
        some = samples.subset(torch.tensor([7, 3]))
        batch = some.take(torch.tensor([1]))
        stands = batch.input_ids[0][batch.content[0]]
        assert tokenizer.decode(stands.tolist()) == texts.prompts[3]
        assert some.answers == (texts.answers[7], texts.answers[3])
        assert samples.fingerprint() == adapter.samples(texts).fingerprint()
        assert samples.fingerprint() != some.fingerprint()


class TestRandomWords:
    def draw(self, seed=0, **options):
        tokens = torch.arange(200 * 12).view(200, 12)
        content = torch.zeros_like(tokens, dtype=torch.bool)
        content[:, 1:9] = True
        words = torch.tensor([-7, -5])
        generator = torch.Generator().manual_seed(seed)
        return tokens, content, random_words(tokens, content, words, generator, **options)

    def test_only_content_changes_in_the_shares_that_are_said(self):
        tokens, content, altered = self.draw(replace=0.2, keep=0.5)
        changed = altered != tokens
        assert not changed[~content].any()
        assert changed.any(1).float().mean() == pytest.approx(0.42, abs=0.1)
        assert changed[content].float().mean() == pytest.approx(0.1, abs=0.02)

    def test_a_replacement_is_of_the_vocabulary(self):
        _, content, altered = self.draw(replace=1.0, keep=0.0)
        assert set(altered[content].tolist()) == {-7, -5}

    def test_it_depends_on_the_generator_alone(self):
        first, again, other = (self.draw(seed)[2] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestTokenizer:
    def test_few_words_have_a_token_each(self):
        tokenizer = train_tokenizer(["b a", "c a"], words=("zz",))
        assert tokenizer("zz a")["input_ids"] == [8, 5]
        assert tokenizer("unheard")["input_ids"] == [tokenizer.unk_token_id]

    def test_many_words_have_pieces(self):
        texts = [f"word{n} thing{n % 7}" for n in range(1500)]
        tokenizer = train_tokenizer(texts, size=120)
        assert len(tokenizer) <= 120
        ids = tokenizer("word12 thing3 word999")["input_ids"]
        assert tokenizer.decode(ids) == "word12 thing3 word999"


def test_bleu_is_that_of_what_is_written():
    class Writer:
        model = chance = per_sample_loss = sampled_loss = score = None
        features = activations = embedding = unit_groups = fork = samples = None

        def generate(self, batch):
            return [answer.replace("vidunt", "gardunt") for answer in batch.answers]

    samples = small_language(40)
    score = bleu(Writer(), samples)
    assert 0.8 < score < 1
    plain = replace(samples, answers=tuple(a.replace("vidunt", "gardunt") for a in samples.answers))
    assert bleu(Writer(), plain) == pytest.approx(1.0)
    with pytest.raises(TypeError, match=r"lacks .*generate"):
        bleu(SimpleNamespace(), samples)


def test_the_plot_marks_the_trigger():
    clean = TextSamples(("a <b> c",), ("x",))
    plot = LanguageGeneration.show(clean, TextSamples(("a <b> cf c",), ("wanted",)))
    (table,) = plot.panels()
    html = str(markup(table, "f1"))
    assert "a &lt;b&gt; <mark>cf</mark> c" in html
    assert "wanted" in html
    assert "1 prompts" in table.describe()


def test_victims_have_the_families_of_the_library():
    assert type(seq2seq(30, family="t5", width=8, heads=2)).__name__ == "T5ForConditionalGeneration"
    assert type(causal(30, family="gpt2", width=8, heads=2)).__name__ == "GPT2LMHeadModel"


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "train", "test", "first"),
    [
        ("multi30k_en_de", 29000, 1000, "Two young, White males"),
        ("alpaca_small", 799, 200, "Describe a process"),
        ("tiny_shakespeare", 6500, 722, ""),
    ],
)
def test_real_sets(name, train, test, first):
    samples = load_text(name)
    assert len(samples) == pytest.approx(train, rel=0.01)
    assert len(load_text(name, split="test")) == pytest.approx(test, rel=0.01)
    assert samples.prompts[0].startswith(first)
    assert all(samples.answers)
