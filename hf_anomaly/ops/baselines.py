"""Trivial baselines: what a detector has to beat before its AUROC means anything. Deterministic; none sees a test label, not even for its sign.

Each takes training images (n, d) and test images (m, d), the pixels flattened to float32 in [−1, 1], and gives scores (m,), higher = more anomalous.
"""

import numpy as np

NEIGHBOURS = 5
EXPLAINED_VARIANCE = 0.9


def mean_intensity(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The mean pixel: brighter is more anomalous. An AUROC far below 0.5 says that darker would have been."""
    return test.mean(axis=1)


def contrast(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The negative standard deviation of the pixels: flatter is more anomalous."""
    return -test.std(axis=1)


def pixel_knn(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Mean Euclidean distance to the 5 nearest training images, or to all if there are fewer."""
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train)), algorithm="brute").fit(train)
    return neighbours.kneighbors(test)[0].mean(axis=1)


def pca_residual(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Squared distance to the plane of the training images' first principal components, as many as explain 90 % of their variance; where they do not
    vary, to their mean."""
    from sklearn.decomposition import PCA

    if (train == train[0]).all():
        return np.square(test - train[0]).sum(axis=1)
    pca = PCA(n_components=EXPLAINED_VARIANCE, svd_solver="full").fit(train)
    return np.square(test - pca.inverse_transform(pca.transform(test))).sum(axis=1)


BASELINES = {"mean_intensity": mean_intensity, "contrast": contrast, "pixel_knn": pixel_knn, "pca_residual": pca_residual}
TITLES = {
    "mean_intensity": "mean intensity",
    "contrast": "contrast (negative pixel std)",
    "pixel_knn": "pixel kNN",
    "pca_residual": "PCA residual",
}
