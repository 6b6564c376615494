"""The reference model's metrics, against scikit-learn, scipy and hand-counted cases."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, recall_score

from examples.benchmarking.metrics import make_metrics
from examples.decalign.data.target import POLARITY, SENTIMENT, SIMS, Target

SIX = Target(kind="class", categories=tuple("abcdef"))


def compute(target, predicted, labels, parts=1):
    metrics = make_metrics(target)
    for x, y in zip(predicted.chunk(parts), labels.chunk(parts), strict=True):
        metrics.update(x, y)
    return {name: float(value) for name, value in metrics.compute().items()}


def test_sentiment_counted_by_hand():
    labels = torch.tensor([-3.0, -1.0, 0.0, 0.0, 1.0, 2.6])
    predicted = torch.tensor([-2.0, 0.2, -0.1, 0.4, 1.4, 4.0])
    found = compute(SENTIMENT, predicted, labels)
    assert found["mae"] == pytest.approx((1 + 1.2 + 0.1 + 0.4 + 0.4 + 1.4) / 6)
    # Non-negative labels: 0, 0, 1, 2.6. Right: -3, the second 0, 1 and 2.6.
    assert found["acc2"] == pytest.approx(4 / 6)
    # Negative: precision 1/2, recall 1/2, F1 1/2, two samples. Non-negative: 3/4, 3/4, four.
    assert found["f1"] == pytest.approx((2 * 0.5 + 4 * 0.75) / 6)
    # Without the labels 0: -3, 1, 2.6 right, -1 wrong.
    assert found["acc2_nonzero"] == pytest.approx(3 / 4)
    # Negative: precision 1, recall 1/2, F1 2/3; positive: precision 2/3, recall 1, F1 4/5.
    assert found["f1_nonzero"] == pytest.approx((2 * (2 / 3) + 2 * 0.8) / 4)
    # Nearest whole numbers: -3 -1 0 0 1 3 against -2 0 0 0 1 3.
    assert found["acc7"] == pytest.approx(4 / 6)


def test_a_prediction_of_zero_is_negative_only_where_zero_labels_are_left_out():
    found = compute(
        SENTIMENT, torch.tensor([0.0, 0.0, 0.0, 1e-9]), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    )
    assert found["acc2"] == pytest.approx(3 / 4)
    assert found["acc2_nonzero"] == pytest.approx(2 / 3)


def test_sims_counted_by_hand():
    labels = torch.tensor([-1.0, -0.1, 0.0, 0.1, 0.2, 1.0])
    predicted = torch.tensor([-0.5, 0.0, 0.1, 0.2, 0.05, 2.0])
    found = compute(SIMS, predicted, labels)
    # Positive labels: 0.1, 0.2, 1. Wrong: 0, which is not positive and predicted so.
    assert found["acc2"] == pytest.approx(5 / 6)
    # Categories: -1 and -0.1 negative, 0 and 0.1 neutral, the rest positive;
    # predicted: negative, neutral, neutral, positive, neutral, positive.
    assert found["acc3"] == pytest.approx(3 / 6)
    assert "acc7" not in found


@pytest.mark.parametrize("target", [SENTIMENT, SIMS])
@pytest.mark.parametrize("seed", range(3))
def test_scores_agree_with_scikit_learn_and_scipy(target, seed):
    generator = np.random.default_rng(seed)
    limit = target.limits[1]
    labels = np.round(generator.uniform(-limit, limit, 200), 1)
    predicted = 1.3 * labels + limit * generator.normal(size=200) / 2
    found = compute(target, torch.from_numpy(predicted), torch.from_numpy(labels), parts=7)
    assert found["mae"] == pytest.approx(np.abs(predicted - labels).mean())
    assert found["corr"] == pytest.approx(pearsonr(predicted, labels).statistic, abs=1e-6)

    def sides(values):
        return values >= 0 if target.zero == "positive" else values > 0

    truth, said = sides(labels), sides(predicted)
    assert found["acc2"] == pytest.approx(accuracy_score(truth, said))
    assert found["f1"] == pytest.approx(f1_score(truth, said, average="weighted"))
    nonzero = labels != 0
    assert not nonzero.all()
    truth, said = labels[nonzero] > 0, predicted[nonzero] > 0
    assert found["acc2_nonzero"] == pytest.approx(accuracy_score(truth, said))
    assert found["f1_nonzero"] == pytest.approx(f1_score(truth, said, average="weighted"))
    if target is SENTIMENT:
        near = [np.round(np.clip(x, -3, 3)) for x in (labels, predicted)]
        assert found["acc7"] == pytest.approx(accuracy_score(*near))
    else:
        near = [np.digitize(x, [-0.1, 0.1], right=True) for x in (labels, predicted)]
        assert found["acc3"] == pytest.approx(accuracy_score(*near))


def test_classes_agree_with_scikit_learn_and_the_equations():
    labels, predicted = torch.randint(6, (2, 150))
    labels[labels == 4] = 5  # a class of no samples
    found = compute(SIX, predicted, labels, parts=4)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["weighted_f1"] == pytest.approx(f1_score(labels, predicted, average="weighted"))
    # Eq. 14-15, a class's accuracy being its recall.
    sizes = np.bincount(labels, minlength=6)
    arguments = {"labels": range(6), "average": None, "zero_division": 0}
    recalls = recall_score(labels, predicted, **arguments)
    assert found["accuracy"] == pytest.approx((sizes * recalls).sum() / sizes.sum())
    f1 = f1_score(labels, predicted, **arguments)
    assert found["weighted_f1"] == pytest.approx((sizes * f1).sum() / sizes.sum())


def test_a_class_past_the_sixth_counts():
    ten = Target(kind="class", categories=tuple("0123456789"))
    found = compute(ten, torch.tensor([0, 7, 9, 9]), torch.tensor([0, 7, 8, 9]))
    assert found["accuracy"] == pytest.approx(3 / 4)


def test_categories():
    scores = torch.tensor([-3.0, -2.4, -0.6, 0.0, 0.4, 1.7, 3.0, 9.0])
    assert SENTIMENT.category(scores).tolist() == [0, 1, 2, 3, 3, 5, 6, 6]
    scores = torch.tensor([-1.0, -0.1, -0.0999, 0.1, 0.1001], dtype=torch.float64)
    assert SIMS.category(scores).tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(POLARITY.category(torch.tensor([0, 1])), torch.tensor([0, 1]))


def test_losses_of_a_score_and_of_classes():
    logits, scores = torch.randn(5, 1), torch.randn(5)
    difference = logits.squeeze(-1) - scores
    torch.testing.assert_close(SENTIMENT.loss(logits, scores), difference.square().mean())
    torch.testing.assert_close(SENTIMENT.loss(logits, scores, "l1"), difference.abs().mean())
    logits, labels = torch.randn(5, 6), torch.tensor([0, 5, 1, 1, 3])
    expected = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(SIX.loss(logits, labels), expected)
    assert SENTIMENT.num_outputs == 1
    assert SIX.num_outputs == 6


def test_scores_are_clipped_where_mmsa_clips_them():
    logits = torch.tensor([[-2.0], [0.3], [1.4]])
    assert SIMS.predict(logits).tolist() == pytest.approx([-1.0, 0.3, 1.0])
    assert SENTIMENT.predict(5 * logits).tolist() == pytest.approx([-10.0, 1.5, 7.0])


def test_a_score_without_a_sign_has_no_binary_accuracy():
    target = Target(kind="score", categories=("low", "high"), limits=(2.0, 9.0), edges=(5.0,))
    found = compute(target, torch.tensor([2.5, 8.0, 6.0]), torch.tensor([3.0, 8.0, 4.0]))
    assert set(found) == {"mae", "corr", "acc2"}
    assert found["acc2"] == pytest.approx(2 / 3)
