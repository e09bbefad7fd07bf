"""From folders of BraTS NIfTI files to a store of preprocessed cases, and from the store to patches; never imports jax."""
