"""Examples to batches: records on disk, captions, images, embeddings, conversations, packing.

Nothing here imports the models; where data needs one (a cache that encodes what it lacks), the
stage program passes a callable in.
"""
