"""Target-aware feature distillation: loss, mask and quality, and the passes over the feature maps that they take."""
