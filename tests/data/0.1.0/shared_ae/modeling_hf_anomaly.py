"""The code of this detector is the package hf-anomaly (pip install hf-anomaly). Through this file transformers' Auto classes find it there."""

import hf_anomaly


def __getattr__(name):
    return getattr(hf_anomaly, name)
