"""What reproduces the paper's comparisons: the peers' context modules, the tables, the noise, the figures."""
