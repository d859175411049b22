"""The inference engine: continuous batching over state slots and paged attention blocks.

1. A :class:`~batchrun.engine.request.Request` waits in the scheduler until a slot and its blocks
   are free (``scheduler``, ``blocks``; sized once at load by ``memory``).
2. Each :meth:`~batchrun.engine.engine.Engine.step` takes one token of every decoding sequence and
   chunks of prompts, packs them into one ``Batch``, runs the model and samples (``model_runner``,
   ``sampler``).
3. The sampled token goes to the sequence's transcript (``transcript``, ``thinking``), which may
   answer with tokens to be forced, and decides when the sequence has ended.

The scheduler never sees a tensor, the model runner never sees a queue.
"""
