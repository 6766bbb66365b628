"""The networks of the papers: backbones, neck, RPN, light head, and how they are built. Tensors in, tensors out."""
