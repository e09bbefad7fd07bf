"""From folders of BraTS NIfTI files to a store of preprocessed cases, then to patches; never imports jax."""
