"""Generation with the streaming state against reading the whole text anew for each token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model.helpers import CASES, VOCAB, config_of, hot_model
from titans_pretrain.evaluate.generate import choose, generate
from titans_pretrain.model.titans import TitansLM

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2], [7, 1, 8, 2, 8])


def reread(model: TitansLM, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest continuation, the whole text read from its beginning for every token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            logits, _ = model(torch.tensor([text]), torch.arange(len(text))[None])
            text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_streaming_equals_reading_the_whole_prefix_each_time(case: str) -> None:
    model = hot_model(config_of(case))
    expected = [reread(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) > 1, "the prompt matters"
    assert generate(model, PROMPTS, 12, temperature=0) == expected


def test_a_text_ends_at_its_end_and_the_others_go_on() -> None:
    model = hot_model(config_of("mac"))
    whole = [reread(model, prompt, 20) for prompt in PROMPTS]
    end = next(token for token in whole[0] if token not in whole[2])
    expected = [text[: text.index(end)] if end in text else text for text in whole]
    assert len(expected[0]) < 20 == len(expected[2])
    assert generate(model, PROMPTS, 20, temperature=0, end=end) == expected
    assert generate(model, PROMPTS, 20, temperature=0, seconds=0) == [t[:1] for t in whole]
    assert generate(model, PROMPTS, 0, temperature=0) == [[], [], []]
    few = generate(model, PROMPTS, 20, temperature=0, vocabulary=max(map(max, whole)))
    assert max(map(max, few)) < max(map(max, whole)) and few != whole


def test_draws_come_from_the_given_generator_alone_and_the_mode_is_kept() -> None:
    model = hot_model(config_of("lmm")).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def drawn(seed: int) -> list[list[int]]:
        given = torch.Generator().manual_seed(seed)
        return generate(model, PROMPTS, 12, temperature=1.0, top_p=0.9, generator=given)

    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    with pytest.raises(ValueError, match="generator"):
        generate(model, PROMPTS, 1, temperature=1.0)


@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=VOCAB, unique=True),
    temperature=st.floats(0.2, 3),
    top_p=st.floats(0.05, 1),
)
def test_only_the_likeliest_tokens_that_reach_top_p_are_drawn(
    logits: list[float], temperature: float, top_p: float
) -> None:
    row = torch.tensor(logits)
    probabilities = (row.double() / temperature).softmax(0)
    allowed, total = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda t: -logits[t]):
        if total < top_p + 1e-5:  # float32 sums may differ so much
            allowed.add(token)
        total += float(probabilities[token])
    g = torch.Generator().manual_seed(0)
    drawn = choose(row.expand(200, -1), temperature, top_p, g).tolist()
    assert set(drawn) <= allowed
    assert int(choose(row[None], 0, 1.0, None)) == logits.index(max(logits))


def test_frequencies_are_those_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    g = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(20_000, -1), 0.5, 1.0, g)
    shares = torch.bincount(drawn, minlength=3) / 20_000
    assert torch.allclose(shares, (logits / 0.5).softmax(0), atol=0.01)
    drawn = choose(logits.expand(20_000, -1), 0.5, 0.9, g)  # 0.867 + 0.117 reach 0.9
    shares = torch.bincount(drawn, minlength=3) / 20_000
    kept = torch.tensor([0.0, 1.0, 2.0]).div(0.5).softmax(0)[1:]
    assert torch.allclose(shares, torch.cat((torch.zeros(1), kept / kept.sum())), atol=0.01)
