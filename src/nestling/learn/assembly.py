"""A run's parts put together from its settings: reading order, optimizer, schedule, learner."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nestling import models, stream
from nestling.learn.budget import Budget
from nestling.learn.config import TrainConfig
from nestling.learn.learner import Learner
from nestling.learn.optimizer import from_config
from nestling.schedule import Schedule


def assemble(
    config: TrainConfig,
    model: models.LanguageModel,
    corpus: stream.Corpus,
    parts: Sequence[stream.Part],
    budget: Budget,
) -> Learner:
    """The learner of a run at its first step. parts: what it reads one after the other; empty: the corpus."""
    tokenizer = stream.ByteTokenizer()
    align = model.window if model.window is not None and config.length % model.window == 0 else 1

    def lanes_of(documents: Sequence[stream.Document]) -> stream.Lanes:
        return stream.Lanes(documents, tokenizer, config.lanes, config.length, seed=config.seed, align=align)

    reading = stream.Parts([lanes_of(p.corpus.train) for p in parts]) if parts else lanes_of(corpus.train)
    schedule = Schedule(shape=config.schedule, warmup=config.warmup * config.lanes * config.length)
    return Learner(
        model,
        from_config(config, model),
        reading,
        schedule=lambda tokens: schedule(tokens, budget.progress(tokens), budget.total),
        clip=config.clip,
        carry=config.carry,
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
    )
