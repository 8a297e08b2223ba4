"""Whether an encoder makes the same of one concept in several modalities: `d2v align`.

`concepts` reads samples with several members, `features` makes vectors of them by encoders and without, `measures` is
the mathematics, `scoring` measures a pair of modalities, `verdict` compares with controls, `aligning` is all of it.
"""
