"""Training on the device: the ops of training programs, and the trainer that runs them without PyTorch."""
