"""The terms that a distillation is composed of: each a Module from a step to named scalars."""
