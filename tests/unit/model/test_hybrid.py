"""A sequence's logits depend on its own tokens alone, whoever shares its batch and its memory."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from batchrun.model.batch import Batch
from batchrun.model.hybrid import NemotronH
from batchrun.model.state import State
from tests.unit.model.models import SMALL, Driver, assert_close, random_model, random_tokens

TOLERANCE = 2e-5


def test_first_token_alone_is_a_prefill() -> None:
    """A prompt of one token does not read its slot, which holds another sequence's state."""
    driver = Driver(random_model(), num_slots=2)
    expected = driver.run(random_tokens(SMALL, 1))
    driver.run(random_tokens(SMALL, 30, seed=5))
    assert_close(driver.run(random_tokens(SMALL, 1)), expected, TOLERANCE)


@pytest.mark.parametrize("has_bias", [False, True])
def test_prepared_model(has_bias: bool) -> None:
    """A prepared model gives the same logits, with one matrix for what shares an input and not a
    byte more of weights; to prepare it twice is to prepare it once."""
    config = replace(SMALL, attention_bias=has_bias)
    tokens = random_tokens(config, 30)
    expected = Driver(random_model(config)).run(tokens)
    model = random_model(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.prepare()
    model.prepare()
    assert_close(Driver(model).run(tokens), expected, TOLERANCE)
    assert sum(parameter.nbytes for parameter in model.parameters()) == size
    names = [name for name, _ in model.named_parameters() if "_proj.weight" in name]
    attention = [name.split(".")[-2] for name in names if ".2." in name]
    assert sorted(attention) == ["o_proj", "qkv_proj"]


def test_mixed_batch_equals_alone() -> None:
    """Decodes, prompts, pieces of prompts and padding rows in one batch: as each alone."""
    driver = Driver(random_model())
    texts = {name: random_tokens(SMALL, 40, seed) for seed, name in enumerate("abcde")}
    expected = {name: Driver(driver.model).run(tokens) for name, tokens in texts.items()}
    driver.step(prefills={"a": texts["a"][:9], "b": texts["b"][:1], "c": texts["c"][:20]})
    for i in range(3):
        logits = driver.step(
            decodes={"b": texts["b"][1 + i], "a": texts["a"][9 + i]},
            prefills={
                "c": texts["c"][20 + 3 * i : 23 + 3 * i],
                f"{'de'[i % 2]}": texts["de"[i % 2]],
            }
            if i < 2
            else {"c": texts["c"][26:29]},
            padding_rows=i,
        )
        assert_close(logits["a"], expected["a"][9 + i : 10 + i], TOLERANCE)
        assert_close(logits["b"], expected["b"][1 + i : 2 + i], TOLERANCE)
        assert_close(logits["c"], expected["c"][20 + 3 * i : 23 + 3 * i], TOLERANCE)
        if i < 2:
            assert_close(logits["de"[i]], expected["de"[i]], TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_come_and_go(seed: int) -> None:
    """Over a random schedule with slots reused, each sequence has the logits it has alone."""
    random = Random(seed)
    pattern = ["MM*-M*-", "M-M", "*-*-", "M*M"][seed]
    driver = Driver(random_model(replace(SMALL, layer_pattern=pattern), seed))
    expected, texts, done = {}, {}, 0
    while done < 12:
        decodes, prefills = {}, {}
        for name in list(driver.slots):
            left = texts[name][driver.contexts[name] :]
            if not left:
                driver.finish(name)
                done += 1
            elif random.random() < 0.6:
                decodes[name] = left[0]
            elif random.random() < 0.7:
                prefills[name] = left[: random.randint(1, 12)]
        while len(driver.slots) + len(prefills.keys() - driver.slots) < driver.num_slots - 1:
            if random.random() < 0.5:
                break
            name = f"s{len(texts)}"
            texts[name] = random_tokens(SMALL, random.randint(1, 80), seed=len(texts))
            expected[name] = Driver(driver.model).run(texts[name])
            prefills[name] = texts[name][: random.randint(1, 80)]
        if not decodes and not prefills:
            continue
        before = driver.contexts | dict.fromkeys(prefills.keys() - driver.slots, 0)
        logits = driver.step(decodes, prefills, padding_rows=random.randint(0, 2))
        assert logits.keys() == decodes.keys() | prefills.keys()
        for name, rows in logits.items():
            place = slice(before[name], before[name] + len(rows))
            assert_close(rows, expected[name][place], TOLERANCE)


def test_very_different_lengths_in_one_batch() -> None:
    """A context of 600 tokens beside one of 1: each as alone."""
    driver = Driver(random_model(), num_slots=4, blocks_per_slot=160)
    long, short = random_tokens(SMALL, 601), random_tokens(SMALL, 3, seed=1)
    expected = driver.run(long)
    logits = driver.step(prefills={"long": long[:600], "short": short[:1]})
    assert_close(logits["long"], expected[:600], TOLERANCE)
    logits = driver.step(decodes={"short": short[1], "long": long[600]})
    assert_close(logits["long"], expected[600:], TOLERANCE)
    assert_close(logits["short"], driver.run(short)[1:2], TOLERANCE)


def test_a_broken_neighbour() -> None:
    """NaN in one sequence's state stays there, and does not outlive it in its slot and blocks."""
    driver = Driver(random_model(), num_slots=3)
    good, next_one = random_tokens(SMALL, 12), random_tokens(SMALL, 30, seed=3)
    expected = driver.run(good)
    logits = driver.step(prefills={"bad": [1, 2, 3], "good": good[:9]})
    bad = driver.slots["bad"]
    driver.state.ssm[:, bad] = driver.state.conv[:, bad] = torch.nan
    logits = driver.step(decodes={"bad": 1, "good": good[9]})
    logits |= driver.step(decodes={"good": good[10]}, prefills={"bad": [1, 2]})
    assert logits["bad"].isnan().all()
    assert_close(logits["good"], expected[10:11], TOLERANCE)
    driver.finish("bad")
    logits = driver.step(decodes={"good": good[11]}, prefills={"next": next_one})
    assert driver.slots["next"] == bad
    assert_close(logits["good"], expected[11:], TOLERANCE)
    assert_close(logits["next"], Driver(driver.model).run(next_one), TOLERANCE)


def test_states_do_not_depend_on_chunking() -> None:
    """One go, pieces, and token by token leave the same conv and SSM state behind."""
    tokens = random_tokens(SMALL, 21)
    states = []
    for cuts in ([], [1, 2, 9], range(1, 21)):
        driver = Driver(random_model(), num_slots=2)
        driver.run(tokens, list(cuts))
        states.append(driver.state)
    for state in states[1:]:
        assert_close(state.ssm[:, 1], states[0].ssm[:, 1], TOLERANCE)
        assert_close(state.conv[:, 1], states[0].conv[:, 1], TOLERANCE)


def test_a_step_writes_only_where_its_sequences_live() -> None:
    """Slots and blocks of sequences that sit a step out keep every bit."""
    driver = Driver(random_model())
    for name in "abc":
        driver.step(prefills={name: random_tokens(SMALL, 7)})
    pools = [driver.state.conv, driver.state.ssm, driver.state.keys, driver.state.values]
    before = [pool.clone() for pool in pools]
    driver.step(decodes={"b": 3}, prefills={"c": [1, 2]}, padding_rows=1)
    mine = [0, driver.slots["b"], driver.slots["c"]]
    my_blocks = [0, *driver.tables[mine[1:]].flatten().tolist()]
    for pool, old, touched in zip(pools, before, [mine, mine, my_blocks, my_blocks], strict=True):
        kept = [i for i in range(pool.shape[1]) if i not in touched]
        assert torch.equal(pool[:, kept].nan_to_num(-1.0), old[:, kept].nan_to_num(-1.0))
    assert not torch.equal(driver.state.ssm[:, mine[1]], before[1][:, mine[1]])


def test_only_the_wanted_logits() -> None:
    """Logits come for `logit_rows` alone, in its order; none are fine too."""
    model = random_model()
    tokens = random_tokens(SMALL, 9)
    expected = Driver(model).run(tokens)
    for wanted in ([8], [3, 0, 3], []):
        state = State.allocate(SMALL, 2, 5, 4, torch.float32, torch.float32, "cpu")
        batch = Batch(
            token_ids=torch.tensor(tokens),
            num_decodes=0,
            prefill_lens=(9,),
            slots=torch.tensor([1]),
            context_lens=(0,),
            block_tables=torch.tensor([[3, 1, 4]]),
            logit_rows=torch.tensor(wanted, dtype=torch.long),
        )
        logits = model(batch, state)
        assert logits.dtype == torch.float32
        assert logits.shape == (len(wanted), SMALL.vocab_size)
        torch.testing.assert_close(logits, expected[wanted], atol=TOLERANCE, rtol=0)


def test_same_batch_same_bits() -> None:
    """The same batch computed twice gives the same bits."""
    first, second = (Driver(random_model()).run(random_tokens(SMALL, 33), [20]) for _ in range(2))
    assert torch.equal(first, second)


def test_tied_embeddings_make_the_logits() -> None:
    """With tied embeddings there is no lm_head, and logits are products with the embeddings."""
    tied = random_model(replace(SMALL, tie_word_embeddings=True))
    untied = NemotronH(SMALL).requires_grad_(False)
    weights = tied.state_dict()
    assert "lm_head.weight" not in weights
    untied.load_state_dict(weights | {"lm_head.weight": weights["backbone.embeddings.weight"]})
    tokens = random_tokens(SMALL, 5)
    assert torch.equal(Driver(tied).run(tokens), Driver(untied).run(tokens))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(state_dtype: torch.dtype) -> None:
    """In bfloat16 the logits stay near those of float32, one go or one token at a time."""
    model = random_model()
    tokens = random_tokens(SMALL, 30)
    expected = Driver(model).run(tokens)
    model = model.to(torch.bfloat16)
    for cuts in ([], range(1, 30)):
        driver = Driver(model, dtype=torch.bfloat16, state_dtype=state_dtype)
        logits = driver.run(tokens, list(cuts))
        assert logits.dtype == torch.float32
        error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.05
    assert driver.state.ssm.dtype == state_dtype
