"""Cell types for a user's own clusters: `annotate(adata, cluster_key="leiden", ...)`, in scanpy's manner."""

from eval.annotate.run import Model, annotate, annotate_file

__all__ = ["Model", "annotate", "annotate_file"]
