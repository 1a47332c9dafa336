"""A small LLaVA around a real, frozen vision tower that answers questions about composites.

Composites are photographs into which the objects of COCO's masks are pasted, so that what is there,
and where, is known. Neither images nor the tower's weights are part of the project: both are given
as folders.
"""
