from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from records import BEFORE, CHOICE, comparison, purification, row

from mmdefense.defenses.outcome import TriggerSearch
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.record import AttackInfo
from mmdefense.report.verdict import beats_baseline, verdict


def attacked(before: float | None, after: float | None, **more):
    rates = (Rates(acc=0.9, asr=before), Rates(acc=0.9, asr=after))
    return purification(
        attack=AttackInfo(attack="BadNets", before=rates[0], after=rates[1]), **more
    )


def words(record) -> str:
    found = verdict(record)
    return " ".join([found.headline, *found.lines])


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [(0.99, 0.01, "pass"), (0.99, 0.06, "fail"), (0.01, 0.01, "open"), (0.01, 0.9, "fail")],
)
def test_the_level_follows_the_measured_asr(before, after, level):
    assert verdict(attacked(before, after)).level == level


@pytest.mark.parametrize(("before", "after"), list(product((None, 0.9, 0.01), repeat=2)))
def test_removal_is_claimed_only_from_a_measured_fall_of_the_asr(before, after):
    claimed = "was removed: ASR" in verdict(attacked(before, after)).headline
    assert claimed == ((before, after) == (0.9, 0.01))
    said = words(attacked(before, after))
    assert ("No attack success rate" in said) == ((before, after) == (None, None))
    assert ("model alone, so not how far it fell" in said) == ((before is None) != (after is None))


def test_without_an_attack_nothing_is_claimed_about_a_backdoor():
    found = verdict(purification())
    assert found.level == "open"
    assert "Utility bound kept" in found.headline
    assert "not measured" in found.headline
    assert "nothing here says that there was a backdoor" in found.lines[-1]


def test_a_violated_guard_outweighs_a_low_asr():
    found = verdict(attacked(0.99, 0.0, guard={"violated": True}))
    assert found.level == "fail"
    assert found.headline.startswith("Utility bound violated")


def test_a_low_rate_is_a_caution():
    found = verdict(attacked(0.99, 0.0, guard={"caution": "at this rate a backdoor often stays"}))
    assert "At this rate a backdoor often stays." in found.lines


UNDECIDED = {"drop": 0.15, "drop_low": 0.011, "drop_high": 0.289, "needed": 41}


def test_what_the_samples_do_not_decide_is_no_pass():
    found = verdict(purification(guard=UNDECIDED))
    words = "Utility bound not decidable with 36 held-out samples (about 41 would decide). "
    assert found.headline.startswith(words)
    assert found.level == "open"
    removed = verdict(attacked(0.99, 0.0, guard=UNDECIDED))
    assert removed.level == "open"
    assert "not decidable" in removed.label
    assert verdict(attacked(0.99, 0.9, guard=UNDECIDED)).level == "fail"


def test_a_choice_says_what_was_taken_and_what_the_known_triggers_reach():
    found = verdict(purification(choice=CHOICE))
    assert found.level == "open"  # known triggers are not the attacker's
    said = " ".join(found.lines)
    assert "tsbd was taken" in said
    assert "up to 99.0% of the held-out samples before, and on up to 4.0% after" in said
    unknown = replace(CHOICE, success_before=None, success_after=None)
    assert "succeeded on" not in words(purification(choice=unknown))


def test_the_guard_is_shown_with_its_interval_and_bound_in_points():
    said = words(purification(guard={"folds": 5}))
    assert "97.0% before, 96.0% after" in said
    assert "1.0 points (95% confidence interval \N{MINUS SIGN}0.4 to 1.8); the bound is 2.0" in said
    assert "fip, step 40" in said
    assert "on 36 samples of 5 folds" in said
    assert "smallest drop" not in said
    assert "which has the smallest drop" in words(purification(guard={"drop": 0.05}))


def test_no_trigger_found_is_said_to_be_no_proof():
    assert "not proof" in words(purification(triggers=TriggerSearch(targets=10, found=0)))
    assert "found 2 triggers" in words(purification(triggers=TriggerSearch(targets=10, found=2)))


def test_a_comparison_counts_those_that_reach_both_aims_and_names_the_others():
    record = comparison(
        row("fine-tuning", asr=0.5),
        row("fip", acc=0.95, asr=0.05, baseline="fine-tuning"),  # on both edges
        row("tsbd", acc=0.94, baseline="fine-tuning"),
        row("fine-pruning", asr=0.6, baseline="fine-tuning"),
        row("baeraser", baseline="fine-tuning", violated=True, undecided="with 9"),
    )
    found = verdict(record)
    assert found.level == "open"
    assert found.headline.startswith("1 of 4")
    assert found.lines[0] == "Aim not reached: tsbd, fine-pruning, baeraser."
    assert found.lines[1] == "Utility bound violated: baeraser."
    assert found.lines[2].endswith("its hold-out part: baeraser.")
    assert found.lines[3].endswith("by DER: fine-pruning.")


def test_a_clean_victim_is_not_counted_as_a_success():
    clean = row("fip", victim="clean", before=Rates(acc=0.97, asr=0.01))
    found = verdict(comparison(row("fip", victim="BadNets", asr=0.5), clean))
    assert (found.level, found.headline[:6]) == ("fail", "0 of 1")
    assert any("Not counted" in line and "fip on clean" in line for line in found.lines)


def test_all_good_passes_and_nothing_measured_stays_open():
    assert verdict(comparison(row("fip"))).level == "pass"
    unmeasured = row("fip", after=Rates(acc=0.9))
    assert verdict(comparison(unmeasured)).level == "open"


def test_a_baseline_is_looked_up_within_its_victim():
    rows = (
        row("fine-tuning", victim="a", asr=0.5),
        row("fine-tuning", victim="b", asr=0.0),
        row("fip", victim="a", asr=0.1, baseline="fine-tuning"),
        row("fip", victim="b", asr=0.1, baseline="fine-tuning"),
    )
    assert [beats_baseline(r, rows) for r in rows] == [None, None, True, False]
    tie = (row("fine-tuning"), row("fip", baseline="fine-tuning"))
    assert beats_baseline(tie[1], tie) is False
    assert BEFORE.der is None
