"""Deliberate faults in the package, each with the check that must notice it.

A mutant is one edit of one function. Where a law is enough, the law is the check; a fault that keeps every law (a
weight of the wrong size, a formula for another) must be noticed by the oracles, which know the numbers.
"""

from support.mutants import criterion, features, losses, matched, matching, training

MUTANTS = [
    *criterion.MUTANTS,
    *losses.MUTANTS,
    *features.MUTANTS,
    *matched.MUTANTS,
    *matching.MUTANTS,
    *training.MUTANTS,
]

__all__ = ["MUTANTS"]
