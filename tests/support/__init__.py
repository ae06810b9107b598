"""What the tests share: oracles, cases, steps, comparisons, deliberate faults, stand-ins."""
