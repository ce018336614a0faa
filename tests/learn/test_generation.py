"""Writing is the model's own forward, one token at a time: from the start, from a state, greedy or drawn with a seed."""

import itertools
import math
from collections import Counter

import pytest
import torch

from nestling import models
from nestling import state as fast
from nestling.cli import explain
from nestling.learn import generate, read
from nestling.learn.generation import GenerationError, pick

NAMES = ["gated_deltanet", "titans_lmm"]
PROMPT = [256, *b"The nest is"]


def model_of(name):
    torch.manual_seed(2)
    model = models.build(name, "tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def written(model, prompt=PROMPT, state=None, count=12, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return [token for token, _ in generate(model, prompt, state, count=count, generator=generator, **settings)]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_writes_the_same(name):
    model = model_of(name)
    torch.manual_seed(5)
    first = written(model)
    torch.manual_seed(6)
    assert written(model) == first
    assert written(model, segment=4) == first
    assert len(first) == 12
    assert len({tuple(written(model, seed=seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_is_the_likeliest_token_of_everything_read_so_far(name):
    model = model_of(name)
    text, expected = list(PROMPT), []
    for _ in range(12):
        logits, _ = model(torch.tensor([text]))
        logits[0, -1, 256] = -math.inf
        expected.append(int(logits[0, -1].argmax()))
        text.append(expected[-1])
    assert written(model, temperature=0, banned=[256]) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", NAMES)
def test_writing_goes_on_from_a_state(name):
    model = model_of(name)
    whole = written(model, temperature=0, count=10)
    half = list(itertools.islice(generate(model, PROMPT, count=5, temperature=0), 5))
    token, state = half[-1]
    assert written(model, [token], state, temperature=0, count=5) == whole[5:]
    assert all(not leaf.requires_grad for leaf in fast.leaves(state))

    document = [256, *b"a document read before"]
    after = read(model, document)
    fresh = written(model, [*document, *PROMPT], temperature=0)
    assert written(model, PROMPT, after, temperature=0) == fresh
    assert fresh != written(model, temperature=0), "what was read before matters"


def test_one_generator_draws_for_the_whole_text():
    """A text cut in two and drawn on with the same generator is the text in one piece."""
    model = model_of("gated_deltanet")
    whole = written(model, count=8, seed=3)
    generator = torch.Generator().manual_seed(3)
    *_, (token, state) = first = list(generate(model, PROMPT, count=4, generator=generator))
    rest = generate(model, [token], state, count=4, generator=generator)
    assert [t for t, _ in first] + [t for t, _ in rest] == whole


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p, temperature=1.0, banned=()):
        return Counter(pick(logits, temperature, top_p, banned, generator) for _ in range(2000))

    assert set(drawn(0.49)) == {0}
    assert set(drawn(0.79)) == {0, 1}
    assert set(drawn(1.0)) == {0, 1, 2, 3}
    assert set(drawn(0.5, banned=[0])) == {1}
    two = drawn(0.79)
    assert two[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)
    cold = drawn(1.0, temperature=0.5)
    squares = [x * x for x in (0.5, 0.3, 0.15, 0.05)]
    assert cold[0] / 2000 == pytest.approx(squares[0] / sum(squares), abs=0.05)
    assert set(drawn(1.0, temperature=1e-300)) == {0}
    assert pick(logits, 0, 1.0, [0], None) == 1


def test_impossible_settings_are_refused():
    model = model_of("gated_deltanet")
    for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=r"temperature .* top_p"):
            next(generate(model, PROMPT, count=1, **bad))
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(model, [], count=1))
    assert list(generate(model, PROMPT, count=0)) == []


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_no_number_is_no_token(temperature):
    model = model_of("gated_deltanet")
    with torch.no_grad():
        model.embedding.weight[PROMPT[-1]] = math.nan
    with pytest.raises(GenerationError, match=f"answer to token {PROMPT[-1]} is not finite") as caught:
        next(generate(model, PROMPT, count=1, temperature=temperature))
    assert explain(caught.value) == str(caught.value)
    assert len(list(generate(model, [*PROMPT, 0], count=1, temperature=temperature))) == 1, (
        "it is left out, and that is all"
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("damaged", [math.inf, -math.inf])
def test_what_is_not_finite_is_no_token(temperature, damaged):
    """+∞ for one token leaves no probabilities, and neither does −∞ for all."""

    class Damaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, state):
            logits = torch.zeros(*tokens.shape, 9)
            logits[..., 3 if damaged > 0 else slice(None)] = damaged
            return logits, state

    with pytest.raises(GenerationError, match="answer to token 2 is not finite"):
        next(generate(Damaged(), [1, 2], count=1, temperature=temperature))
