"""Tables keep every digit, and sentences say what the numbers say, whoever wins."""
import math

import numpy as np
import pandas as pd
import pytest

from evoprune_nb.paper.tables import as_text, compare, save_table, sentence, size_sentence, verdict


def test_saved_three_times(tmp_path):
    "CSV has all digits and comes back as it was; Markdown and LaTeX escape what they must."
    frame = pd.DataFrame({"model": ["a|b", "50 % & $x_1$"], "n": [1234567, 2], "loss": [math.pi, math.nan]})
    csv, md, tex = save_table(frame, tmp_path / "tables" / "x", as_text(frame, {"loss": "{:.2f}"}))
    pd.testing.assert_frame_equal(pd.read_csv(csv), frame, check_exact=True)
    assert md.read_text().splitlines() == ["| model | n | loss |", "| --- | ---: | ---: |", "| a\\|b | 1,234,567 | 3.14 |", "| 50 % & $x_1$ | 2 |  |"]
    assert r"50 \% \& \$x\_1\$ & 2 &  \\" in tex.read_text() and tex.read_text().count("rule") == 3


@pytest.mark.parametrize("n", [2, 3, 10, 40])
def test_the_bound_is_students(n):
    "Against scipy's quantile; one pair shows nothing."
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    ours, other = rng.normal(1, 0.1, n), rng.normal(1.1, 0.1, n)
    found = compare(ours, other)
    quantile = stats.t.ppf(0.95, n - 1) if n <= 31 else stats.norm.ppf(0.95)
    assert found.mean == pytest.approx((ours - other).mean()) and found.bound == pytest.approx(stats.sem(ours - other) * quantile, rel=1e-3)
    assert compare([1.0], [2.0]).winner == 0 and compare([1.0], [2.0]).bound == math.inf
    with pytest.raises(ValueError, match="pairs are compared: 1 values against 2"):
        compare([1.0], [1.0, 2.0])


@pytest.mark.parametrize("shift, title, words", [
    (-0.1, "ours beats other by 9.5 %", "is 9.5 % lower than that of other, at least"), (0.1, "other beats ours by 9.5 %", "is 10.5 % higher than that of other, at least"),
    (0.0001, "no difference between ours and other", "less than chance explains")])
def test_words_follow_the_numbers(shift, title, words):
    "Better, worse or neither: no sentence has a sign to be read twice."
    other = np.linspace(2, 3, 20)
    found = compare(other + shift + 0.01 * np.sin(np.arange(20)), other)
    said = sentence("ours", "other", found)
    assert title in verdict("ours", "other", found) and words in said and not set("−-") & set(said.replace("one-sided", ""))


def test_size_in_words():
    "Structures, prunable parameters and all parameters are told apart."
    assert size_sentence(0.5, 62, 100, 76) == ("50 % of heads and channels were to go. That is 50 % of the 0.00M parameters in attention blocks and MLPs, and 38 % of all 0.00M: "
                                               "embeddings and norms stay, so 62 % are left.")
