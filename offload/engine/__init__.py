"""The copy path: from images to stores and back."""
