"""The losses: each a pure function of tensors and a thin Module with the same options."""
