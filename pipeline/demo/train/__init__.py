"""How the demo model, its clips and the held-out evaluation sets are made.

- what is said, and how it sounds: `lexicon`, `numerals`, `sentences`, `synth`
- what the network learns from: `vocabulary`, `tokenizer`, `targets`, `data`
- the network: `net`, `loss`, `checkpoint`, `train`
- what becomes of it: `export`, `convert` (to other runtimes), `evaluate`
- audio that training never saw: `heldout`, `clips`

Nothing outside this folder imports it at run time: its requirements are the optional extra `train`.
"""
