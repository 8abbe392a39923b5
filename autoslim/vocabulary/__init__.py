"""The words of the house, without torch: channel groups, channel configurations, grids, budgets and their units."""
