"""Files for deployment: a trained network in formats that load without autoslim."""
