"""Corpora, packing, mixtures and streams. No process group and no GPU is needed for anything here."""
