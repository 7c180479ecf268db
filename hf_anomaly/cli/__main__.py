"""`python -m hf_anomaly.cli`, for `accelerate launch -m hf_anomaly.cli`."""

from . import main

if __name__ == "__main__":
    main()
