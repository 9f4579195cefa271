"""Detectors: one module per method. Importing this package enters all of them into the registry."""

from patchcore.methods import autoencoder as autoencoder
from patchcore.methods import ensemble as ensemble
from patchcore.methods import fastflow as fastflow
from patchcore.methods import feature_autoencoder as feature_autoencoder
from patchcore.methods import patchcore as patchcore
from patchcore.methods import resnet_knn as resnet_knn
