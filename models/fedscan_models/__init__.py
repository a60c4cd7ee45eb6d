"""The models room: networks, losses and task metrics. It knows no patient, no site and no server.

Where to look:
    registry     ``MODELS``, ``build(name, shape, seed=...)``, ``select_trainable``: start here
    classifiers  cnn, resnet18, densenet121: images to one row of logits
    segmenters   unet2d, unet3d: images to a map of logits
    scatter      fixed wavelet scattering features and the linear model on them
    tasks        per-sample loss, scores, AUROC, Brier, patient-clustered intervals
    histograms   metrics from noisy score histograms, with intervals
    dp_ready     names every layer that breaks the per-patient guarantee, and what to use instead

Importing this package loads nothing; its modules load torch, and the MONAI networks load MONAI
when built.
"""
