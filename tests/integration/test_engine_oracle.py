"""The engine against transformers: every token and every log-probability of many sequences."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import NemotronHForCausalLM

from batchrun.engine.params import SamplingParams
from batchrun.llm import LLM, RequestOutput
from tests.parity.oracle import make_oracle, oracle_logits

SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "hybrid_override_pattern": "M-MM*-M*-",
    "chunk_size": 32,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def oracle() -> NemotronHForCausalLM:
    """A random Nemotron-H of transformers."""
    return make_oracle(7, **SIZES)


@pytest.fixture(scope="module")
def outputs(
    oracle: NemotronHForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> list[RequestOutput]:
    """40 sequences of 1 to 1,500 prompt tokens through one engine, as transformers saved them."""
    folder: Path = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(folder)
    llm = LLM(folder, dtype="float32", max_sequences=12, device="cpu")
    rng = Random(0)
    lengths = [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 97, 1500]
    lengths += [rng.randint(1, 1500) for _ in range(7)] + [rng.randint(1, 300) for _ in range(20)]
    rng.shuffle(lengths)
    prompts = [[rng.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in lengths]  # type: ignore[call-overload]
    params = [
        SamplingParams(temperature=0, max_tokens=rng.randint(1, 40), logprobs=1, ignore_eos=True)
        for _ in prompts
    ]
    return llm.generate(prompts, params)


def test_every_token_is_the_oracles(
    oracle: NemotronHForCausalLM, outputs: list[RequestOutput]
) -> None:
    """Greedy tokens are the oracle's likeliest, log-probabilities within 1e-4 of the oracle's."""
    assert len(outputs) == 40
    worst = 0.0
    for output in outputs:
        (sample,) = output.outputs
        prompt, generated = output.prompt_token_ids, sample.token_ids
        assert len(generated) == sample.num_completion_tokens > 0
        logits = oracle_logits(oracle, [*prompt, *generated[:-1]])[len(prompt) - 1 :]
        assert generated == logits.argmax(-1).tolist()
        expected = torch.log_softmax(logits.double(), -1)[range(len(generated)), generated]
        assert sample.logprobs is not None
        worst = max(worst, float((torch.tensor(sample.logprobs) - expected).abs().max()))
    assert worst < 1e-4
