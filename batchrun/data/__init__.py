"""Storage: input, output and bookkeeping. The only folder that knows pyarrow, fsspec and s3fs.

``store`` lists, reads and creates objects; ``inputs`` finds and plans the input, ``reader`` and
``writer`` stream one shard in and one part out; ``run`` keeps a run's bookkeeping beside its
parts, ``lock`` keeps two runs from one output, ``checkpoints`` brings a model to this machine.
"""
