"""Settings of the whole test suite."""

from __future__ import annotations

import os

import hypothesis
import torch

# Tests are many small operations: a second thread would only wait for the first.
torch.set_num_threads(1)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
