"""``batchrun plan``: what a run would take, before it takes it.

1. ``plan`` checks the job, and has footers and rows read (:mod:`batchrun.data.survey`);
2. ``census`` makes prompts of rows, all or a sample: how many tokens, which can never run;
3. ``outputs`` says what is assumed of the tokens that are generated;
4. ``target`` finds the device: ``device`` by its data sheet, ``benchfile`` as it was measured,
   ``here`` this machine;
5. ``prediction`` is the arithmetic from all that to hours, ``requests`` that of object storage.

This module imports nothing, so that a part can be used without the others.
"""
