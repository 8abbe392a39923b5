"""Channels: groups, the grid, the channel graph, resizing, sorting and copying networks."""
