"""Resources: budgets, what configurations cost, and measurements."""
