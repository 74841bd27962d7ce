"""Zhang, Zhang, Luo, Xu: Embedding Principle of Loss Landscape of Deep Neural Networks (zhang2021embedding)."""
