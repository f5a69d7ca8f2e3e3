"""Methods that fit a response and step hyperparameters, without Lightning."""
