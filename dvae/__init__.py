"""Images to discrete codes and back: encoder, quantizers, decoder, losses, training."""
