"""Pure tensor cores that methods, losses and hosts share: tensors in, tensors out."""
