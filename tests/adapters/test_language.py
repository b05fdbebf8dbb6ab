"""What the adapters of language models promise beyond the contract of all adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch
from language_models import MODELS, build, texts, tokenizer
from torch import nn

from mmdefense.data.text import IGNORED, TokenBatch
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.fisher import check_second_derivative, fisher_trace
from mmdefense.kernels.hooks import second_derivatives
from mmdefense.kernels.loop import mean_score
from mmdefense.kernels.pruning_curve import pruning_curve
from mmdefense.kernels.units import prune
from mmdefense.protocol import GeneratingAdapter, HeadAdapter, TriggerAdapter, missing_members
from mmdefense.registry import adapt
from mmdefense_adapters.huggingface_text import _share_right

N = 5
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "lora")
FEW = torch.arange(N)


@cache
def made(name):
    adapter = adapt(build(name), tokenizer=tokenizer())
    samples = adapter.samples(texts())
    adapter.unit_groups()
    return adapter, samples


def wrapped(name):
    adapter, samples = made(name)
    return adapter.fork(), samples


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def both(name):
    return wrapped(name)


def test_each_family_gets_its_adapter_and_all_abilities(name, both):
    adapter, _ = both
    assert type(adapter).__name__ == ("HFCausalLM" if name in CAUSAL else "HFSeq2SeqLM")
    for ability in (HeadAdapter, TriggerAdapter, GeneratingAdapter):
        assert missing_members(adapter, ability) == []


def test_padding_changes_nothing(both):
    adapter, samples = both
    batch = samples.take(FEW)
    wide = TokenBatch(
        nn.functional.pad(batch.input_ids, (0, 3), value=tokenizer().pad_token_id),
        nn.functional.pad(batch.attention_mask, (0, 3)),
        nn.functional.pad(batch.content, (0, 3)),
        nn.functional.pad(batch.labels, (0, 3), value=IGNORED),
    )
    layers = [group.layer for group in adapter.unit_groups()]
    for ask in (
        adapter.per_sample_loss,
        adapter.score,
        adapter.embedding,
        lambda given: adapter.features(given, layers),
    ):
        torch.testing.assert_close(ask(wide), ask(batch), rtol=1e-4, atol=1e-5)


def ngram_share(right):
    """Mean over n = 1..4 of the share of n-grams that are right throughout, by loops."""
    shares = []
    for n in range(1, min(4, len(right)) + 1):
        grams = [all(right[i : i + n]) for i in range(len(right) - n + 1)]
        shares.append(sum(grams) / len(grams))
    return sum(shares) / len(shares)


def test_the_score_is_the_share_of_right_ngrams(both):
    adapter, samples = both
    batch = samples.take(FEW)
    targets, logits = adapter._targets(batch), adapter._logits(batch)
    known, told = targets != IGNORED, logits.argmax(2)
    hit = torch.rand(targets.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    wanted = torch.where(hit & known, told, targets)  # most tokens are those that the model writes
    expected = [ngram_share((told[n] == wanted[n])[known[n]].tolist()) for n in range(N)]
    with mock.patch.object(adapter, "_targets", return_value=wanted):
        for found in (adapter.score(batch), adapter.score_outputs(batch, logits[known])):
            torch.testing.assert_close(found, torch.tensor(expected))
    assert min(expected) > 0


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_answers_of_any_length_have_a_score_between_0_and_1(length):
    known = torch.tensor([[True] * length + [False] * 2])
    right = known.clone()
    assert _share_right(right, known).tolist() == [1.0]
    assert _share_right(~right, known).tolist() == [0.0]
    right[0, 0] = False
    expected = ngram_share([False] + [True] * (length - 1))
    assert _share_right(right, known).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("name", ["llama", "marian"])
def test_the_scores_covariance_is_the_fisher_of_the_loss(name):
    """Its mean square over many draws, against labels drawn from the model at each position."""
    adapter, samples = wrapped(name)
    batch = samples.take(FEW[:2])
    loss, score = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, adapter.per_sample_loss(batch))
    torch.testing.assert_close(
        adapter.sampled_loss(batch, torch.Generator().manual_seed(0))[1], score
    )
    head = adapter.model.get_submodule(adapter.head)
    head.weight = weight = nn.Parameter(head.weight.detach().clone())  # no longer the embedding's
    drawn = torch.zeros_like(weight)
    generator, draws = torch.Generator().manual_seed(1), 150
    for _ in range(draws):
        total = adapter.sampled_loss(batch, generator)[1].sum()
        drawn += torch.autograd.grad(total, weight)[0].square() / draws
    # exact, at the output layer: sum_t h_t^2 p_t (1 - p_t) / T^2
    hidden, known = adapter._hidden(batch), adapter._targets(batch) != IGNORED
    p = adapter._logits(batch).softmax(2)
    scale = known / known.sum(1, keepdim=True).square()
    exact = torch.einsum("ntv,ntd,nt->vd", p * (1 - p), hidden.square(), scale)
    torch.testing.assert_close(drawn.sum(), exact.sum(), rtol=0.1, atol=0)
    torch.testing.assert_close(drawn.sum(0), exact.sum(0), rtol=0.5, atol=0)


def test_a_score_has_a_second_derivative_in_double_precision(name):
    model = build(name).double()
    adapter = adapt(model, tokenizer=tokenizer())
    samples = adapter.samples(texts())
    trained = [p for p in model.parameters() if p.requires_grad]
    check_second_derivative(adapter, samples, trained)
    batch, parameter = samples.take(FEW[:1]), trained[-1]

    def gradient():
        with second_derivatives():
            loss = adapter.per_sample_loss(batch).sum()
            return torch.autograd.grad(loss, parameter, create_graph=True)[0]

    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
    product = torch.autograd.grad((gradient() * direction).sum(), parameter)[0]
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            parameter += step * direction
        values.append(gradient().detach())
    difference = (values[0] - values[1]) / 2e-3
    # The norms of Llama and T5 compute in single precision, whatever they are given.
    assert (product - difference).norm() <= 0.01 * difference.norm() + 1e-6


def test_features_give_one_finite_value_per_unit(name, both):
    adapter, samples = both
    groups = adapter.unit_groups()
    features = adapter.features(samples.take(FEW), [group.layer for group in groups])
    for group in groups:
        assert features[group.layer].shape == (N, group.size), group
        assert features[group.layer].isfinite().all()
        assert features[group.layer].count_nonzero()
    kinds = {group.kind for group in groups}
    assert kinds == ({"neuron"} if name == "lora" else {"neuron", "head"})


def test_unit_groups_name_real_parameters_and_spare_the_vocabulary(both):
    adapter, _ = both
    parameters = dict(adapter.model.named_parameters(remove_duplicate=False))
    for group in adapter.unit_groups():
        for name, axis in group.axes.items():
            assert parameters[name].shape[axis] == group.size * group.width, name
            assert len(tokenizer()) not in parameters[name].shape


@pytest.mark.parametrize("name", ["gpt2", "t5", "marian"])
def test_a_heads_feature_is_the_size_of_what_it_adds(name):
    """Against the change of the projection's output when the head alone is removed."""
    adapter, samples = wrapped(name)
    batch = samples.take(FEW)
    for place, group in enumerate(adapter.unit_groups()):
        if group.kind != "head":
            continue
        fork, outputs = adapter.fork(), []
        layer = fork.model.get_submodule(group.layer)
        whole = adapter.features(batch, [group.layer])[group.layer]
        layer.register_forward_hook(lambda *given, kept=outputs: kept.append(given[2]))
        fork.score(batch)
        inputs = []
        layer.register_forward_pre_hook(lambda _, given, kept=inputs: kept.append(given[0]))
        fork.score(batch)
        prune(fork.model, adapter.unit_groups(), [(place, 0)])
        with torch.no_grad():
            change = layer(inputs[-1]) - outputs[-1 if len(outputs) < 3 else -2]
        size = change.square().mean(-1).sqrt()
        mask = adapter._mask_of(group.layer, batch)
        mean = (size.reshape(mask.shape) * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(whole[:, 0], mean, rtol=1e-4, atol=1e-5)


def test_what_the_output_layer_reads_gives_the_score(name, both):
    adapter, samples = both
    batch = samples.take(FEW)
    weight, bias = adapter.head_weights()
    read = adapter.head_inputs(batch)
    outputs = read @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(adapter.score_outputs(batch, outputs), adapter.score(batch))
    counts = (adapter._targets(batch) != IGNORED).sum(1).tolist()
    means = torch.stack([part.mean(0) for part in read.split(counts)])
    torch.testing.assert_close(adapter.embedding(batch), means, rtol=1e-4, atol=1e-5)


def test_the_pruning_curve_is_that_of_the_pruned_model(name, both):
    adapter, samples = both
    if name == "lora":
        with pytest.raises(UnsupportedError, match="layers=all"):
            adapter.head_group()
        return
    counts = [0, 3, 9]
    curve = pruning_curve(adapter, samples, range(16), counts)
    for count, value in zip(counts, curve.tolist(), strict=True):
        fork = adapter.fork()
        prune(fork.model, [fork.head_group()], [(0, unit) for unit in range(count)])
        assert mean_score(fork, samples) == pytest.approx(value, abs=1e-6)


def test_a_greedy_answer_is_what_comes_out_on_top_token_by_token(name, both):
    adapter, samples = both
    batch = samples.take(FEW)
    texts_, limit = adapter.generate(batch), 6
    for n in range(2):
        prompt = batch.input_ids[n][batch.attention_mask[n] & (batch.labels[n] == IGNORED)] if (
            adapter.shared
        ) else batch.input_ids[n][batch.attention_mask[n]]  # fmt: skip
        told: list[int] = []
        while len(told) < limit and tokenizer().eos_token_id not in told:
            if adapter.shared:
                ids = torch.cat([prompt, torch.tensor(told, dtype=torch.int64)])[None]
                logits = adapter.model(input_ids=ids).logits
            else:
                start = adapter.model.config.decoder_start_token_id
                ids = torch.tensor([[start, *told]])
                logits = adapter.model(input_ids=prompt[None], decoder_input_ids=ids).logits
            told.append(int(logits[0, -1].argmax()))
        words = tokenizer().decode(told, skip_special_tokens=True).strip()
        assert texts_[n].startswith(words), (texts_[n], words)


class TestTriggers:
    @pytest.fixture
    def both(self, name):
        made(name)[0].trigger_targets()  # once, and each fork knows
        return wrapped(name)

    def test_a_soft_prefix_of_one_token_is_that_token_before_the_prompt(self, both):
        adapter, samples = both
        batch = samples.take(FEW)
        (family,) = adapter.trigger_families()
        hard = torch.zeros(1, N, *family.shape)
        hard[0, :, 0, 3], hard[0, :, 1, 5] = 20, 20
        tokens = adapter._suspects.tokens[[3, 5]]
        assert adapter.trigger_words(hard[0, 0]) == tokenizer().decode(tokens.tolist())
        answer = adapter._suspects.answers[0]
        known = answer[answer != IGNORED]
        assert adapter.target_words(0) == tokenizer().decode(known.tolist())
        real = [f"{tokenizer().decode(tokens.tolist())} {prompt}" for prompt in texts().prompts[:N]]
        pairs = list(zip(real, texts().answers[:N], strict=True))
        expected = adapter.per_sample_loss(adapter.samples(pairs).take(FEW))
        stamped = adapter.stamp(batch, family, hard)
        torch.testing.assert_close(adapter.per_sample_loss(stamped), expected, rtol=1e-4, atol=1e-4)

    def test_stamping_repeats_the_batch_for_each_trigger_and_has_a_gradient(self, both):
        adapter, samples = both
        batch = samples.take(FEW)
        (family,) = adapter.trigger_families()
        raw = torch.rand(3, N, *family.shape, generator=torch.Generator().manual_seed(0))
        raw.requires_grad_(True)
        stamped = adapter.stamp(batch, family, raw)
        assert len(stamped) == 3 * N
        log_p = adapter.target_log_probability(stamped, torch.zeros(3 * N, dtype=torch.int64))
        assert log_p.shape == (3 * N,)
        (gradient,) = torch.autograd.grad(log_p.sum(), raw)
        assert (gradient.flatten(1).abs().sum(1) > 0).all()
        assert adapter.trigger_size(family, raw).shape == (3, N)
        assert 0 < float(adapter.trigger_size(family, raw).max()) < family.budget
        picture = adapter.trigger_picture(family, raw[0, 0].detach())
        assert picture.ndim == 3
        assert 0 <= picture.min() < picture.max() <= 1

    def test_the_probability_is_that_of_the_whole_continuation(self, both):
        adapter, samples = both
        batch = samples.take(FEW)
        answer = texts().answers[7]
        ids = [
            *tokenizer()(answer, add_special_tokens=False)["input_ids"],
            tokenizer().eos_token_id,
        ]
        other = [*ids[:2], *[IGNORED] * (len(ids) - 2)]
        adapter.__dict__["_suspects"] = replace(
            adapter._suspects, answers=torch.tensor([other, ids])
        )
        targets = torch.ones(N, dtype=torch.int64)
        log_p = adapter.target_log_probability(batch, targets)
        pairs = [(prompt, answer) for prompt in texts().prompts[:N]]
        loss = adapter.per_sample_loss(adapter.samples(pairs).take(FEW))
        torch.testing.assert_close(log_p, -loss * len(ids), rtol=1e-4, atol=1e-3)
        own = adapter.samples([(texts().prompts[0], answer)]).take(torch.tensor([0]))
        assert adapter.not_target(own, targets[:1]).tolist() == [False]
        assert adapter.not_target(batch, targets).tolist() == [True] * N


class TestLora:
    def test_units_are_the_ranks_of_the_updates(self):
        adapter, _ = wrapped("lora")
        groups = adapter.unit_groups()
        assert len(groups) == 2 * 3
        assert all(group.size == 3 for group in groups)
        trained = {n for n, p in adapter.model.named_parameters() if p.requires_grad}
        assert {name for group in groups for name in group.axes} == trained

    @pytest.mark.parametrize("defense", ["fip", "tsbd", "fine-pruning"])
    def test_a_defense_leaves_the_base_alone(self, defense):
        from mmdefense.pipeline.purification import configured

        adapter, samples = wrapped("lora")
        own = {"layers": "all"} if defense == "fine-pruning" else {}
        own |= {"unlearn_epochs": 2} if defense == "tsbd" else {}
        plan = configured(defense, {"steps": 2, "max_utility_drop": 1.0, "lr": 0.1, **own})
        result = plan.purify(adapter, samples)
        after = result.model.state_dict()
        moved = [n for n, v in adapter.model.state_dict().items() if not torch.equal(v, after[n])]
        assert moved
        assert all("lora_" in name for name in moved)


class TestBadInput:
    @pytest.fixture
    def adapter(self):
        return adapt(build("llama"), tokenizer=tokenizer())

    def refused(self, adapter, data):
        with pytest.raises(BadInputError) as caught:
            adapter.samples(data)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_tokenizer_without_pad_token(self):
        bare = copy.deepcopy(tokenizer())
        bare.pad_token = None
        whole = adapt(build("llama"), tokenizer=bare)
        assert whole.tokenizer.pad_token == bare.eos_token
        assert bare.pad_token is None
        named = adapt(build("llama"), tokenizer=bare, pad_token=bare.convert_ids_to_tokens(50))
        assert named.tokenizer.pad_token_id == 50
        assert len(named.tokenizer) == len(bare)
        every = torch.arange(len(texts()))
        batch, other = (a.samples(texts()).take(every) for a in (whole, named))
        assert not torch.equal(batch.input_ids, other.input_ids)
        with torch.no_grad():  # padding is masked
            torch.testing.assert_close(named.per_sample_loss(other), whole.per_sample_loss(batch))

    @pytest.mark.parametrize("name", ["llama", "marian"])
    def test_a_tokenizer_with_neither_pad_nor_end(self, name):
        bare = copy.deepcopy(tokenizer())
        bare.pad_token = bare.eos_token = None
        with pytest.raises(BadInputError, match=r"neither a pad .* special ones are <s>, <unk>"):
            adapt(build(name), tokenizer=bare)
        with pytest.raises(BadInputError, match=r"must be one of the tokenizer's .* got '<fill>'"):
            adapt(build(name), tokenizer=bare, pad_token="<fill>")
        adapter = adapt(build(name), tokenizer=bare, pad_token="<pad>")
        batch = adapter.samples(texts()).take(torch.tensor([0, 1, 2]))
        assert adapter.per_sample_loss(batch).isfinite().all()
        assert len(adapter.generate(batch)) == 3

    def test_no_tokenizer_at_all(self):
        with pytest.raises(BadInputError, match="needs its tokenizer"):
            adapt(build("llama"))

    def test_the_tokenizer_beside_the_weights_is_found(self, tmp_path):
        build("llama").save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert len(adapt(model).tokenizer) == len(tokenizer())

    def test_a_sequence_beyond_the_context(self, adapter):
        long = [("the dog", "lo kel ."), ("dog " * 150, "lo kel .")]
        assert "sequence 1 has 156 tokens, but the model reads at most 128" in self.refused(
            adapter, long
        )
        cut = adapt(build("llama"), tokenizer=tokenizer(), max_length=40)
        assert cut.samples(long).tokens.input_ids.shape[1] <= 128

    def test_tokens_that_the_model_lacks(self, adapter):
        samples = adapter.samples(texts())
        beyond = replace(samples.tokens, input_ids=samples.tokens.input_ids + len(tokenizer()))
        message = self.refused(adapter, replace(samples, tokens=beyond))
        assert "the model's vocabulary" in message

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ([], "at least one text"),
            ([("a", 3)], "pairs (prompt, answer)"),
            ([("a", "b", "c")], "pairs (prompt, answer)"),
        ],
    )
    def test_what_is_no_text(self, adapter, data, words):
        assert words in self.refused(adapter, data)

    def test_nothing_seen_yet(self, adapter):
        with pytest.raises(BadInputError, match="seen no answer"):
            adapter.chance  # noqa: B018


def test_plain_text_is_predicted_whole():
    adapter = adapt(build("gpt2"), tokenizer=tokenizer())
    samples = adapter.samples(["the dog sees a cat .", "the dog ."])
    assert (samples.tokens.labels != IGNORED).sum(1).tolist() == [7, 4]
    assert not samples.tokens.content.any()


def test_chance_is_the_score_of_the_most_frequent_answer_token():
    adapter = adapt(build("gpt2"), tokenizer=tokenizer())
    adapter.samples([("the dog", "lo lo lo lo"), ("a cat", "una mirn")])
    first, second = [True] * 4 + [False], [False] * 3  # each answer ends in a mark of its own
    assert adapter.chance == pytest.approx((ngram_share(first) + ngram_share(second)) / 2)


def test_the_fisher_trace_of_a_text_model_is_positive(both):
    adapter, samples = both
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    assert fisher_trace(adapter, samples, trained, torch.Generator().manual_seed(0)) > 0
