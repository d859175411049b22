"""Nemotron-H: a hybrid of Mamba-2, attention and MLP layers, for inference.

Where to begin reading, in this order:

1. :mod:`~batchrun.model.config` - the sizes of a model, and the keys they are read from;
2. :mod:`~batchrun.model.hybrid` - the model: embeddings, layers, logits;
3. :mod:`~batchrun.model.layers`, :mod:`~batchrun.model.mamba2`,
   :mod:`~batchrun.model.attention` - the three kinds of layer and the norms;
4. :mod:`~batchrun.model.batch` and :mod:`~batchrun.model.state` - what goes into a forward pass and
   what it remembers: any number of sequences, each with any number of tokens, from any state;
5. :mod:`~batchrun.model.layout` and :mod:`~batchrun.model.ops` - how a ragged batch is computed
   without a loop over sequences;
6. :mod:`~batchrun.model.headers`, :mod:`~batchrun.model.checkpoint` and
   :mod:`~batchrun.model.weights` - from files to a model.

This module imports nothing, so that reading a model's config does not load torch.
"""
