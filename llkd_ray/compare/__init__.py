"""Train many ways on the same labels, and say which is better and how surely."""
