"""One engine in its own process and environment, driven by ``compare.py``.

    python run_engine.py ENGINE --model FOLDER --dtype float32 --sequences 64 --threads 2 \
        --replies FD [--prefix-caching]

ENGINE is batchrun, hf or vllm; nothing else has to be installed. On stdin come lines of a workload
file and a file for the tokens, as JSON; the answers go as JSON lines to file descriptor FD, because
engines write to stdout what they like. The time is that of all requests of a workload, from the
first to the last, without loading, and with every cache of prompts empty.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

Requests = list[tuple[list[int], int]]
_MAX_LENGTH = 1024


class Engine(ABC):
    """What is compared."""

    versions: dict[str, str]

    @abstractmethod
    def generate(self, requests: Requests) -> list[list[int]]:
        """The new tokens of each request."""

    @abstractmethod
    def forget(self) -> None:
        """Empty what is kept of earlier prompts."""


class Batchrun(Engine):
    """This package's engine."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        import batchrun
        from batchrun.engine.engine import Engine as Inner
        from batchrun.engine.options import EngineOptions

        self._engine = Inner.load(
            Path(arguments.model),
            EngineOptions(
                dtype=arguments.dtype,
                device=arguments.device,
                max_sequences=arguments.sequences,
                max_model_len=_MAX_LENGTH,
                num_threads=arguments.threads,
            ),
        )
        self.versions = {"batchrun": batchrun.__version__, "torch": torch.__version__}

    def generate(self, requests: Requests) -> list[list[int]]:
        """Run all; their new tokens."""
        from batchrun.engine.params import SamplingParams
        from batchrun.engine.request import Request

        for number, (prompt, length) in enumerate(requests):
            params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
            self._engine.add(Request(number, tuple(prompt), params))
        tokens: list[list[int]] = [[] for _ in requests]
        while self._engine.num_unfinished:
            for output in self._engine.step():
                tokens[int(str(output.key))] = list(output.token_ids)
        return tokens

    def forget(self) -> None:
        """Drop its states of shared beginnings."""
        self._engine.forget_prefixes()


class Transformers(Engine):
    """``generate`` of transformers, in static batches of 8 requests of similar lengths."""

    _BATCH = 8

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch
        import transformers

        if arguments.device != "cuda":
            torch.set_num_threads(arguments.threads)
        self._torch = torch
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype)
        )
        for layer in model.model.layers:
            # It clamps time steps in the prefill and not in the decode; nobody else clamps them.
            if hasattr(layer.mixer, "time_step_limit"):
                layer.mixer.time_step_limit = (0.0, float("inf"))
        self._model = model.to(arguments.device).eval()
        self._device = arguments.device
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def generate(self, requests: Requests) -> list[list[int]]:
        """Run all; their new tokens."""
        torch = self._torch
        tokens: list[list[int]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], len(requests[i][0])))
        for start in range(0, len(order), self._BATCH):
            batch = order[start : start + self._BATCH]
            width = max(len(requests[i][0]) for i in batch)
            longest = max(requests[i][1] for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                prompt = requests[i][0]
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            with torch.inference_mode():
                out = self._model.generate(
                    ids.to(self._device),
                    attention_mask=mask.to(self._device),
                    do_sample=False,
                    max_new_tokens=longest,
                    min_new_tokens=longest,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            for row, i in enumerate(batch):
                tokens[i] = out[row, width : width + requests[i][1]].tolist()
        return tokens

    def forget(self) -> None:
        """It keeps nothing."""


class Vllm(Engine):
    """vLLM's offline engine."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch
        import vllm

        self._vllm: Any = vllm
        self._llm: Any = vllm.LLM(
            arguments.model,
            skip_tokenizer_init=True,
            dtype=arguments.dtype,
            max_model_len=_MAX_LENGTH,
            max_num_seqs=arguments.sequences,
            enable_prefix_caching=arguments.prefix_caching,
        )
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}

    def generate(self, requests: Requests) -> list[list[int]]:
        """Run all; their new tokens."""
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            self._vllm.SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, detokenize=False
            )
            for _, length in requests
        ]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def forget(self) -> None:
        """Drop its states of shared beginnings."""
        self._llm.reset_prefix_cache()


ENGINES: dict[str, type[Engine]] = {"batchrun": Batchrun, "hf": Transformers, "vllm": Vllm}


def read(path: str) -> Requests:
    """The requests of a workload file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["max_tokens"]) for row in map(json.loads, lines)]


def main() -> None:
    """Load, say so, and run what comes in."""
    parser = argparse.ArgumentParser(description="One engine of a comparison.")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--replies", type=int, required=True)
    arguments = parser.parse_args()

    def reply(**values: object) -> None:
        os.write(arguments.replies, (json.dumps(values) + "\n").encode())

    engine: Any = ENGINES[arguments.engine]
    loaded: Engine = engine(arguments)
    reply(versions=loaded.versions)
    for line in sys.stdin:
        order = json.loads(line)
        requests = read(order["workload"])
        loaded.forget()
        started = time.perf_counter()
        tokens = loaded.generate(requests)
        seconds = time.perf_counter() - started
        Path(order["tokens"]).write_text(json.dumps(tokens), encoding="utf-8")
        reply(seconds=seconds)


if __name__ == "__main__":
    main()
