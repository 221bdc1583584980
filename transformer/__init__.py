"""The prior: one causal transformer over [text tokens | image tokens], its masks, attention, cache and training."""
