"""A small LLaVA, trained from nothing on drawn scenes, so that accuracy is measured offline.

A package of its own: it is no host (it makes a model that the LLaVA host reads), no evaluation (it
makes what is measured), and `ocvtp.training` trains pruners.
"""
