"""What benchmarks/quality.py is made of: models and tasks, training, compression methods, the table and the plots."""
