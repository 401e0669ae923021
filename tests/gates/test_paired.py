"""Paired tests, the split of a suite, and what a gate decides, against scipy, closed forms and plain enumeration."""

import math
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from cpt_mega.gates.paired import (
    Scores,
    compare_counts,
    detectable_drop,
    gate_items,
    gate_margin,
    holm,
    items_needed,
    judge,
    look_level,
    mean_drop,
    mean_drop_by_bootstrap,
    right_or_wrong,
    self_disagreement,
    split_panels,
)

LOOK = {"tau": 0.04, "alpha": 0.05, "looks": 50}
fixed = partial(settings, deadline=None, derandomize=True)


def panel(n: int, lost: int, gained: int) -> Scores:
    """n items, half of the rest right before and now."""
    before = np.zeros(n)
    now = np.zeros(n)
    before[:lost], now[lost : lost + gained] = 1, 1
    before[(n + lost + gained) // 2 :] = now[(n + lost + gained) // 2 :] = 1
    return Scores(before, now)


def score(n: int, lost: int, gained: int, drop: float) -> float:
    """Tango's statistic with the restricted likelihood's maximum looked for, not solved for."""
    least = max(0.0, -drop)

    def unlikely(share: float) -> float:
        found = ((lost, share + drop), (gained, share), (n - lost - gained, 1 - 2 * share - drop))
        return -sum(count * math.log(max(chance, 1e-300)) for count, chance in found if count)

    share = optimize.minimize_scalar(
        unlikely, bounds=(least, (1 - drop) / 2), method="bounded", options={"xatol": 1e-13}
    )
    variance = n * (2 * share.x + drop * (1 - drop))
    return (lost - gained - n * drop) / math.sqrt(variance) if variance > 1e-12 else 0.0


def tables(n: int):
    return [(lost, found - lost) for found in range(n + 1) for lost in range(found + 1)]


def chance(n: int, lost: int, gained: int, share, drop: float):
    """Of a table, where so large a share (or each of several) is discordant and the drop is so large."""
    shares = np.stack([(share + drop) / 2, (share - drop) / 2, 1 - np.asarray(share)], axis=-1)
    return stats.multinomial.pmf((lost, gained, n - lost - gained), n, shares)


@pytest.mark.parametrize("margin", [0.0, 0.03, 0.1])
@pytest.mark.parametrize(("lost", "gained"), [(5, 1), (3, 0), (9, 2), (2, 2), (1, 4), (12, 0)])
def test_the_p_value_is_the_largest_probability_of_tables_as_extreme(margin, lost, gained):
    n, found = 12, lost + gained
    at_least = score(n, lost, gained, margin) - 1e-5
    extreme = [table for table in tables(n) if score(n, *table, margin) >= at_least]
    least = stats.beta.ppf(5e-7, found, n - found + 1)
    most = stats.beta.ppf(1 - 5e-7, found + 1, n - found) if found < n else 1.0
    shares = np.linspace(max(least, margin, 1e-12), most, 200)
    largest = sum(chance(n, *table, shares, margin) for table in extreme).max()
    assert compare_counts(n, lost, gained, margin).p_value == pytest.approx(min(1, largest + 1e-6), rel=0.01)


@fixed(max_examples=10)
@given(share=st.floats(0.02, 0.6), margin=st.sampled_from([0.0, 0.01, 0.02, 0.05]), n=st.sampled_from([15, 30]))
def test_a_drop_as_large_as_the_margin_is_taken_for_larger_as_seldom_as_is_said(share, margin, n):
    share = max(share, margin)
    likely = [(table, chance(n, *table, share, margin)) for table in tables(n)]
    found = [(compare_counts(n, *table, margin).p_value, part) for table, part in likely if part > 1e-7]
    for level in (0.1, 0.05, 0.01, 0.001):
        assert sum(part for p_value, part in found if p_value <= level) <= level * 1.01


def test_without_a_margin_it_is_a_little_sharper_than_mcnemars_exact_test_and_far_from_half_of_it():
    for lost, gained in ((60, 30), (40, 22), (130, 90), (15, 3)):
        classic = stats.binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue
        assert 0.5 * classic < compare_counts(1000, lost, gained).p_value < classic


def test_with_many_items_it_agrees_with_the_normal_approximation():
    for lost, gained, margin in ((1_600, 1_400, 0.005), (2_000, 1_500, 0.02)):
        expected = stats.norm.sf(score(20_000, lost, gained, margin))
        assert compare_counts(20_000, lost, gained, margin).p_value == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("n", "lost", "gained"), [(44, 1, 0), (100, 12, 3), (1000, 60, 30), (200, 0, 9), (50, 5, 5)])
def test_the_interval_holds_the_drops_that_the_score_statistic_does_not_reject(n, lost, gained):
    found = compare_counts(n, lost, gained)
    assert found.low < found.drop == (lost - gained) / n < found.high
    assert score(n, lost, gained, found.low) == pytest.approx(1.959964, abs=1e-3)
    assert score(n, lost, gained, found.high) == pytest.approx(-1.959964, abs=1e-3)
    turned = compare_counts(n, gained, lost)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


@fixed(max_examples=40)
@given(
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))),
    st.floats(0, 0.3),
)
def test_more_lost_or_a_smaller_margin_never_speak_for_the_model(counts, margin):
    n, lost, gained = counts
    gained = min(gained, n - lost)
    found = compare_counts(n, lost, gained, margin)
    assert 0 <= found.p_value <= 1 and -1 <= found.low <= found.drop <= found.high <= 1
    slack = 1.02  # the shares tried are not all there are
    if lost + gained < n:
        assert compare_counts(n, lost + 1, gained, margin).p_value <= found.p_value * slack
    assert compare_counts(n, lost, gained, margin / 2).p_value <= found.p_value * slack


def test_right_or_wrong_items_are_counted_both_ways():
    found = right_or_wrong(np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 0, 1]))
    assert (found.n, found.lost, found.gained, found.drop) == (6, 2, 1, pytest.approx(1 / 6))
    assert found == right_or_wrong(np.array([1, 1, 1, 0, 0, 1], bool), [True, False, False, True, False, True])


@pytest.mark.parametrize("test", [right_or_wrong, mean_drop, mean_drop_by_bootstrap])
def test_scores_of_other_items_are_refused(test):
    for before, now in (([1, 0], [1]), ([], []), ([[1, 0]], [[1, 0]]), ([math.nan, 1], [1, 1])):
        with pytest.raises(ValueError):
            test(before, now, 0.0)


def test_counts_and_scores_that_are_none_are_refused():
    for counts in ((10, 8, 3, 0.0), (10, -1, 3, 0.0), (0, 0, 0, 0.0), (10, 1, 1, -0.1), (10, 1, 1, 1.0)):
        with pytest.raises(ValueError):
            compare_counts(*counts)
    with pytest.raises(ValueError, match="0 and 1"):
        right_or_wrong([0.5, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="0 and 1"):
        right_or_wrong([0.0, 1.0], [1.0, math.nan])


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_continuous_scores_are_compared_by_the_paired_t_test(margin):
    draw = np.random.default_rng(1)
    before = draw.normal(-2, 1, 80)
    now = before - draw.normal(0.1, 0.3, 80)
    expected = stats.ttest_rel(before - margin, now, alternative="greater")
    ends = stats.ttest_rel(before, now).confidence_interval(0.95)
    found = mean_drop(before, now, margin)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(ends), rel=1e-9)
    assert (found.n, found.margin, found.lost, found.gained) == (80, margin, None, None)
    again = mean_drop_by_bootstrap(before, now, margin)
    assert again == mean_drop_by_bootstrap(before, now, margin) != mean_drop_by_bootstrap(before, now, margin, seed=1)
    assert again.p_value == pytest.approx(found.p_value, rel=0.3, abs=2e-3) and again.drop == found.drop
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=0.01)


def test_the_bootstrap_knows_of_skewed_differences_what_the_t_test_does_not():
    draw = np.random.default_rng(2)
    drops = [math.exp(0.5) - draw.lognormal(size=100) for _ in range(200)]  # no drop, and a long tail of better items
    wrong = [sum(test(each, np.zeros(100)).p_value <= 0.01 for each in drops) for test in (mean_drop, _few)]
    assert wrong[1] < 0.75 * wrong[0]


def _few(before, now):
    return mean_drop_by_bootstrap(before, now, resamples=999)


@pytest.mark.parametrize("test", [mean_drop, mean_drop_by_bootstrap])
def test_continuous_scores_that_no_test_is_made_for(test):
    ones = np.ones(20)
    for broken in (math.nan, math.inf, -math.inf):
        found = test(ones, np.array([*ones[1:], broken]), 0.1)
        assert found.p_value == 0 and found.drop == math.inf
    assert test(ones, ones - 0.2, 0.1).p_value == 0
    assert test(ones, ones - 0.05, 0.1).p_value == 1
    assert test([1.0], [0.0], 0.1).p_value == 1


def test_what_a_baseline_disagrees_with_itself_by_widens_the_margin_in_full():
    assert self_disagreement([1, 0, 1, 1], [1, 1, 0, 1]) == 0.5
    assert self_disagreement([0.5, 1.0], [0.25, 1.25]) == 0.25
    assert gate_margin(0.04) == 0.02 and gate_margin(0.04, 0.01) == pytest.approx(0.03)
    heavy, light = panel(400, 36, 4), panel(400, 36, 4)
    assert judge(heavy, light, **LOOK).confirmed
    assert not judge(heavy, light, **LOOK, noise=0.05).confirmed


@fixed(max_examples=100)
@given(st.lists(st.sampled_from([0.0, 0.004, 0.01, 0.0125, 0.02, 0.025, 0.04, 0.05, 0.3]), max_size=5))
def test_holm_is_the_closed_test_of_bonferronis(values):
    p_values = {f"gate {index}": value for index, value in enumerate(values)}
    groups = [group for size in range(1, len(values) + 1) for group in combinations(p_values, size)]
    rejected = {group: min(map(p_values.get, group)) <= 0.05 / len(group) for group in groups}
    assert holm(p_values, 0.05) == {name for name in p_values if all(rejected[g] for g in groups if name in g)}


def test_a_gate_without_a_number_counts_and_is_not_rejected():
    assert holm({"a": 0.03, "b": math.nan}, 0.05) == set()
    assert holm({"a": 0.02, "b": math.nan}, 0.05) == {"a"}


def test_what_so_many_items_can_see():
    assert items_needed(0.01, 0.1, 0.05, 0.8) == 6_181
    assert items_needed(0.02, 0.1, 0.05, 0.8) in (1_543, 1_544)  # 1,543.55
    assert 0.05 < detectable_drop(200, 0.1, 0.05, 0.8) < detectable_drop(200, 0.2, 0.05, 0.8) < 0.08
    assert detectable_drop(3, 0.1, 0.001, 0.95) == math.inf
    assert items_needed(0.03, 0.1, 0.05, 0.8, margin=0.01) == 1_540  # by hand: 1,539.90
    for numbers in ((0.01, 0.1, 0.05, 0.8, 0.01), (0.0, 0.1, 0.05, 0.8), (0.1, 1.1, 0.05, 0.8), (0.1, 0.1, 0.0, 0.8)):
        with pytest.raises(ValueError):
            items_needed(*numbers)


@fixed(max_examples=60)
@given(st.integers(50, 20_000), st.floats(0.01, 0.5), st.sampled_from([0.05, 0.001]), st.sampled_from([0.0, 0.01]))
def test_a_drop_that_can_be_seen_needs_no_more_items_than_there_are(n, share, alpha, margin):
    drop = detectable_drop(n, share, alpha, 0.8, margin)
    if drop < 1:
        assert items_needed(drop, share, alpha, 0.8, margin) <= n
        assert items_needed(margin + 0.99 * (drop - margin), share, alpha, 0.8, margin) > n


def test_the_power_that_is_said_is_the_power_there_is():
    n, share, drop, margin = items_needed(0.05, 0.12, 0.01, 0.8, 0.01), 0.12, 0.05, 0.01
    draws = np.random.default_rng(3).multinomial(n, [(share + drop) / 2, (share - drop) / 2, 1 - share], 400)
    found = [compare_counts(n, int(lost), int(gained), margin).p_value <= 0.01 for lost, gained, _ in draws]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_a_gate_needs_more_items_for_more_looks_more_noise_and_smaller_drops():
    plain = gate_items(0.04, 0.1, 0.05, 50)
    assert plain == items_needed(0.08, 0.1, 0.001, 0.97, 0.02)
    assert plain > gate_items(0.04, 0.1, 0.05, 10) > gate_items(0.08, 0.1, 0.05, 10)
    assert gate_items(0.04, 0.1, 0.05, 50, noise=0.01) > 1.3 * plain
    with pytest.raises(ValueError):
        gate_items(0.04, 0.1, 0.05, 50, noise=0.06)


def test_the_error_of_a_run_is_shared_by_its_looks():
    assert look_level(0.05, 50) == pytest.approx(0.001)
    for alpha, looks in ((0.0, 5), (1.0, 5), (0.05, 0)):
        with pytest.raises(ValueError):
            look_level(alpha, looks)


def test_panels_are_disjoint_and_an_item_stays_where_it_is():
    ids = [f"item/{number}" for number in range(4_000)]
    panels = split_panels(ids, seed=7)
    assert not set(panels.main) & set(panels.reserve) and len(panels.main) + len(panels.reserve) == 4_000
    assert abs(len(panels.reserve) - 2_000) < 130  # four deviations
    assert list(panels.main) == [item for item in ids if item in set(panels.main)]
    fewer = split_panels(reversed(ids[::3]), seed=7)
    assert set(fewer.main) == set(panels.main) & set(ids[::3])
    assert set(split_panels(ids, seed=8).main) != set(panels.main)
    smaller = split_panels(ids, seed=7, reserve_share=0.25)
    assert set(smaller.reserve) < set(panels.reserve) and abs(len(smaller.reserve) - 1_000) < 110
    # for good: runs that go on with another version must find the same panels
    assert split_panels(ids[:8], seed=7).reserve == ("item/0", "item/2", "item/5", "item/7")
    for wrong, share in ((["a", "a"], 0.5), (["a"], 0.0), (["a"], 1.0)):
        with pytest.raises(ValueError):
            split_panels(wrong, 1, share)


def test_nothing_fires_without_a_drop_and_the_reserve_is_not_looked_at():
    decision = judge(panel(400, 20, 20), Scores([1], [1, 0]), **LOOK)
    assert not decision.fired and not decision.confirmed and decision.p_value == 1
    assert decision.reserve is decision.together is None
    assert decision.main == compare_counts(400, 20, 20, 0.02) and decision.level == pytest.approx(0.001)


def test_a_hit_is_confirmed_by_the_reserve_and_by_all_items_together():
    main = panel(400, 44, 4)
    alone = judge(main, None, **LOOK)
    assert alone.fired and not alone.confirmed and alone.p_value == 1 and alone.main.p_value < 0.001
    healthy = judge(main, panel(300, 16, 14), **LOOK)  # all items together would do
    assert healthy.fired and healthy.together.p_value < 0.001
    assert not healthy.confirmed and healthy.p_value == 1
    both = judge(main, panel(300, 22, 4), **LOOK)
    assert both.fired and both.confirmed and both.p_value == both.together.p_value < 0.001
    assert both.together == compare_counts(700, 66, 8, 0.02) and both.reserve == compare_counts(300, 22, 4, 0.02)
    weak = judge(panel(400, 30, 12), panel(300, 22, 8), **LOOK)  # both panels show it, all items not at this level
    assert weak.fired and not weak.confirmed and 0.001 < weak.p_value < 0.05
    assert judge(panel(400, 30, 12), panel(300, 22, 8), **{**LOOK, "looks": 2}).confirmed
    with pytest.raises(ValueError):
        judge(main, None, tau=0.0, alpha=0.05, looks=1)


def test_scores_that_are_no_numbers_in_one_panel_alone_confirm_nothing():
    draw = np.random.default_rng(4)
    before = draw.normal(size=300)
    same, lower = before + draw.normal(0, 0.1, 300), before - 0.2 + draw.normal(0, 0.1, 300)
    broken = np.array([math.nan, *same[1:]])
    decision = judge(Scores(before, broken), Scores(before, same), **LOOK, test=mean_drop)
    assert decision.fired and not decision.confirmed
    assert judge(Scores(before, broken), Scores(before, broken), **LOOK, test=mean_drop).confirmed
    assert judge(Scores(before, lower), Scores(before, lower), **LOOK, test=mean_drop).confirmed
