"""Columns of metrics.jsonl and the points that stand for them."""

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.pages.metrics import read_metrics, running_mean, thin


@given(st.lists(st.floats(width=32) | st.integers(-5, 5).map(float), min_size=1, max_size=400), st.integers(8, 60))
def test_the_ends_and_the_extremes_are_kept_in_few_points(values, buckets):
    values = np.array(values)
    kept = thin(values, buckets)
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert len(kept) <= 3 * buckets + 2
    finite = values[np.isfinite(values)]
    if len(finite):
        assert {finite.min(), finite.max()} <= set(values[kept])
    assert np.isfinite(values).all() == np.isfinite(values[kept]).all()


def test_the_beginning_keeps_its_shape_on_a_log_axis():
    kept = thin(np.random.default_rng(0).normal(size=50_000), 1000)
    assert (kept < 100).sum() > 40
    assert (kept[0], kept[-1]) == (0, 49_999)


def test_the_running_mean_is_that_of_the_values_around():
    values = np.random.default_rng(0).normal(size=1000)
    values[[400, 401]] = math.nan, math.inf
    mean = running_mean(values)
    for i, half in ((0, 0), (10, 5), (100, 10), (402, 10), (999, 10)):
        around = values[i - half : i + half + 1]
        np.testing.assert_allclose(mean[i], around[np.isfinite(around)].mean(), rtol=1e-9)
    assert np.isnan(running_mean(np.array([math.nan]))).all()


def test_what_is_no_row_is_counted_and_the_line_being_written_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3}, {"step": 2, "loss": 9.0}, {"step": True}, {"step": -1}]
    lines += [{"step": 5, "loss": "text", "val_loss": math.nan}, {"step": 2**60}]
    text = "\n".join(map(json.dumps, lines)) + "\nnonsense\n" + "[" * 100_000 + '\n{"step": 6, "loss": 1.0}'
    path.write_text(text)
    metrics = read_metrics(path)
    assert metrics.steps.tolist() == [1, 2, 5]
    assert metrics.columns["loss"].values.tolist() == [2.0, 3.0]
    np.testing.assert_array_equal(metrics.at("val_loss", np.arange(3)), [math.nan] * 3)
    assert metrics.damaged == 6
    assert (read_metrics(tmp_path / "none").count, metrics.last("loss"), metrics.last("none")) == (0, 3.0, None)
