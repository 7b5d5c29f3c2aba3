"""The fuzzer's cases of every kind end as they must, and one of each kind at least is accepted."""

import sys

import pytest

from experiments import fuzz
from jaxlm import sample

CASES = 6  # of each kind; .ci/run tries 4,000 of all
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="its disks refuse some names of the cases")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_the_first_cases_are_accepted_or_refused(kind):
    tried = [fuzz.try_case(0, kind, number) for number in range(CASES)]
    verdicts = {verdict for verdict, *_ in tried}
    assert "accepted" in verdicts, tried
    assert "failed" not in verdicts, tried


def test_a_lost_prompt_is_found(monkeypatch):
    assert fuzz.try_case(0, "stdin", 2)[0] == "accepted"
    monkeypatch.setattr(sample, "_encode", lambda loaded, number, text: sample.Prompt(number, "", [0]))
    verdict, reason, _ = fuzz.try_case(0, "stdin", 2)
    assert (verdict, reason.split()[0]) == ("failed", "AssertionError")
