"""The parts of `scripts/train.py`, on Lightning's Trainer and LightningCLI.

`cli` reads YAML and the command line and runs the Trainer. `module` is what is trained,
of a network (`models`), an optimizer (`optimizers`, `muon`) and a learning rate
(`schedules`). `data`, `digits`, `glyphs`, `folder`, `shards` and `synthetic` are what it
is trained on, batch by batch (`loader`); of them, `transforms` are of photographs, `tars` an
index of shards, `cache` keeps arrays that are slow to make. `checkpoints` are written whole
or not at all; `callbacks` measure. Randomness is a function of the position in training
(`seeds`), so that a resumed run is the uninterrupted one.
"""
