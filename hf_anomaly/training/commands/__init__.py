"""What the scripts and `hf-anomaly` run: each module has `main(argv, program)`."""
