"""PGKD (arXiv 2411.05045): rounds in which the teacher writes rows for the student's weaknesses."""
