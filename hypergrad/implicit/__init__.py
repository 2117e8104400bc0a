"""Implicit differentiation at a given ``w``, and what is known about its error.

`differentiation` computes hypergradients and single Newton steps. `newton_correction`
makes steps towards the minimum, for `hypergrad.certify` and for `confirmation`. `error`
and `confirmation` estimate how far a hypergradient is from the exact one, and `minimum`
and `curvature_probe` tell whether ``w`` is near a minimum.
"""
