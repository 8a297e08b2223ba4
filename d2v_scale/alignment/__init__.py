"""Whether an encoder makes the same of one concept in several modalities: `d2v align`.

`concepts` reads samples with several members, `features` makes vectors of them by encoders and without, `measures` is
the mathematics, `scoring` measures layers, `pairs` a pair of modalities with its controls, `verdict` compares them,
`result` is what comes of it, `aligning` all of it.
"""
