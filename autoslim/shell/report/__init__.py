"""What each method gives at a budget: the comparison table and the pictures."""
