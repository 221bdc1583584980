"""How well an image fits a caption: a small contrastive model with a matching head, and the protocol of all scorers."""
