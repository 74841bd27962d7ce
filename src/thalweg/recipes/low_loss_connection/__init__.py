"""Low-loss connection of two trained networks, and ensembles: Anokhin & Yarotsky, ICML 2020."""
