"""DeepSeek-V3's architecture (arXiv 2412.19437) as plain torch modules, one file per concern.

`config` the typed config.json, `norm`, `rope` (YaRN), `mla` (attention), `router` and `experts` (DeepSeekMoE), `layers`
(dense MLP, MoE block, decoder layer, MTP module), `transformer` (the whole), `balance` (bias update), `initialise`,
`counts` (parameters), `checkpoint` and `fp8` (Hugging Face folders both ways).
"""
