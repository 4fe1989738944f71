"""The paper's comparisons: the compared modules, tables, figures, noise in numbers, benchmark."""
